"""Properties of every strategy in strategies/, found from the files."""

import dataclasses
from functools import partial

import pytest
import torch
from torch import nn

from helpers.strategy_examples import example, model_of, private
from perdure import strategies
from perdure.contract.combine import Combine
from perdure.errors import PrivacyError
from perdure.learner.learner import Learner
from perdure.models.classifier import Classifier
from perdure.privacy.settings import Privacy
from perdure.testing import CHECKS, check_strategy

every = pytest.mark.parametrize("name", strategies.names())
OWN = {
    name
    for name in strategies.names()
    if example(name).small_model(input_shape=(5,), num_classes=4) is not None
}


@pytest.fixture
def learner_of(toy_stream, toy_model):
    def make(name, **changes):
        options = {
            "optimizer": partial(torch.optim.Adam, lr=0.02),
            "iterations": 6,
            "batch_size": 8,
            "blocks": 2,
        }
        stream = toy_stream()
        learner = Learner(
            model=model_of(name, stream, toy_model), strategy=example(name), **options | changes
        )
        learner.prepare(stream)
        return learner

    return make


@every
def test_the_example_of_each_strategy_has_the_class_of_its_name(name):
    kind = strategies.find(name)
    assert type(kind.example()) is kind and kind.example() == kind.example()


@every
def test_each_strategy_trains_without_other_parts(learner_of, toy_stream, name):
    adam = partial(torch.optim.Adam, lr=0.04)
    matrix = learner_of(name, iterations=90, optimizer=adam).fit(toy_stream())
    assert matrix.shape == (2, 2) and matrix[0, 0] > 80 and matrix[1, 1] > 40
    assert name.replace("_", "") == example(name).name.lower() and isinstance(
        hash(example(name)), int
    )
    fields = ", ".join(
        f"{f.name}={getattr(example(name), f.name)!r}" for f in dataclasses.fields(example(name))
    )
    assert repr(example(name)) == f"{example(name).name}({fields})"


IN_SHORT = {*strategies.names()} - OWN | {"l2p"}
TRANSFORMERS = pytest.mark.deep(reason="full replay: runs a model of the strategy's own many times")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in IN_SHORT else TRANSFORMERS)
        for name in strategies.names()
    ],
)
def test_each_strategy_passes_check_strategy(name):
    """Alone, as a Flower client, under privacy, under vmap, stopped and resumed: see
    `perdure.testing`.
    """
    report = check_strategy(example(name))
    skipped = {"vmap"} if example(name).not_vmappable_because else set()
    skipped |= {"bounds", "private"} if example(name).couples_records else set()
    assert {*CHECKS} - {*report.passed} == skipped


@every
def test_combine_with_one_part_equals_that_part(learner_of, toy_stream, name):
    alone = learner_of(name)
    combined = learner_of(name)
    combined.strategy = Combine(example(name), strategies.find("naive")())
    assert torch.equal(alone.fit(toy_stream()), combined.fit(toy_stream()))
    ends = [learner.model.state_dict() for learner in (alone, combined)]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


@pytest.mark.parametrize("name", sorted({*strategies.names()} - OWN))
def test_each_strategy_trains_with_normalisation_and_dropout(toy_stream, name):
    stream = toy_stream()
    body = nn.Sequential(nn.Linear(5, 8), nn.GroupNorm(2, 8), nn.Tanh(), nn.Dropout(0.2))
    learner = Learner(
        model=Classifier(body, 8, 4),
        strategy=example(name),
        optimizer=torch.optim.SGD,
        iterations=2,
        batch_size=8,
        privacy=Privacy(noise_multiplier=1.0, seed=0) if name in private() else None,
    )
    assert learner.fit(stream).isfinite().all()


@pytest.mark.parametrize("name", sorted({*strategies.names()} - {*private()}))
def test_privacy_refuses_strategies_that_couple_records(learner_of, name):
    with pytest.raises(PrivacyError, match=f"{example(name).name} couples the records"):
        learner_of(name, privacy=Privacy(noise_multiplier=1.0, seed=0))
