"""The reference of a config: every field of Python, as the dataclasses have it."""

import inspect
from dataclasses import MISSING, fields

import pytest
import torch
from torch.optim import lr_scheduler

from perdure import adversarial, explain, loggers, models, strategies
from perdure.data.augmentation import Views
from perdure.errors import ConfigError
from perdure.experiment import reference
from perdure.experiment.config import Arm, Config
from perdure.experiment.data_config import DataConfig
from perdure.experiment.federation_table import FederationConfig
from perdure.experiment.model_config import BUILDERS, GIVEN
from perdure.experiment.overrides import toml_value
from perdure.experiment.search_config import SearchConfig
from perdure.experiment.training_config import (
    OPTIMIZERS,
    SCHEDULES,
    ScheduleConfig,
    TrainingConfig,
)
from perdure.experiment.validation_config import ValidationConfig
from perdure.experiment.views_config import ViewsConfig
from perdure.federated import Federation
from perdure.learner import EMA, SAM, SWA, Learner
from perdure.models import ModelConfig
from perdure.privacy import Privacy

ATTACKED = "[attack], [training.adversary], [training.validation.attack]"
CLASSES = {
    "outside of tables": Config,
    "[data]": DataConfig,
    "[model]": ModelConfig,
    "[training]": TrainingConfig,
    '[training.averaging] name = "ema"': EMA,
    '[training.averaging] name = "swa"': SWA,
    "[training.sharpness]": SAM,
    "[training.validation]": ValidationConfig,
    "[federation]": FederationConfig,
    "[privacy]": Privacy,
    "[search]": SearchConfig,
    **{f'[[arms]] strategy = "{name}"': strategies.find(name) for name in strategies.names()},
    **{f'[[loggers]] name = "{name}"': loggers.find(name) for name in loggers.names()},
    **{f'[explain] method = "{name}"': explain.find(name) for name in explain.names()},
    **{f'{ATTACKED} name = "{name}"': adversarial.find(name) for name in adversarial.names()},
}


@pytest.fixture(scope="module")
def tables():
    return {table.title: table.keys for table in reference.tables()}


def test_the_config_reference_has_every_field_of_each_table(tables):
    for title, kind in CLASSES.items():
        own = [each.name for each in fields(kind) if each.init]
        assert [key.name for key in tables[title]] == own, title


def test_the_config_reference_has_the_default_of_each_field(tables):
    for title, kind in CLASSES.items():
        known = {each.name: each for each in fields(kind)}
        for key in tables[title]:
            default = known[key.name].default
            if default is MISSING:
                continue
            written = "left out" if default is None else toml_value(_listed(default))
            assert key.default in (written, "as below"), (title, key.name)


def _listed(value):
    return list(value) if isinstance(value, tuple) else value


def test_the_config_reference_says_type_and_meaning_of_each_key(tables):
    for title, keys in tables.items():
        for key in keys:
            assert key.type and "no value" not in key.type, (title, key.name)
            told = "name = " not in title and "optimizer" not in title
            assert key.meaning or not told, (title, key.name)


def test_the_config_reference_has_the_limits_of_each_number(tables):
    allowed = {key.name: key.allowed for key in tables["[training]"]}
    assert allowed["batch_size"] == "1 to 1000000000"
    assert allowed["momentum"] == "a number from 0 to below 1"
    assert "SGD" in allowed["optimizer"]


def test_the_config_reference_has_the_options_of_each_model(tables):
    for name in BUILDERS:
        own = set(inspect.signature(getattr(models, name)).parameters) - set(GIVEN)
        assert {key.name for key in tables[f'[model] name = "{name}"']} == own
    for name in OPTIMIZERS:
        keys = tables[f'[training] optimizer = "{name}": optimizer_options']
        assert {key.name for key in keys} < set(
            inspect.signature(vars(torch.optim)[name]).parameters
        )
    for name in SCHEDULES:
        keys = tables[f'[training.schedule] name = "{name}"']
        assert {key.name for key in keys} < set(
            inspect.signature(getattr(lr_scheduler, name)).parameters
        )


def test_the_config_reference_names_the_streams_that_have_a_key(tables):
    allowed = {key.name: key.allowed for key in tables["[data]"]}
    assert allowed["blurry_share"] == 'with stream = "blurry"'
    assert allowed["attribute"] == 'with stream = "by_time" or "by_domain"'
    assert not any("only the keys" in text for text in allowed.values())


def test_a_config_can_set_every_setting_of_a_learner():
    """Those that no config gives belong to the caller: files, callbacks, parties, audits."""
    caller = {"callbacks", "client", "owner", "folder", "warm_start", "make_private_sum"}
    caller |= {"show_progress"}
    results = {"matrix", "progress"}
    keys = {each.name for kind in (Config, TrainingConfig, Arm) for each in fields(kind)}
    renamed = {"scheduler": "schedule"}
    own = {each.name for each in fields(Learner) if each.init} - caller - results
    assert {renamed.get(name, name) for name in own} <= keys
    assert {each.name for each in fields(Views)} <= {"count", *ViewsConfig.__dataclass_fields__}
    federation = {each.name for each in fields(Federation)} - {"seed", "mode"}
    assert federation <= {each.name for each in fields(FederationConfig)}


def test_every_schedule_in_the_config_reference_can_be_made():
    needed = {
        "StepLR": {"step_size": 0.5},
        "MultiStepLR": {"milestones": [0.5, 0.75]},
        "ExponentialLR": {"gamma": 0.9},
        "CosineAnnealingWarmRestarts": {"T_0": 0.5},
        "OneCycleLR": {"max_lr": 0.5},
        "CyclicLR": {"base_lr": 0.1, "max_lr": 0.5, "step_size_up": 0.5, "cycle_momentum": False},
    }
    for name in SCHEDULES:
        schedule = ScheduleConfig.from_table({"name": name, **needed.get(name, {})}, "x")
        config = TrainingConfig(optimizer="SGD", epochs=1, schedule=schedule)
        optimizer = config.factory()([torch.nn.Parameter(torch.zeros(1))])
        rates = []
        made = schedule(optimizer, steps=8)
        for _ in range(8):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            made.step()
        assert len(set(rates)) > 1 or name == "ConstantLR", name


def test_schedule_steps_may_be_shares_of_an_experience():
    schedule = ScheduleConfig.from_table({"name": "MultiStepLR", "milestones": [0.5, 6]}, "x")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    assert sorted(schedule(optimizer, steps=8).milestones) == [4, 6]
    whole = ScheduleConfig.from_table({"name": "CosineAnnealingLR"}, "x")
    assert whole(optimizer, steps=8).T_max == 8


def test_the_config_reference_refuses_an_unknown_table():
    with pytest.raises(ConfigError, match=r"^--table = 'x' is not allowed; allowed: data, model"):
        reference.reference_text("x")
