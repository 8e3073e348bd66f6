"""Arguments of the wrong type or without use are refused in one line before anything is built."""

from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from perdure.adversarial import PGD
from perdure.data import Views
from perdure.data.records import Records
from perdure.data.scenarios import split
from perdure.errors import ConfigError, DataError
from perdure.explain import LIME
from perdure.federated import Federation
from perdure.learner.learner import Learner
from perdure.models import ModelConfig
from perdure.privacy import Adaptive
from perdure.privacy.settings import Privacy
from perdure.strategies import ERACE, EWC, Combine, Naive, Replay, find, names

SGD = partial(torch.optim.SGD, lr=0.1)


class Twice(torch.optim.SGD):
    """An optimiser that asks for the losses again inside a step."""

    def step(self, closure):
        closure()
        return super().step()


class Detached(nn.Linear):
    """A model whose weights get no gradient."""

    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


def learner(**changes):
    given = {"model": nn.Linear(5, 4), "strategy": Naive(), "optimizer": SGD, "epochs": 1}
    return Learner(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": nn.Linear}, "model = .*Linear.* is not allowed; allowed: a torch.nn.Module"),
        ({"strategy": Naive}, "strategy = .*Naive.*; allowed: an instance of a strategy, such as"),
        (
            {"strategy": "naive"},
            r"strategy = 'naive' .*an instance .*, such as Naive\(\)",
        ),
        ({"strategy": "ewc"}, r"strategy = 'ewc' .*such as EWC\(strength=50.0\)"),
        ({"strategy": Replay}, r"strategy = .*Replay.*such as Replay\(memory_size="),
        ({"strategy": "none"}, "strategy = 'none' .*an instance of a strategy, such as"),
        ({"privacy": 3.0}, r"privacy = 3.0 .*Privacy\(epsilon=3.0\)"),
        ({"adversary": "pgd"}, r"adversary = 'pgd' .*such as PGD\(\)"),
        ({"scheduler": "cosine"}, "scheduler = 'str' .*T_max=steps"),
        ({"views": 4}, "views = 4 is not allowed; allowed: None, or perdure.data.Views"),
        ({"optimizer": "sgd"}, r"optimizer = 'str' .*partial\(torch.optim.SGD, lr=0.1\)"),
        ({"epochs": 1.5}, "epochs = 1.5 is not allowed; allowed: a whole number, 1 or more"),
        ({"blocks": True}, "blocks = True is not allowed; allowed: a whole number"),
        ({"batch_size": "8"}, "batch_size = '8' is not allowed; allowed: a whole number"),
        ({"epochs": None, "iterations": 2.0}, "iterations = 2.0 .*a whole number, 1 or more"),
        ({"seed": "0"}, "seed = '0' is not allowed; allowed: a whole number"),
        ({"seed": None}, "seed = None is not allowed; allowed: a whole number"),
        ({"client": 1.0}, "client = 1.0 is not allowed; allowed: a whole number"),
        ({"owner": 3}, "owner = 3 is not allowed; allowed: text"),
        ({"folder": 3}, "folder = 3 is not allowed; allowed: a path or None"),
        ({"warm_start": "no"}, "warm_start = 'no' is not allowed; allowed: True or False"),
        ({"reset_optimizer": 1}, "reset_optimizer = 1 is not allowed; allowed: True or False"),
        ({"callbacks": print}, "callbacks = <.*print> is not allowed; allowed: a list"),
        ({"device": 0}, "device = 0 is not allowed; allowed: text or an instance of device"),
        ({"device": "gpu"}, "device = 'gpu' cannot be used: .*; allowed: 'cpu', or a device"),
    ],
)
def test_the_learner_refuses_an_argument_of_the_wrong_type(changes, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        learner(**changes)
    assert "\n" not in str(refusal.value)


def test_the_learner_refuses_an_optimizer_instead_of_a_factory():
    with pytest.raises(ConfigError, match=r"optimizer = 'SGD' .*a function from parameters"):
        learner(optimizer=torch.optim.SGD(nn.Linear(5, 4).parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("maker", "message"),
    [
        (torch.optim.LBFGS, "optimizer = 'LBFGS' .*one dense gradient per step"),
        (torch.optim.SparseAdam, "optimizer = 'SparseAdam' .*one dense gradient per step"),
        (Twice, "optimizer = 'Twice' .*one dense gradient per step"),
        (lambda parameters: None, "optimizer.parameters. = 'NoneType' .*return one"),
        (partial(torch.optim.SGD, rate=0.1), r"optimizer\(parameters\) fails: .*'rate'.*SGD, lr"),
        (partial(torch.optim.SGD, lr=-0.1), r"optimizer\(parameters\) fails: Invalid learning"),
        (torch.optim.Muon, r"optimizer\(parameters\) fails: Muon only supports 2D"),
        (lambda _: SGD(nn.Linear(5, 4).parameters()), "optimizer = 'SGD of other parameters'"),
        (partial(torch.optim.SGD, lr=torch.tensor(0.5)), "optimizer option lr = .*a number, 0.5"),
        (
            partial(torch.optim.Adam, capturable=True),
            "optimizer Adam fails in a step: If capturable",
        ),
        (partial(SGD, differentiable=True), "optimizer SGD fails in a step: .*dense gradients"),
    ],
)
def test_the_learner_refuses_an_optimizer_that_cannot_step(toy_stream, maker, message):
    with pytest.raises(ConfigError, match=message) as caught:
        learner(optimizer=maker).fit(toy_stream())
    assert "\n" not in str(caught.value)


def test_the_learner_accepts_a_folder_as_text(tmp_path):
    assert learner(folder=str(tmp_path)).folder == Path(tmp_path)


def test_the_learner_refuses_a_list_in_place_of_a_stream():
    with pytest.raises(ConfigError, match=r"stream = 'list' .*perdure\.data\.split"):
        learner().fit([torch.ones(3, 5)])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(6, 4), r"the model fails on 2 rows of \(5,\) in float32.*first layer that fits"),
        (
            nn.Identity(),
            "outputs of the model = 5 is not allowed; allowed: 4: one for every class .num_class",
        ),
        (nn.GRU(5, 4), "output of the model = 'tuple' .*one tensor"),
        (Detached(5, 4), "outputs of the model do not depend on its parameters.*no_grad"),
        (nn.Flatten(0), r"outputs of the model = .\(10,\) for 2 rows.*one row for every record"),
    ],
)
def test_the_learner_refuses_a_model_that_fails_on_the_inputs(toy_stream, model, message):
    with pytest.raises(ConfigError, match=message):
        learner(model=model, optimizer=lambda p: SGD([*p] or [nn.Parameter(torch.ones(1))])).fit(
            toy_stream()
        )


def test_the_error_names_inputs_of_another_precision(toy_data):
    train, test = (
        replace(part, inputs=part.inputs.double()) for part in (toy_data.train, toy_data.test)
    )
    stream = split(replace(toy_data, train=train, test=test), scenario="class", experiences=2)
    with pytest.raises(ConfigError, match=r"in float64.*convert the records"):
        learner().fit(stream)


@pytest.mark.parametrize(
    "settings",
    [{"epsilon": "3"}, {"epsilon": (1.0, "2")}, {"noise_multiplier": "1"}, {"delta": "x"}],
)
def test_privacy_refuses_numbers_given_as_text(settings):
    with pytest.raises(ConfigError, match="is not allowed; allowed: a number"):
        Privacy(**({"noise_multiplier": 1.0} | settings))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EWC(strength="100"), "ewc.strength = '100' is not allowed; allowed: a number"),
        (lambda: EWC(strength=1.0, mode=1), "ewc.mode = 1 .*separate, online"),
        (
            lambda: Replay(memory_size=2.5),
            "memory_size = 2.5 .*allowed: a number of records, or bytes",
        ),
        (lambda: ERACE(memory_size=True), "memory_size = True .*a number of records, or bytes"),
        (lambda: PGD(epsilon="0.1"), "pgd.epsilon = '0.1' .*a number"),
        (lambda: LIME(chunk=2.5), "lime.chunk = 2.5 .*a whole number"),
        (lambda: Privacy(epsilon=3.0, bands=2.5), "privacy.bands = 2.5 .*a whole number or None"),
        (lambda: Adaptive(quantile=None), "adaptive.quantile = None .*a number"),
        (lambda: Views(count=4, change="flip"), "views.change = 'flip' .*a function"),
        (lambda: ModelConfig(hidden="400"), r"hidden = '400' .*a tuple \(each a whole number\)"),
        (lambda: Federation(clients=2.0, rounds=1), "federation.clients = 2.0 .*a whole number"),
        (lambda: Combine(EWC, Naive()), "a part of Combine = .*EWC.*instances of strategies"),
    ],
)
def test_a_setting_of_the_wrong_type_is_refused_in_one_line(make, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        make()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", names())
def test_every_field_of_a_strategy_is_type_checked(name):
    strategy = find(name).example()
    for each in fields(strategy):
        if each.init:
            with pytest.raises(ConfigError, match=f"{each.name} = <object"):
                replace(strategy, **{each.name: object()})


@pytest.mark.parametrize("name", ["inputs", "labels", "ids"])
def test_records_refuse_numpy_arrays_and_name_the_field(name):
    given = {"inputs": torch.ones(3, 5), "labels": torch.zeros(3).long(), "ids": torch.arange(3)}
    given[name] = np.zeros(3, dtype=np.int64)
    with pytest.raises(DataError, match=f"{name} are a ndarray; .*torch.as_tensor"):
        Records(**given)
