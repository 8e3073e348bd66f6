"""A config is checked once: whatever is wrong is one line that names field, value and what is allowed."""

from dataclasses import dataclass, fields
from importlib import resources
from typing import Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perdure.config import (
    OPTIMIZERS,
    Arm,
    AttackConfig,
    Config,
    DataConfig,
    FederationConfig,
    TrainingConfig,
    build,
    parse,
    read,
)
from perdure.errors import ConfigError
from perdure.models import ModelConfig
from perdure.privacy.policy import Privacy
from perdure.strategies import find, names

ARM = '[[arms]]\nstrategy = "naive"\n'
HEAD = 'name = "x"\n'
TABLES = {
    "data": "",
    "model": "",
    "training": "epochs = 1\n",
    "private_training": "epochs = 1\n",
    "federation": "",
    "privacy": "epsilon = 1.0\n",
    "attack": "",
}
CLASSES = {
    "data": DataConfig, "model": ModelConfig, "training": TrainingConfig, "private_training": TrainingConfig,
    "federation": FederationConfig, "privacy": Privacy, "attack": AttackConfig,
}  # fmt: skip


def refusal(text):
    """The one line with which a config is refused."""
    with pytest.raises(ConfigError) as caught:
        parse(text)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def with_field(table, name, value):
    """A config that is right but for one field."""
    if not table:
        head = HEAD if name != "name" else ""
        return f"{head}{name} = {value}\n{ARM}"
    rest = "".join(line + "\n" for line in TABLES[table].splitlines() if not line.startswith(f"{name} "))
    return f"{HEAD}[{table}]\n{rest}{name} = {value}\n{ARM}"


# --------------------------------------------------------------------------- what is right


def test_everything_can_be_left_out_but_name_and_arms():
    config = parse(HEAD + ARM)
    assert config == Config(name="x", arms=(Arm(strategy=find("naive")(), file="naive"),))
    assert config.arms[0].name == "naive-plain"


def test_every_table_is_read():
    text = f"""
    name = "all"
    seed = 7
    threads = 2
    explain = 3
    [data]
    name = "mnist"
    root = "/somewhere"
    scenario = "task"
    experiences = 2
    shuffle_classes = true
    [model]
    name = "cnn"
    hidden = [3, 4]
    head = "cosine"
    [training]
    optimizer = "SGD"
    learning_rate = 1
    momentum = 0.5
    iterations = 9
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
    norm = "l2"
    {ARM}
    [[arms]]
    strategy = "ewc"
    strength = 2
    private = true
    """
    config = parse(text)
    assert (config.name, config.seed, config.threads, config.explain) == ("all", 7, 2, 3)
    assert config.data.root == "/somewhere"
    assert config.data.shuffle_classes is True
    assert (config.model.hidden, config.model.head) == ((3, 4), "cosine")
    assert (config.training.learning_rate, config.training.iterations, config.training.epochs) == (1.0, 9, None)
    assert config.private_training == TrainingConfig(epochs=2)
    assert config.federation == FederationConfig(clients=4, fraction=0.5)
    assert config.privacy == Privacy(epsilon=2.0, seed=5)
    assert config.attack == AttackConfig(name="fgsm", norm="l2")
    assert [arm.name for arm in config.arms] == ["naive-plain", "ewc-private"]
    assert config.arms[1].strategy == find("ewc")(strength=2.0)
    assert isinstance(config.arms[1].strategy.strength, float)


def test_the_demo_is_right():
    config = parse(resources.files("perdure").joinpath("demo.toml").read_text(encoding="utf-8"))
    assert config.name == "demo"
    assert {arm.file for arm in config.arms} == {"naive", "ewc", "lwf", "replay"}
    assert [arm.private for arm in config.arms] == [False] * 4 + [True] * 4


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_that_is_allowed_makes_a_step(name):
    layer = torch.nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    optimizer = TrainingConfig(optimizer=name, learning_rate=0.1, epochs=1).factory()(layer.parameters())
    layer(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)
    assert torch.isfinite(layer.weight).all()


def test_options_reach_the_optimiser():
    config = TrainingConfig(optimizer="SGD", learning_rate=0.25, momentum=0.75, epochs=1)
    group = config.factory()(torch.nn.Linear(1, 1).parameters()).param_groups[0]
    assert (group["lr"], group["momentum"]) == (0.25, 0.75)


# --------------------------------------------------------------------------- what is wrong with a field

COUNTS = ("0", "-1", "true", "1.5", '"2"', "[1]", "1000000001")
POSITIVE = ("0", "0.0", "-0.5", "nan", "inf", "-inf", "true", '"1"')
CHOICES = ('"none of these"', "3", "true", '""', "[]")
TEXT = ("3", "true", "[]", "{}", "1979-05-27")
SWITCH = ("1", '"true"', "0.0")
WRONG = {
    ("", "name"): (*TEXT, '""', '"a/b"', '".."', '"."', '"a b"', '"a\\nb"', f'"{"a" * 101}"'),
    ("", "seed"): ("-1", "4294967296", "1.0", "true", "nan"),
    ("", "threads"): (*COUNTS, "1025"),
    ("", "explain"): ("-1", "0.5", "false"),
    ("", "data"): ('"digits"', "3", "[]"),
    ("", "training"): ("true", "[]"),
    ("", "federation"): ("true", '"yes"'),
    ("data", "name"): CHOICES,
    ("data", "root"): ("3", "true", "[]"),
    ("data", "scenario"): CHOICES,
    ("data", "experiences"): COUNTS,
    ("data", "shuffle_classes"): SWITCH,
    ("model", "name"): CHOICES,
    ("model", "hidden"): ("64", "[0]", "[-4]", "[1.5]", "[true]", '["a"]', "[[4]]", "[nan]"),
    ("model", "activation"): CHOICES,
    ("model", "norm"): CHOICES,
    ("model", "head"): CHOICES,
    ("model", "width"): ("0", "-2", "true", "2.0", "3"),
    ("model", "latent"): ("0", "-1", "true", "1.5", '"2"', "[1]"),
    ("training", "optimizer"): (*CHOICES, '"Optimizer"', '"LBFGS"', '"SparseAdam"', '"Muon"', '"lr_scheduler"'),
    ("training", "learning_rate"): (*POSITIVE, "1e7"),
    ("training", "momentum"): ("-0.1", "1.0", "nan", "inf", "true", "0.5"),
    ("training", "epochs"): COUNTS,
    ("training", "iterations"): COUNTS,
    ("training", "batch_size"): COUNTS,
    ("training", "reset_optimizer"): SWITCH,
    ("training", "precision"): CHOICES,
    ("private_training", "learning_rate"): POSITIVE,
    ("private_training", "optimizer"): CHOICES,
    ("federation", "clients"): COUNTS,
    ("federation", "rounds"): COUNTS,
    ("federation", "fraction"): (*POSITIVE, "1.01"),
    ("federation", "alpha"): (*POSITIVE, "1e10"),
    ("federation", "min_size"): COUNTS,
    ("federation", "engine"): CHOICES,
    ("privacy", "epsilon"): (*POSITIVE, "1e-7", "1e5"),
    ("privacy", "delta"): (*POSITIVE, "1.0"),
    ("privacy", "clip_norm"): (*POSITIVE, "1e-300", "1e300"),
    ("privacy", "sampling_rate"): (*POSITIVE, "1.5", "1e-300"),
    ("privacy", "release_noise"): (*POSITIVE, "1e-4", "1e7"),
    ("privacy", "seed"): ("1.5", "true", '"0"'),
    ("privacy", "unit"): CHOICES,
    ("privacy", "relation"): CHOICES,
    ("privacy", "clipping"): (*CHOICES, "{quantile = 2.0}", "{count_noise = 0.0}"),
    ("privacy", "diagnostics"): CHOICES,
    ("privacy", "bands"): COUNTS,
    ("privacy", "horizon"): COUNTS,
    ("privacy", "spent"): ("1", "[{sampling_rate = 2.0, noise_multiplier = 1.0, steps = 1}]"),
    ("attack", "name"): CHOICES,
    ("attack", "epsilon"): ("-0.1", "nan", "inf", "true"),
    ("attack", "norm"): CHOICES,
    ("attack", "steps"): COUNTS,
}


@pytest.mark.parametrize(("table", "name"), WRONG)
def test_a_wrong_value_is_refused_by_name(table, name):
    for value in WRONG[table, name]:
        message = refusal(with_field(table, name, value))
        assert message.startswith(f"{table}.{name}" if table else name), message
        assert "; allowed: " in message


def test_no_field_was_forgotten():
    """A new field must come with values that it refuses."""
    tables = CLASSES | {"": Config}
    known = {(table, field.name) for table, cls in tables.items() for field in fields(cls)}
    repeated = {("private_training", field.name) for field in fields(TrainingConfig)}
    other = {("", name) for name in ("model", "private_training", "privacy", "attack", "arms")}
    assert known - repeated - other - WRONG.keys() == {("privacy", "noise_multiplier")}


def test_the_whole_sentence():
    assert refusal(with_field("model", "hidden", "[0]")) == (
        "model.hidden = (0,) is not allowed; allowed: positive whole numbers"
    )
    assert refusal(with_field("data", "scenario", '"online"')) == (
        "data.scenario = 'online' is not allowed; allowed: task, domain, class"
    )
    assert refusal(with_field("", "federation", "true")) == (
        "federation = True is not allowed; allowed: a table with clients, rounds, fraction, alpha, min_size, engine"
    )


@pytest.mark.parametrize("table", ["", *CLASSES])
def test_an_unknown_field_is_refused_with_those_there_are(table):
    message = refusal(with_field(table, "colour", '"red"'))
    assert message.startswith(f"{table}.colour = 'red'" if table else "colour = 'red'")
    first = fields(CLASSES[table] if table else Config)[0].name
    assert f"one of the fields {first}" in message


def test_a_field_with_a_line_break_in_its_name_is_refused_on_one_line():
    assert "'a\\nb' = 1" in refusal(f'{HEAD}"a\\nb" = 1\n{ARM}')


def test_an_unknown_table_is_refused():
    assert refusal(f"{HEAD}{ARM}[trainning]\nepochs = 3\n").startswith("trainning = {'epochs': 3}")


def test_whole_numbers_beyond_64_bits_are_refused_at_any_length():
    for value in (str(2**63), str(-(2**63) - 1), "0x" + "f" * 6000):
        message = refusal(with_field("model", "hidden", f"[1, {value}]"))
        assert message.startswith("model.hidden[1] is a whole number of ")
        assert len(message) < 100
    refusal(with_field("training", "learning_rate", "1" + "0" * 5000))
    refusal(with_field("training", "learning_rate", "1" + "0" * 400))


def test_momentum_is_for_optimisers_that_have_one():
    message = refusal(f'{HEAD}[training]\nepochs = 1\nmomentum = 0.5\noptimizer = "AdamW"\n{ARM}')
    assert message.startswith("training.momentum = 0.5")
    assert "RMSprop, SGD take one" in message


@pytest.mark.parametrize("lengths", ["", "epochs = 1\niterations = 1\n"])
@pytest.mark.parametrize("table", ["training", "private_training"])
def test_an_experience_has_one_length(table, lengths):
    message = refusal(f"{HEAD}[{table}]\n{lengths}{ARM}")
    assert message.startswith(f"{table}.epochs = ")
    assert message.endswith("exactly one of the two")


@pytest.mark.parametrize("budget", ["", "epsilon = [1.0, 2.0]\nnoise_multiplier = 1.0\n", "noise_multiplier = -1.0\n"])
def test_privacy_is_given_by_epsilon_or_by_noise_or_both(budget):
    assert refusal(f"{HEAD}[privacy]\n{budget}{ARM}").startswith("privacy")


# --------------------------------------------------------------------------- what is missing, and arms


def test_what_is_missing_is_named():
    assert refusal(ARM) == "name is missing; allowed: text"
    assert refusal(HEAD).startswith("arms is missing; allowed: one or more [[arms]] tables")
    assert refusal(HEAD + '[[arms]]\nstrategy = "ewc"\n') == "arms[0].strength is missing; allowed: a finite number"


@pytest.mark.parametrize("arms", ["arms = 3", 'arms = "naive"', "[arms]\nstrategy = 3", 'arms = {strategy = "naive"}'])
def test_arms_are_a_list_of_tables(arms):
    assert refusal(f"{HEAD}{arms}\n").startswith("arms = ")


@pytest.mark.parametrize(
    ("arm", "start"),
    [
        ("[[arms]]\n", "arms[0] = {}"),
        ("[[arms]]\nstrategy = 3\n", "arms[0] = {'strategy': 3}"),
        ('arms = ["naive"]\n', "arms[0] = 'naive'"),
        ('[[arms]]\nstrategy = "ewcc"\n', "arms[0].strategy = 'ewcc'"),
        ('[[arms]]\nstrategy = "../ewc"\n', "arms[0].strategy = '../ewc'"),
        ('[[arms]]\nstrategy = "naive"\nprivate = 1\n', "arms[0].private = 1"),
        ('[[arms]]\nstrategy = "naive"\nstrength = 1.0\n', "arms[0].strength = 1.0"),
        (f'{ARM}[[arms]]\nstrategy = "ewc"\nstrength = true\n', "arms[1].strength = True"),
        ('[[arms]]\nstrategy = "ewc"\nstrength = -1.0\n', "arms[0]: ewc.strength = -1.0"),
        ('[[arms]]\nstrategy = "ewc"\nstrength = inf\n', "arms[0].strength = inf"),
        ('[[arms]]\nstrategy = "replay"\nmemory_size = 0\n', "arms[0]: memory capacity = 0"),
        ('[[arms]]\nstrategy = "replay"\nmemory_size = 5\nselection = "best"\n', "arms[0].selection = 'best'"),
        ('[[arms]]\nstrategy = "naive"\nprivate = true\n', "an arm says private = true without a [privacy] table"),
        (ARM + ARM, "arms = ['naive-plain']"),
    ],
)
def test_a_wrong_arm_is_refused(arm, start):
    assert refusal(HEAD + arm).startswith(start)


def test_an_unknown_strategy_is_refused_with_those_there_are():
    message = refusal(f'{HEAD}[[arms]]\nstrategy = "gem of the sea"\n')
    assert all(name in message for name in names())


# --------------------------------------------------------------------------- types of a strategy's own fields


@dataclass(frozen=True, kw_only=True)
class Own:
    """What somebody's own strategy may ask for."""

    how: Literal["fast", "slow"] | None = None
    sizes: tuple[float, ...] = ()
    limit: int | None = None
    strange: bytes = b""


def test_choices_that_may_be_left_out_and_lists_are_read():
    assert build(Own, {"how": "slow", "sizes": [1, 2.5], "limit": 3}, "x") == Own(how="slow", sizes=(1.0, 2.5), limit=3)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"how": "soon"}, "x.how = 'soon' is not allowed; allowed: fast, slow"),
        ({"sizes": [1, "2"]}, "x.sizes[1] = '2' is not allowed; allowed: a finite number"),
        ({"sizes": 1}, "x.sizes = 1 is not allowed; allowed: a list of which each is a finite number"),
        ({"limit": False}, "x.limit = False is not allowed; allowed: a whole number"),
        ({"strange": "b"}, "x.strange = 'b' is not allowed; allowed: nothing that TOML can say"),
    ],
)
def test_its_fields_are_checked_like_all_others(table, message):
    with pytest.raises(ConfigError) as caught:
        build(Own, table, "x")
    assert str(caught.value) == message


# --------------------------------------------------------------------------- text and files


@pytest.mark.parametrize(
    "text",
    ["name = ", "name", '= "x"', "[data", "name = 'x'\nname = 'y'", "a = 1\n[a]\n", "seed = 01", "x = \x00", "[[[["],
)
def test_what_is_not_toml_is_refused_with_its_place(text):
    assert refusal(text).startswith("config is not TOML: ")


def test_nesting_without_end_is_refused():
    assert refusal("a = " + "[" * 100_000).startswith("config is not TOML: ")


def test_a_file_is_read(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(HEAD + "# ε\n" + ARM, encoding="utf-8")
    assert read(path) == parse(HEAD + ARM)


def test_a_file_that_is_not_toml_is_named(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("name = ")
    with pytest.raises(ConfigError, match=r"mine\.toml is not TOML: "):
        read(path)


@pytest.mark.parametrize("kind", ["missing", "folder", "inside a file", "binary"])
def test_a_path_that_cannot_be_read_is_refused_on_one_line(tmp_path, kind):
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    paths = {"missing": tmp_path / "no", "folder": tmp_path, "inside a file": binary / "x", "binary": binary}
    with pytest.raises(ConfigError) as caught:
        read(paths[kind])
    message = str(caught.value)
    assert message.startswith(f"config {paths[kind]} cannot be read (")
    assert message.endswith("; give the path of a TOML file")
    assert "\n" not in message


# --------------------------------------------------------------------------- anything at all

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(min_value=10**30), st.floats(), st.text(max_size=5),
    st.dates(), st.sampled_from(["digits", "class", "mlp", "Adam", "pgd", "naive", "ewc", "linf"]),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
KEYS = {cls: st.sampled_from([field.name for field in fields(cls)]) for cls in {Config, *CLASSES.values()}}


@pytest.mark.property
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(KEYS, key=str)), st.data())
def test_no_value_of_any_field_raises_anything_but_a_config_error(cls, data):
    table = data.draw(st.dictionaries(KEYS[cls] | st.text(max_size=5), VALUES, max_size=5))
    try:
        made = build(cls, table, "here")
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(made, cls)


@pytest.mark.property
@settings(max_examples=150, deadline=None)
@given(
    st.text(max_size=60)
    | st.tuples(st.sampled_from(sorted(WRONG)), st.text(max_size=20)).map(lambda pair: with_field(*pair[0], pair[1]))
)
def test_no_text_raises_anything_but_a_config_error(text):
    try:
        config = parse(text)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert config.arms
