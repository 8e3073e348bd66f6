"""Refusals of a learner before training: models that do not fit, hooks without a result, and
divergence.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import nn

from helpers.learners import SIMULATED
from perdure.contract.plan import MemoryPlan, Plan
from perdure.contract.strategy import Strategy
from perdure.errors import ConfigError, PrivacyError, RunawayError, StrategyError
from perdure.learner import EMA, SAM
from perdure.models import Classifier
from perdure.strategies import (
    AGEM,
    DER,
    ERACE,
    EWC,
    GEM,
    MIR,
    BiC,
    FeatureDistillation,
    GDumb,
    ICaRL,
    LwF,
    Naive,
    Replay,
)
from perdure.tasks.losses import Loss


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
@pytest.mark.parametrize("width", [1, 3, 20])
def test_a_model_with_another_number_of_outputs_is_refused(learner_of, toy_stream, scenario, width):
    stream = toy_stream(scenario)
    message = (
        f"outputs of the model = {width} is not allowed; allowed: {stream.num_classes}: one "
        "for every class"
    )
    with pytest.raises(ConfigError, match=message):
        learner_of(model=nn.Linear(5, width)).fit(stream)


@pytest.mark.parametrize("strategy", [ICaRL(memory_size=8), FeatureDistillation(strength=1.0)])
def test_a_model_without_features_is_refused_before_training(learner_of, toy_stream, strategy):
    with pytest.raises(StrategyError, match="the model has no feature_size"):
        learner_of(strategy, model=nn.Linear(5, 4)).fit(toy_stream())


def test_a_second_private_fit_without_a_folder_is_refused(learner_of, toy_stream, tmp_path):
    learner = learner_of(privacy=SIMULATED)
    learner.fit(toy_stream())
    with pytest.raises(PrivacyError, match="has already trained this model"):
        learner.fit(toy_stream())
    kept = learner_of(privacy=SIMULATED, folder=tmp_path)
    # goes on where it was: at the end
    assert torch.equal(kept.fit(toy_stream()), kept.fit(toy_stream()))


def test_training_that_diverges_raises_an_error(learner_of, toy_stream):
    sgd = partial(torch.optim.SGD, lr=0.1)
    with pytest.raises(
        RunawayError, match=r"EWC: .* is NaN or infinite in step \d+ of experience 1.*; lower"
    ):
        learner_of(EWC(strength=1e6), optimizer=sgd, iterations=60).fit(toy_stream())


@dataclass(frozen=True, kw_only=True)
class Answers(Strategy):
    """A strategy whose hooks return invalid values."""

    hook: str

    def init(self, spec):
        return None if self.hook == "init" else super().init(spec)

    def penalty(self, params, state):
        return (
            torch.stack([value.sum() for value in params.values()])
            if self.hook == "penalty"
            else None
        )

    def after_experience(self, curator, params, state):
        return None if self.hook == "after_experience" else state


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (
            "init",
            r"init\(\) of Answers returned None; allowed: a State; end the hook with return "
            r"state.replace",
        ),
        ("after_experience", r"after_experience\(\) of Answers returned None; allowed: a State"),
        ("penalty", r"penalty\(\) returned tensor.*; allowed: a tensor with one number, or None"),
    ],
)
def test_the_error_names_a_strategy_hook_that_returns_none(learner_of, toy_stream, hook, message):
    with pytest.raises(StrategyError, match=message):
        learner_of(Answers(hook=hook)).fit(toy_stream())


def test_a_plan_refuses_an_unknown_pool():
    with pytest.raises(
        ConfigError,
        match=r"plan.pool = 'everything' is not allowed; allowed: experience, all, memory",
    ):
        Plan(pool="everything")


@pytest.mark.parametrize("capacity", [0, 2.5, math.nan, math.inf, True, "2 MB"])
def test_a_memory_capacity_that_is_not_a_whole_number_is_refused(capacity):
    with pytest.raises(ConfigError, match=r"memory capacity = .*; allowed: 1 or more records"):
        MemoryPlan(capacity=capacity)
    with pytest.raises(
        ConfigError, match=r"memory batch_size = .*; allowed: 1 or more records, or None"
    ):
        MemoryPlan(capacity=1, batch_size=capacity)


@pytest.mark.parametrize(
    "make",
    [
        lambda value: LwF(strength=value),
        lambda value: LwF(temperature=value),
        lambda value: DER(memory_size=5, alpha=value),
        lambda value: MIR(memory_size=5, rate=value),
        lambda value: ICaRL(memory_size=5, temperature=value),
    ],
)
def test_strategies_refuse_infinite_and_nan_settings(make):
    for value in (math.inf, math.nan, -1.0):
        with pytest.raises(ConfigError, match="is not allowed"):
            make(value)


@pytest.mark.parametrize("kind", [AGEM, BiC, DER, ERACE, GDumb, GEM, ICaRL, MIR, Replay])
@pytest.mark.parametrize("size", ["2 XB", "0 MB", "", -1, 0, 2.5, math.nan, True])
def test_strategies_refuse_an_invalid_memory_size(kind, size):
    with pytest.raises(
        ConfigError,
        match=r"memory_size = .*; allowed: a number of records, or bytes such as '500 kB'",
    ):
        kind(memory_size=size)


def test_a_model_with_one_output_per_class_is_trained(learner_of, toy_stream):
    assert learner_of(Naive(), model=nn.Linear(5, 4)).fit(toy_stream()).isfinite().all()


@pytest.mark.parametrize("averaging", [None, EMA()])
def test_a_step_of_one_record_is_refused_for_batchnorm(learner_of, toy_stream, averaging):
    stream = toy_stream()
    model = Classifier(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)), 6, 4)
    learner = learner_of(
        stream=stream, model=model, batch_size=23, averaging=averaging, iterations=2
    )
    with pytest.raises(ConfigError, match="a step has one record, of which BatchNorm"):
        learner.fit(stream)


@dataclass(frozen=True, kw_only=True)
class Own(Loss):
    """A loss of a user: cross entropy, changed by a function."""

    name: ClassVar[str] = "own"
    change: Callable = torch.Tensor.clone

    def losses(self, logits, labels, allowed):
        return self.change(nn.functional.cross_entropy(logits, labels, reduction="none"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (torch.mean, r"result of the loss Own = \(\)"),
        (lambda each: each[:, None], r"result of the loss Own = \(3, 1\)"),
        (lambda each: None, "result of the loss Own = 'NoneType'"),
        (torch.Tensor.detach, "without gradient"),
        (lambda each: [][0], "the loss Own fails on 3 synthetic records"),
    ],
)
def test_a_loss_that_breaks_its_contract_is_refused(learner_of, toy_stream, change, told):
    with pytest.raises(ConfigError, match=told):
        learner_of(loss=Own(change=change)).prepare(toy_stream())
    learner_of(loss=Own()).prepare(toy_stream())


@pytest.mark.parametrize(
    "name", ["l1", "l2", "gradient_noise", "weight_noise", "max_grad_norm", "sharpness"]
)
def test_numbers_that_no_float_can_hold_are_refused(learner_of, toy_stream, name):
    huge = 10**400
    with pytest.raises(ConfigError, match=f"{name}|rho"):
        learner_of(**{name: SAM(rho=huge) if name == "sharpness" else huge})
