"""Config fields: each refuses invalid values by name, in one line, and always with a
ConfigError.
"""

from dataclasses import fields

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.config_errors import ARM, HEAD, refusal
from perdure.adversarial import PGD
from perdure.errors import ConfigError
from perdure.experiment.config import Config, parse
from perdure.experiment.data_config import DataConfig
from perdure.experiment.federation_table import FederationConfig
from perdure.experiment.from_tables import build
from perdure.experiment.search_config import SearchConfig
from perdure.experiment.training_config import TrainingConfig
from perdure.explain import KernelSHAP
from perdure.models.config import ModelConfig
from perdure.privacy.settings import Privacy

TABLES = {
    "data": "",
    "model": "",
    "training": "epochs = 1\n",
    "private_training": "epochs = 1\n",
    "federation": "",
    "privacy": "epsilon = 1.0\n",
    "attack": 'name = "pgd"\nepsilon = 0.1\n',
    "explain": 'method = "kernel_shap"\n',
    "search": 'space = {"training.learning_rate" = [0.1, 1.0]}\n',
}
CLASSES = {
    "data": DataConfig,
    "model": ModelConfig,
    "training": TrainingConfig,
    "private_training": TrainingConfig,
    "federation": FederationConfig,
    "privacy": Privacy,
    "attack": PGD,
    "explain": KernelSHAP,
    "search": SearchConfig,
}


def with_field(table, name, value):
    """Return a config that is valid except for one field."""
    if not table:
        head = HEAD if name != "name" else ""
        return f"{head}{name} = {value}\n{ARM}"
    rest = "".join(
        line + "\n" for line in TABLES[table].splitlines() if not line.startswith(f"{name} ")
    )
    return f"{HEAD}[{table}]\n{rest}{name} = {value}\n{ARM}"


# ----------------------------------------------------------------------- what is wrong with a field

COUNTS = ("0", "-1", "true", "1.5", '"2"', "[1]", "1000000001")
POSITIVE = ("0", "0.0", "-0.5", "nan", "inf", "-inf", "true", '"1"')
CHOICES = ('"none of these"', "3", "true", '""', "[]")
TEXT = ("3", "true", "[]", "{}", "1979-05-27")
SWITCH = ("1", '"true"', "0.0")
SEED = ("-1", "4294967296", "1.5", "true", '"0"')
OF_OTHER_STREAMS = {
    "first_identity": ("true", "1"),
    "angles": ("[0.0]", "45.0"),
    "blurry_share": ("0.5", '"half"'),
    "disjoint_share": ("0.5", "true"),
    "first_probability": ("0.5", "[0.5]"),
    "repeat_probability": ("0.5", "[]"),
    "attribute": ('"time"', "3"),
    "boundaries": ("[1.0]", "1.0"),
    "order": ("[0, 1]", "[0.5]"),
}
"""Values of keys that the stream `split`, the default, does not have."""
WRONG = {
    ("", "name"): (*TEXT, '""', '"a/b"', '".."', '"."', '"a b"', '"a\\nb"', f'"{"a" * 101}"'),
    ("", "seed"): ("-1", "4294967296", "1.0", "true", "nan"),
    ("", "seeds"): ("0", "[-1]", "[4294967296]", "[1.0]", "[true]", "[1, 1]", '"0,1"'),
    ("", "threads"): (*COUNTS, "1025"),
    ("", "processes"): COUNTS,
    ("", "device"): ('"gpu"', '"meta"', '""', "0", "true", "[]"),
    ("", "explain"): ("6", "true", "[]"),
    ("", "data"): ('"digits"', "3", "[]"),
    ("", "training"): ("true", "[]"),
    ("", "federation"): ("true", '"yes"'),
    ("", "certificate"): (
        "true",
        "{}",
        '{method = "bounds", epsilon = 0.1}',
        '{method = "smoothing", epsilon = 0.0}',
        '{method = "smoothing", epsilon = 0.1, deviation = 0.0}',
        '{method = "interval_bounds", epsilon = 0.1, bounds = [1.0, 0.0]}',
        '{method = "smoothing", epsilon = 0.1, records = 0}',
    ),
    ("", "fairness"): ("true", "{}", "{attribute = 3}", '{attribute = "a", positive = -1}'),
    ("", "start"): ("true", "{}", "{run = 3}", '{run = "a", public = 1}'),
    ("", "loggers"): ("true", '"tensorboard"', "{}", "[1]", "[{}]", '[{name = "paper"}]'),
    ("data", "name"): CHOICES,
    ("data", "root"): ("3", "true", "[]"),
    ("data", "options"): ("3", "true", "[]", "{length = 3}", '{test_share = "x"}'),
    ("data", "split_seed"): SEED,
    ("data", "stream"): CHOICES,
    ("data", "seed"): SEED,
    ("data", "scenario"): CHOICES,
    ("data", "experiences"): COUNTS,
    ("data", "shuffle_classes"): SWITCH,
    ("data", "declared_size"): COUNTS,
    ("data", "declared_sizes"): ("5", "[]", "[0, 2]", "[true]", "[1.5]"),
    ("data", "class_order"): ("5", "[1.5]", "[true]", '"0"'),
    ("data", "exact"): SWITCH,
    ("data", "resample"): CHOICES,
    ("data", "fit_on"): CHOICES,
    ("data", "impute"): ('"mean"', *CHOICES),  # "mean" needs scale = true
    ("data", "scale"): SWITCH,
    ("data", "columns"): COUNTS,
    ("data", "components"): COUNTS,
    **{("data", name): values for name, values in OF_OTHER_STREAMS.items()},
    ("model", "name"): CHOICES,
    ("model", "hidden"): ("64", "[0]", "[-4]", "[1.5]", "[true]", '["a"]', "[[4]]", "[nan]"),
    ("model", "activation"): CHOICES,
    ("model", "norm"): CHOICES,
    ("model", "head"): CHOICES,
    ("model", "width"): ("0", "-2", "true", "2.0", "3"),
    ("model", "init"): CHOICES,
    ("model", "skip"): SWITCH,
    ("model", "depth"): ("0", "-2", "true", "2.0", "101"),
    ("model", "dropout"): ("-0.1", "1.0", "nan", "true", "''"),
    ("model", "latent"): ("0", "-1", "true", "1.5", '"2"', "[1]"),
    ("training", "fine_tune"): (*CHOICES, "[3]"),
    ("training", "group_weights"): (
        "true",
        "{}",
        '{attribute = "a", counts = [0]}',
        '{attribute = "a", counts = "all"}',
        '{attribute = "a", class_counts = [[1, 2], [1]]}',
    ),
    ("training", "optimizer"): (
        *CHOICES,
        '"Optimizer"',
        '"LBFGS"',
        '"SparseAdam"',
        '"Muon"',
        '"lr_scheduler"',
    ),
    ("training", "learning_rate"): (*POSITIVE, "1e7"),
    ("training", "momentum"): ("-0.1", "1.0", "nan", "inf", "true", "0.5"),
    ("training", "optimizer_options"): (
        "3",
        "[]",
        "{lr = 1.0}",
        "{nesterov = true}",
        '{weight_decay = "x"}',
        "{weight_decay = -1.0}",
    ),
    ("training", "schedule"): (
        "3",
        '"StepLR"',
        "{}",
        '{name = "LambdaLR"}',
        '{name = "StepLR"}',
        '{name = "StepLR", step_size = 1.5}',
        '{name = "StepLR", step_size = 5, total_steps = 9}',
        '{name = "CosineAnnealingLR", T_max = "all"}',
        '{name = "OneCycleLR", max_lr = 0.1, pct_start = 7.0}',
        '{name = "no_such_module:f"}',
    ),
    ("training", "views"): (
        "3",
        "{}",
        '{change = "shift_and_flip"}',
        "{count = 2}",
        '{count = 0, change = "shift_and_flip", pixels = 1}',
        '{count = 2, change = "turn"}',
        '{count = 2, change = "shift_and_flip"}',
        '{count = 2, change = "shift_and_flip", pixels = 1.5}',
        '{count = 2, change = "RandomAffine"}',
        '{count = 2, change = "RandomAffine", degrees = 20, angle = 3}',
        '{count = 2, change = "RandomAffine", degrees = -20}',
        '{count = 2, change = "MixUp"}',
        "{count = 2, change = []}",
        '{count = 2, change = [{name = "Compose"}]}',
        '{count = 2, change = [{name = "RandomAffine", degrees = 20}], pixels = 1}',
    ),
    ("training", "mixing"): (
        "3",
        "{}",
        '{name = "cutout"}',
        '{name = "mixup", alpha = 0.0}',
        '{name = "cutmix", beta = 1.0}',
    ),
    ("training", "blocks"): COUNTS,
    ("training", "micro_batch_size"): COUNTS,
    ("training", "evaluate_every"): COUNTS,
    ("training", "epochs"): COUNTS,
    ("training", "iterations"): COUNTS,
    ("training", "batch_size"): COUNTS,
    ("training", "reset_optimizer"): SWITCH,
    ("training", "precision"): CHOICES,
    ("training", "compile"): SWITCH,
    ("private_training", "learning_rate"): POSITIVE,
    ("private_training", "optimizer"): CHOICES,
    ("federation", "clients"): COUNTS,
    ("federation", "rounds"): COUNTS,
    ("federation", "fraction"): (*POSITIVE, "1.01"),
    ("federation", "local_epochs"): COUNTS,
    ("federation", "local_steps"): COUNTS,
    ("federation", "quorum"): (*POSITIVE, "1.01"),
    ("federation", "deadline"): POSITIVE,
    ("federation", "grace"): ("-0.5", "nan", "inf", "true", '"1"'),
    ("federation", "max_update_norm"): POSITIVE,
    ("federation", "alive"): COUNTS,
    ("federation", "readmit"): ("1", '"yes"', "0.5"),
    ("federation", "aggregator"): (*CHOICES, '"FedProx"', '"DifferentialPrivacy"'),
    ("federation", "aggregator_options"): ("3", "[]", "{beta = 0.5}", "{fraction_train = 0.5}"),
    ("federation", "pre_aggregators"): (
        '[{name = "nearest_neighbours", hostile = 5}]',
        '[{name = "buckets", size = 5}, {name = "nearest_neighbours", hostile = 1}]',
        "3",
        '["buckets"]',
        '[{name = "bucket"}]',
        '[{name = "buckets", size = 1}]',
        '[{name = "nearest_neighbours"}]',
        "[{size = 2}]",
    ),
    ("federation", "split"): CHOICES,
    ("federation", "attribute"): ("3", '"sex"'),  # "sex" needs split = "by_attribute"
    ("federation", "values"): ("3", '["a"]', "[1.5]", "[0, 1]"),
    ("federation", "client_sizes"): ("3", "[3]", '[["3"]]', "[[1.5]]"),
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
    ("privacy", "custom_forward"): CHOICES,
    ("privacy", "bands"): COUNTS,
    ("privacy", "horizon"): COUNTS,
    ("privacy", "spent"): ("1", "[{sampling_rate = 2.0, noise_multiplier = 1.0, steps = 1}]"),
    ("attack", "name"): CHOICES,
    ("attack", "epsilon"): ("-0.1", "nan", "inf", "true"),
    ("attack", "norm"): CHOICES,
    ("attack", "bounds"): ("1", "[0]", "[0, 1, 2]", "[1, 0]", "[nan, 1]", '"inputs"'),
    ("attack", "steps"): ("0", "-1", "true", "1.5", '"2"', "[1]"),
    ("attack", "step_size"): POSITIVE,
    ("attack", "restarts"): ("0", "-1", "true", "1.5", '"2"', "[1]"),
    ("attack", "samples"): ("0", "-1", "true", "1.5", '"2"', "[1]"),
    ("attack", "random_start"): SWITCH,
    ("explain", "method"): CHOICES,
    ("explain", "records"): COUNTS,
    ("explain", "drift"): SWITCH,
    ("explain", "baseline"): ("true", '"0"', "[0]", "nan", "inf"),
    ("explain", "kept"): ("1", "[-1]", "[1.5]", '"1"', "[true]"),
    ("explain", "samples"): ("1", "-1", "true", "1.5", '"2"', "[1]"),
    ("explain", "sampling"): CHOICES,
    ("explain", "link"): CHOICES,
    ("explain", "cells"): ("0", "-1", "true", "1.5", '"2"', "[1]"),
    ("data", "chunk"): COUNTS,
    ("data", "increments"): ("5", "[]", "[0, 2]", "[true]", "[1.5]", '"2"'),
    ("explain", "chunk"): ("0", "-1", "true", "1.5", '"2"', "[1]"),
    ("training", "warmup"): ("0", "-1", "0.0", "1.5", "true", '"2"', "[1]"),
    ("training", "averaging"): (
        "3",
        '"ema"',
        "{}",
        '{name = "mean"}',
        '{name = "ema", decay = 1.0}',
        '{name = "swa", decay = 0.9}',
    ),
    ("training", "sharpness"): ("0.05", "{rho = 0.0}", '{rho = "x"}', "{radius = 0.1}"),
    ("training", "l1"): ("-0.1", "nan", "inf", "true", '"1"', "1e7"),
    ("training", "l2"): ("-0.1", "nan", "inf", "true", '"1"'),
    ("training", "gradient_noise"): ("-0.1", "nan", "true", '"1"'),
    ("training", "weight_noise"): ("-0.1", "inf", "true", "[0.1]"),
    ("training", "validation"): (
        "0.1",
        "{share = 0.0}",
        "{share = 1}",
        "{every = 1.5}",
        "{patience = 0}",
        "{keep_best = 1}",
        "{records = []}",
        '{attack = "pgd"}',
        '{attack = {name = "pgd", epsilon = -1.0}}',
    ),
    ("training", "loss"): ('"focal"', "{}", '{name = "dice"}', '{name = "focal", gamma = -1}'),
    ("training", "max_grad_norm"): POSITIVE,
    ("training", "defence"): (
        '"trades"',
        "{}",
        '{name = "pgd"}',
        '{name = "trades", beta = 0.0}',
        '{name = "interval_bounds", epsilon = -1.0}',
    ),
    ("training", "adversary"): ("true", '"pgd"', "{}", '{name = "pgd"}', '{name = "lime"}'),
    ("", "search"): ("true", "{}", "[]"),
    ("search", "space"): ("3", "{}", "[0.1, 1.0]", '{"data.name" = {choices = ["adult"]}}'),
    ("search", "sampler"): CHOICES,
    ("search", "goals"): ("3", "[]", '["loss"]', '["accuracy", "accuracy"]', '"accuracy"'),
    ("search", "trials"): COUNTS,
    ("search", "experiences"): COUNTS,
    ("search", "held_out"): (*POSITIVE, "1.0"),
    ("search", "arm"): TEXT,
    ("search", "seed"): SEED,
    ("search", "privacy"): CHOICES,
    ("search", "repeats"): CHOICES,
    ("private_training", "adversary"): ('{name = "pgd", epsilon = -1}',),
}


@pytest.mark.parametrize(("table", "name"), WRONG)
def test_an_invalid_config_value_is_refused_by_field_name(table, name):
    for value in WRONG[table, name]:
        message = refusal(with_field(table, name, value))
        assert message.startswith(f"{table}.{name}" if table else name), message
        assert "; allowed: " in message


def test_every_config_field_has_a_test():
    """A new field needs values that it refuses."""
    tables = CLASSES | {"": Config}
    known = {(table, field.name) for table, cls in tables.items() for field in fields(cls)}
    repeated = {("private_training", field.name) for field in fields(TrainingConfig)}
    other = {("", name) for name in ("model", "private_training", "privacy", "attack", "arms")}
    chosen = {("attack", "name"), ("explain", "method"), ("explain", "records")}
    assert chosen <= WRONG.keys()
    assert known - repeated - other - WRONG.keys() == {("privacy", "noise_multiplier")}


def test_the_error_names_field_given_value_and_allowed_values():
    assert refusal(with_field("model", "hidden", "[0]")) == (
        "model.hidden = (0,) is not allowed; allowed: positive whole numbers"
    )
    assert refusal(with_field("data", "scenario", '"online"')) == (
        "data.scenario = 'online' is not allowed; allowed: task, domain, class"
    )
    assert refusal(with_field("", "federation", "true")) == (
        "federation = True is not allowed; allowed: a table with clients, rounds, local_epochs, "
        "local_steps, fraction, aggregator, aggregator_options, pre_aggregators, split, alpha, "
        "attribute, values, min_size, client_sizes, engine, quorum, deadline, grace, "
        "max_update_norm, alive, readmit"
    )


@pytest.mark.parametrize("table", ["", *CLASSES])
def test_an_unknown_config_field_is_refused_with_the_known_names(table):
    message = refusal(with_field(table, "colour", '"red"'))
    assert message.startswith(f"{table}.colour = 'red'" if table else "colour = 'red'")
    first = fields(CLASSES[table] if table else Config)[0].name
    assert f"one of the fields {first}" in message


@pytest.mark.parametrize(
    ("table", "key", "meant"),
    [("", "trainig", "training"), ("training", "epoch", "epochs"), ("data", "experience", None)],
)
def test_an_unknown_field_proposes_the_nearest_one(table, key, meant):
    message = refusal(with_field(table, key, "3"))
    assert message.endswith(f"; did you mean {meant or 'experiences'!r}?")


def test_a_line_break_in_a_field_name_gives_a_one_line_error():
    assert "'a\\nb' = 1" in refusal(f'{HEAD}"a\\nb" = 1\n{ARM}')


def test_an_unknown_config_table_is_refused():
    assert refusal(f"{HEAD}{ARM}[trainning]\nepochs = 3\n").startswith("trainning = {'epochs': 3}")


def test_whole_numbers_beyond_64_bits_are_refused():
    for value in (str(2**63), str(-(2**63) - 1), "0x" + "f" * 6000):
        message = refusal(with_field("model", "hidden", f"[1, {value}]"))
        assert message.startswith("model.hidden[1] is a whole number of ")
        assert len(message) < 100
    refusal(with_field("training", "learning_rate", "1" + "0" * 5000))
    refusal(with_field("training", "learning_rate", "1" + "0" * 400))


def test_momentum_is_refused_for_optimizers_without_momentum():
    message = refusal(f'{HEAD}[training]\nepochs = 1\nmomentum = 0.5\noptimizer = "AdamW"\n{ARM}')
    assert message.startswith("training.momentum = 0.5")
    assert "only RMSprop, SGD have momentum" in message


@pytest.mark.parametrize("lengths", ["", "epochs = 1\niterations = 1\n"])
@pytest.mark.parametrize("table", ["training", "private_training"])
def test_epochs_together_with_iterations_are_refused(table, lengths):
    message = refusal(f"{HEAD}[{table}]\n{lengths}{ARM}")
    assert message.startswith(f"{table}.epochs = ")
    assert message.endswith("exactly one of epochs and iterations")


@pytest.mark.parametrize(
    "budget", ["", "epsilon = [1.0, 2.0]\nnoise_multiplier = 1.0\n", "noise_multiplier = -1.0\n"]
)
def test_privacy_needs_a_valid_epsilon_or_noise_multiplier(budget):
    assert refusal(f"{HEAD}[privacy]\n{budget}{ARM}").startswith("privacy")


# --------------------------------------------------------------------------- anything at all

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=10**30),
    st.floats(),
    st.text(max_size=5),
    st.dates(),
    st.sampled_from(["digits", "class", "mlp", "Adam", "pgd", "naive", "ewc", "linf"]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
)
KEYS = {
    cls: st.sampled_from([field.name for field in fields(cls)])
    for cls in {Config, *CLASSES.values()}
}


@pytest.mark.property
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(KEYS, key=str)), st.data())
def test_invalid_config_values_raise_only_config_errors(cls, data):
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
    | st.tuples(st.sampled_from(sorted(WRONG)), st.text(max_size=20)).map(
        lambda pair: with_field(*pair[0], pair[1])
    )
)
def test_invalid_config_text_raises_only_config_errors(text):
    try:
        config = parse(text)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert config.arms
