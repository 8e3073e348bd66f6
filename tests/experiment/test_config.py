"""Configs: an invalid config gives one line with field, value and allowed values."""

from dataclasses import dataclass
from importlib import resources
from typing import Literal

import pytest
import torch

from helpers.config_errors import ARM, HEAD, refusal
from perdure.adversarial import FGSM, PGD
from perdure.errors import ConfigError
from perdure.experiment.arm import ArmRun, open_stream
from perdure.experiment.attack_config import AttackConfig
from perdure.experiment.config import (
    Arm,
    Config,
    FederationConfig,
    parse,
    read,
)
from perdure.experiment.explain_config import ExplainConfig
from perdure.experiment.from_tables import build
from perdure.experiment.metrics_log import MetricsLog
from perdure.experiment.training_config import OPTIMIZERS, TrainingConfig
from perdure.explain import KernelSHAP
from perdure.privacy.settings import Privacy
from perdure.strategies import find, names
from perdure.tasks.losses import CrossEntropy, Focal

# --------------------------------------------------------------------------- what is right


def test_a_config_needs_only_name_and_arms():
    config = parse(HEAD + ARM)
    assert config == Config(name="x", arms=(Arm(strategy=find("naive")(), file="naive"),))
    assert config.arms[0].name == "naive-plain"


def test_the_config_reader_reads_every_table():
    text = f"""
    name = "all"
    seed = 7
    threads = 2
    [data]
    name = "mnist"
    root = "/somewhere"
    scenario = "task"
    experiences = 2
    shuffle_classes = true
    [model]
    name = "cnn"
    width = 6
    head = "cosine"
    [training]
    optimizer = "SGD"
    learning_rate = 1
    momentum = 0.5
    iterations = 9
    [training.adversary]
    name = "pgd"
    epsilon = 0.5
    bounds = [0, 2]
    [private_training]
    epochs = 2
    [federation]
    clients = 4
    fraction = 0.5
    [privacy]
    epsilon = 2
    seed = 5
    [attack]
    name = "fgsm"
    epsilon = 0.25
    norm = "l2"
    [explain]
    method = "kernel_shap"
    records = 3
    samples = 99
    {ARM}
    [[arms]]
    strategy = "ewc"
    strength = 2
    private = true
    """
    config = parse(text)
    assert (config.name, config.seed, config.threads) == ("all", 7, 2)
    assert config.data.root == "/somewhere"
    assert config.data.shuffle_classes is True
    assert (config.model.width, config.model.head) == (6, "cosine")
    assert (config.training.learning_rate, config.training.iterations, config.training.epochs) == (
        1.0,
        9,
        None,
    )
    assert config.private_training == TrainingConfig(epochs=2)
    assert config.federation == FederationConfig(clients=4, fraction=0.5)
    assert config.privacy == Privacy(epsilon=2.0, seed=5)
    assert config.attack == AttackConfig(
        name="fgsm", attack=FGSM(epsilon=0.25, norm="l2"), bounds_given=False
    )
    assert config.training.adversary == AttackConfig(
        name="pgd", attack=PGD(epsilon=0.5, bounds=(0.0, 2.0))
    )
    assert config.explain == ExplainConfig(
        method="kernel_shap", explainer=KernelSHAP(samples=99), records=3
    )
    assert [arm.name for arm in config.arms] == ["naive-plain", "ewc-private"]
    assert config.arms[1].strategy == find("ewc")(strength=2.0)
    assert isinstance(config.arms[1].strategy.strength, float)


def test_the_demo_config_is_valid():
    config = parse(
        resources.files("perdure.experiment").joinpath("demo.toml").read_text(encoding="utf-8")
    )
    assert config.name == "demo"
    assert config.attack.attack == PGD(epsilon=0.1, steps=10)
    assert config.explain == ExplainConfig(method="kernel_shap", explainer=KernelSHAP(), records=6)
    assert {arm.file for arm in config.arms} == {"naive", "ewc", "lwf", "replay"}
    assert [arm.private for arm in config.arms] == [False] * 4 + [True] * 4


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_allowed_optimizer_makes_a_step(name):
    layer = torch.nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    optimizer = TrainingConfig(optimizer=name, learning_rate=0.1, epochs=1).factory()(
        layer.parameters()
    )
    layer(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)
    assert torch.isfinite(layer.weight).all()


def test_the_config_passes_optimizer_options_to_the_optimizer():
    config = TrainingConfig(optimizer="SGD", learning_rate=0.25, momentum=0.75, epochs=1)
    group = config.factory()(torch.nn.Linear(1, 1).parameters()).param_groups[0]
    assert (group["lr"], group["momentum"]) == (0.25, 0.75)


# ------------------------------------------------------------------------ what is missing, and arms


def test_a_missing_config_field_is_named_in_the_error():
    assert refusal(ARM) == "name is missing; allowed: text"
    assert refusal(HEAD).startswith("arms is missing; allowed: one or more [[arms]] tables")
    assert (
        refusal(HEAD + '[[arms]]\nstrategy = "ewc"\n')
        == "arms[0].strength is missing; allowed: a finite number"
    )


@pytest.mark.parametrize(
    "arms", ["arms = 3", 'arms = "naive"', "[arms]\nstrategy = 3", 'arms = {strategy = "naive"}']
)
def test_a_config_refuses_arms_that_are_not_a_list_of_tables(arms):
    assert refusal(f"{HEAD}{arms}\n").startswith("arms = ")


@pytest.mark.parametrize(
    ("arm", "start"),
    [
        ("[[arms]]\n", "arms[0].strategy is missing; allowed: agem, "),
        ("[[arms]]\nstrategy = 3\n", "arms[0].strategy = 3"),
        ('arms = ["naive"]\n', "arms[0] = 'naive'"),
        ('[[arms]]\nstrategy = "ewcc"\n', "arms[0].strategy = 'ewcc'"),
        ('[[arms]]\nstrategy = "../ewc"\n', "arms[0].strategy = '../ewc'"),
        ('[[arms]]\nstrategy = "naive"\nprivate = 1\n', "arms[0].private = 1"),
        ('[[arms]]\nstrategy = "naive"\nstrength = 1.0\n', "arms[0].strength = 1.0"),
        (f'{ARM}[[arms]]\nstrategy = "ewc"\nstrength = true\n', "arms[1].strength = True"),
        ('[[arms]]\nstrategy = "ewc"\nstrength = -1.0\n', "arms[0]: ewc.strength = -1.0"),
        ('[[arms]]\nstrategy = "ewc"\nstrength = inf\n', "arms[0].strength = inf"),
        ('[[arms]]\nstrategy = "replay"\nmemory_size = 0\n', "arms[0].memory_size = 0"),
        (
            '[[arms]]\nstrategy = "replay"\nmemory_size = 5\nselection = "best"\n',
            "arms[0].selection = 'best'",
        ),
        (
            '[[arms]]\nstrategy = "naive"\nprivate = true\n',
            "an arm has private = true, but there is no [privacy] table",
        ),
        (ARM + ARM, "arms = ['naive-plain']"),
    ],
)
def test_a_config_refuses_arms_of_equal_name_or_invalid_fields(arm, start):
    assert refusal(HEAD + arm).startswith(start)


def test_a_strategy_of_another_module_has_a_safe_folder_name():
    [arm] = parse(f'{HEAD}[[arms]]\nstrategy = "perdure.strategies.l2:L2"\nstrength = 1\n').arms
    assert arm.strategy == find("l2")(strength=1.0)
    assert (arm.file, arm.name) == ("perdure.strategies.l2:L2", "perdure.strategies.l2.L2-plain")


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("perdure.strategies.l2:L3", "AttributeError"),
        ("no_such_package.inside:Mine", "ModuleNotFoundError"),
        ("perdure:Strategy", "allowed: a subclass of perdure.Strategy"),
        ("perdure:Learner", "allowed: a subclass of perdure.Strategy"),
        ("../naive:Naive", '"package.module:Name"'),
    ],
)
def test_a_config_refuses_an_imported_object_of_the_wrong_kind(name, end):
    message = refusal(f'{HEAD}[[arms]]\nstrategy = "{name}"\n')
    assert message.startswith(f"arms[0].strategy = {name!r} ")
    assert end in message


def test_an_unknown_strategy_is_refused_with_the_known_names():
    message = refusal(f'{HEAD}[[arms]]\nstrategy = "gem of the sea"\n')
    assert all(name in message for name in names())


# ----------------------------------------------------------------- types of a strategy's own fields


@dataclass(frozen=True, kw_only=True)
class Own:
    """A user's strategy with fields of several types."""

    how: Literal["fast", "slow"] | None = None
    sizes: tuple[float, ...] = ()
    limit: int | None = None
    strange: bytes = b""


def test_a_config_reads_optional_choices_and_lists():
    assert build(Own, {"how": "slow", "sizes": [1, 2.5], "limit": 3}, "x") == Own(
        how="slow", sizes=(1.0, 2.5), limit=3
    )


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"how": "soon"}, "x.how = 'soon' is not allowed; allowed: fast, slow"),
        ({"sizes": [1, "2"]}, "x.sizes[1] = '2' is not allowed; allowed: a finite number"),
        (
            {"sizes": 1},
            "x.sizes = 1 is not allowed; allowed: a list of which each is a finite number",
        ),
        ({"limit": False}, "x.limit = False is not allowed; allowed: a whole number"),
        (
            {"strange": "b"},
            "x.strange = 'b' is not allowed; allowed: no value, because TOML has no such type",
        ),
    ],
)
def test_a_config_checks_the_fields_of_an_imported_strategy(table, message):
    with pytest.raises(ConfigError) as caught:
        build(Own, table, "x")
    assert str(caught.value) == message


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """A field whose type is imported for type checkers only."""

    how: "NotImported"  # noqa: F821


def test_unreadable_types_of_an_imported_strategy_are_refused():
    with pytest.raises(ConfigError, match=r"^x: the types of Unreadable cannot be read \(name 'No"):
        build(Unreadable, {"how": 1}, "x")


# --------------------------------------------------------------------------- text and files


@pytest.mark.parametrize(
    "text",
    [
        "name = ",
        "name",
        '= "x"',
        "[data",
        "name = 'x'\nname = 'y'",
        "a = 1\n[a]\n",
        "seed = 01",
        "x = \x00",
        "[[[[",
    ],
)
def test_text_that_is_not_toml_is_refused_with_its_position(text):
    assert refusal(text).startswith("config is not valid TOML (")


def test_deeply_nested_toml_is_refused():
    assert refusal("a = " + "[" * 100_000).startswith("config is not valid TOML (")


def test_read_returns_the_config_of_a_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(HEAD + "# ε\n" + ARM, encoding="utf-8")
    assert read(path) == parse(HEAD + ARM)


def test_the_error_for_a_file_that_is_not_toml_names_the_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("name = ")
    with pytest.raises(ConfigError, match=r"mine\.toml is not valid TOML \("):
        read(path)


@pytest.mark.parametrize("kind", ["missing", "folder", "inside a file", "binary"])
def test_an_unreadable_config_path_is_refused_in_one_line(tmp_path, kind):
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    paths = {
        "missing": tmp_path / "no",
        "folder": tmp_path,
        "inside a file": binary / "x",
        "binary": binary,
    }
    with pytest.raises(ConfigError) as caught:
        read(paths[kind])
    message = str(caught.value)
    assert message.startswith(f"config {paths[kind]} cannot be read (")
    assert message.endswith("; give the path of a TOML file")
    assert "\n" not in message


def test_an_arm_may_have_a_loss_of_its_own(tmp_path):
    text = """
name = "losses"
[data]
name = "helpers.own_data:blobs"
experiences = 2
[model]
hidden = [4]
[training]
epochs = 1
max_grad_norm = 2.0
[training.loss]
name = "focal"
gamma = 3.0
[[arms]]
strategy = "naive"
[[arms]]
name = "smooth"
strategy = "naive"
loss = {name = "cross_entropy", label_smoothing = 0.2}
"""
    config = parse(text)
    stream = open_stream(config)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    made = [ArmRun(config, arm, stream, tmp_path, log).learner(stream) for arm in config.arms]
    assert [each.loss for each in made] == [Focal(gamma=3.0), CrossEntropy(label_smoothing=0.2)]
    assert [each.max_grad_norm for each in made] == [2.0, 2.0]


def test_local_work_replaces_the_length_of_the_training():
    from perdure.experiment.federation_table import FederationConfig, length_of

    assert length_of(None, 3, None) == (3, None)
    assert length_of(FederationConfig(rounds=5), 3, None) == (3, None)
    assert length_of(FederationConfig(rounds=5, local_epochs=2), 3, None) == (10, None)
    assert length_of(FederationConfig(rounds=5, local_steps=4), 3, None) == (None, 20)


@pytest.mark.parametrize("length", ["local_epochs = 2", "local_steps = 5"])
def test_local_lengths_need_no_epochs_in_the_training(length):
    text = HEAD + f"[federation]\n{length}\n[training]\nlearning_rate = 0.1\n" + ARM
    assert parse(text).training.learning_rate == 0.1
    with pytest.raises(ConfigError, match="exactly one of epochs and iterations"):
        parse(text.replace(length, "rounds = 2"))
