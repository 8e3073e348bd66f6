"""`check_strategy`: valid strategies pass, and every check finds the strategy that breaks it."""

from dataclasses import dataclass
from operator import attrgetter
from typing import ClassVar

import pytest
import torch
from torch import nn

from helpers.broken_strategies import BROKEN, Centred, Remembering, broken
from perdure.contract.forward import task_losses
from perdure.contract.plan import MemoryPlan, Plan, PrivacyCost
from perdure.contract.state import State
from perdure.contract.strategy import Strategy
from perdure.errors import ConformanceError, StrategyError
from perdure.models.classifier import Classifier
from perdure.models.classifiers import mlp
from perdure.queries.releases import histogram, top_k
from perdure.strategies import EWC, Combine, ICaRL, Naive, Replay
from perdure.testing import CHECKS, check_strategy
from perdure.testing.fixtures import StrategyFixture

# --------------------------------------------------------------------------- private


@broken("alone", "PrivacyError: a hook reads curator._held", "curator.release")
class Peeping(Remembering):
    def after_experience(self, curator, params, state):
        return state.replace({"seen": attrgetter("_held")(curator).rows.inputs.mean(0)[:2]})


@broken("alone", "PrivacyError: a hook reads curator.sample", "no charge in the ledger covers")
class Drawing(Remembering):
    def after_experience(self, curator, params, state):
        return state.replace({"seen": curator.sample(0).inputs.mean(0)[:2]})


@broken("alone", "PrivacyError: a hook reads curator._held", "no charge in the ledger covers")
class DrawingBehindTheCurator(Remembering):
    def after_experience(self, curator, params, state):
        return state.replace({"seen": attrgetter("_held")(curator).sample(0).inputs.mean(0)[:2]})


@broken("alone", "PrivacyError: a hook reads curator.raw", "no charge in the ledger covers")
class AskingForRaw(Remembering):
    def after_experience(self, curator, params, state):
        return state.replace({"seen": curator.raw("to see them").inputs.mean(0)[:2]})


@broken(
    "private",
    "asked for 1 releases in experience 0 and declares 0",
    "PrivacyCost(releases=1)",
    strength=1.0,
)
class Undeclared(EWC):
    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost()


@broken("private", "asked for 0 releases in experience 0 and declares 1")
class Overdeclared(Strategy):
    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost(releases=1)


@broken("private", "asked for 1 memory_releases in experience 0 and declares 0", memory_size=16)
class UndeclaredRecall(ICaRL):
    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost(releases=1, reuses_past_records=True)

    def after_experience(self, curator, params, state):
        curator.release(lambda f, b: b.inputs, clip_norm=1.0, purpose="sum")
        return super().after_experience(curator, params, state)


@broken("private", "asked for 1 histograms")
class UndeclaredHistogram(Strategy):
    def after_experience(self, curator, params, state):
        histogram(curator, lambda batch: batch.labels, bins=6, purpose="classes")
        return state


@broken("private", "asked for 2 selections in experience 0 and declares 1")
class TooManySelections(Strategy):
    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost(selections=1)

    def after_experience(self, curator, params, state):
        top_k(curator, lambda batch: batch.labels, bins=6, k=2, purpose="classes")
        return state


@broken(
    "private",
    "0 of experience 1 asked for 1 reference gradients of experience 0 and declares 0",
    memory_size=16,
)
class UndeclaredReference(Strategy):
    memory_size: int
    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost(reuses_past_records=True)

    def plan(self, experience):
        return Plan(memory=MemoryPlan(capacity=self.memory_size, use="reference"))

    def references(self, curator, params, state):
        losses = lambda forward, batch: task_losses(forward, batch, curator.context)  # noqa: E731
        return (curator.reference(losses, params),) if curator.context.experience else ()


@broken("private", "asked for reference gradients in 0 steps and declares 1", memory_size=16)
class OverdeclaredReference(Replay):
    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost(references=1, reuses_past_records=True)


@broken(
    "private",
    "records of experience 0 are used later and reuses_past_records=False",
    "reuses_past_records=True",
    memory_size=16,
)
class Reusing(Replay):
    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost()


@broken("private", "records of experience 0 are not used later and reuses_past_records=True")
class NotReusing(Strategy):
    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost(reuses_past_records=True)


@broken("private", "changes with its records", "declared_size")
class PlanningByRecords(Strategy):
    def plan(self, experience):
        return Plan(trainable=("",) if experience.train.inputs.mean() > 0.5 else ("body", "head"))


SIGHTS = []


@broken("private", "state seen changes with the records although every release is the same")
class Smuggling(Remembering):
    """A strategy that hides rows outside of its state."""

    def losses(self, forward, batch, context, state):
        SIGHTS[:] = [batch.inputs.detach().sum(0)[:2]]
        return task_losses(forward, batch, context)

    def after_experience(self, curator, params, state):
        return state.replace({"seen": SIGHTS[0]}) if type(SIGHTS[0]) is torch.Tensor else state


@broken("private", "GuardError: the forward of", "CouplingInTraining.losses() couples records")
class CouplingInTraining(Strategy):
    """A strategy that couples records only in training mode, where only the guard looks."""

    def losses(self, forward, batch, context, state):
        each = task_losses(forward, batch, context)
        return each - 0.5 * each.mean() if forward.module.training else each


# --------------------------------------------------------------------------- resume

ANCHORS = {}


@broken("resume", "stopped and resumed without privacy", "State")
class Elsewhere(Strategy):
    """A strategy that stores values outside of the State, reset by `init`, so that whole runs
    repeat.
    """

    def init(self, spec):
        ANCHORS.clear()
        return State()

    def penalty(self, params, state):
        terms = [
            (value - ANCHORS[name]).square().sum()
            for name, value in params.items()
            if name in ANCHORS
        ]
        return torch.stack(terms).sum() if terms else None

    def after_experience(self, curator, params, state):
        ANCHORS.update({name: value.clone() for name, value in params.items()})
        return state


# --------------------------------------------------------------------------- federated


@broken("federated", "a server makes other predictions than its only client", "derive()")
class PredictingLocally(Remembering):
    def after_experience(self, curator, params, state):
        return state.replace({"seen": torch.ones_like(state["seen"])})

    def predict(self, forward, x, context, state):
        return torch.where(context.allowed, forward(x) * state["seen"][0], -1e9)


@broken("federated", "StrategyError", "have no mean")
class AveragingIntegers(Strategy):
    def init(self, spec):
        return State().declare("count", torch.zeros(2, dtype=torch.int64), "mean")


# --------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("name", BROKEN)
def test_each_broken_strategy_fails_the_check_made_for_it(name):
    make, check, words = BROKEN[name]
    with pytest.raises(ConformanceError) as caught:
        check_strategy(make())
    told = str(caught.value)
    assert told.startswith(f"{name} fails the check {check!r}: ")
    assert "; allowed: " in told
    for word in words:
        assert word in told
    assert isinstance(caught.value, StrategyError)


def test_every_check_has_a_broken_strategy_that_fails_it():
    assert {check for _, check, _ in BROKEN.values()} == set(CHECKS)


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_combine_passes_check_strategy_in_every_scenario(scenario):
    report = check_strategy(Combine(EWC(strength=5.0), Replay(memory_size=12)), scenario=scenario)
    assert report.passed[: len(CHECKS)] == tuple(CHECKS)
    assert set(report.skipped) <= {"cuda"}
    assert f"{scenario}-incremental" in str(report)
    assert "passed: declared, alone" in str(report)


@dataclass(frozen=True, kw_only=True)
class Honest(Centred):
    """A strategy that couples records and declares it."""

    couples_records: ClassVar[bool] = True
    not_vmappable_because: ClassVar[str | None] = "it was never tried"


@dataclass(frozen=True, kw_only=True)
class ByIdentity(Strategy):
    """A strategy that weighs a record by its id, as for records held out."""

    def losses(self, forward, batch, context, state):
        return task_losses(forward, batch, context) * (1 + (batch.ids * 2654435761 >> 8) % 7)


def test_check_strategy_accepts_a_loss_that_uses_record_ids():
    """The id is the record's own; the guard leaves records out and must not renumber the others."""
    assert check_strategy(ByIdentity()).passed[: len(CHECKS)] == tuple(CHECKS)


def test_check_strategy_reports_checks_that_do_not_apply():
    report = check_strategy(Honest())
    assert {"declared", "alone", "pure", "rows", "resume", "federated"} <= set(report.passed)
    assert not {"bounds", "vmap", "private"} & set(report.passed)
    assert report.skipped["vmap"] == "it was never tried"
    assert "couples_records" in report.skipped["private"]
    assert "not applicable: bounds: the strategy declares couples_records" in str(report)


class Gated(Classifier):
    """A classifier with an additional part."""

    def __init__(self, plain):
        super().__init__(plain.body, plain.feature_size, plain.head.out_features)
        self.load_state_dict(plain.state_dict())
        self.gate = nn.Linear(self.feature_size, self.feature_size, bias=False)
        nn.init.eye_(self.gate.weight)

    def features(self, x):
        return self.gate(super().features(x))


def gated(stream, hidden=(3,)):
    return Gated(
        mlp(input_shape=stream.input_shape, num_classes=stream.num_classes, hidden=hidden, seed=0)
    )


@dataclass(frozen=True, kw_only=True)
class Gating(Strategy):
    """A strategy that needs the additional part."""

    def init(self, spec):
        if "gate.weight" not in spec.params:
            raise StrategyError("Gating needs a model with a gate")
        return State().declare("opened", spec.params["gate.weight"], "local")


@dataclass(frozen=True, kw_only=True)
class GatingAtHome(Gating):
    """A strategy that brings its own model of four hidden units."""

    def small_model(self, *, input_shape, num_classes):
        return Gated(mlp(input_shape=input_shape, num_classes=num_classes, hidden=(4,), seed=0))


def test_check_strategy_uses_the_model_that_a_strategy_needs():
    with pytest.raises(
        ConformanceError, match="'alone': it raised StrategyError: Gating needs a model with a gate"
    ):
        check_strategy(Gating())
    for report in (check_strategy(Gating(), model=gated), check_strategy(GatingAtHome())):
        assert report.passed[: len(CHECKS)] == tuple(CHECKS)


def test_check_strategy_prefers_a_given_model_to_small_model():
    shapes = {"input_shape": (4,), "num_classes": 6}
    assert StrategyFixture(strategy=Naive(), scenario="class").build().feature_size == 5
    for strategy in (GatingAtHome(), Combine(Naive(), GatingAtHome())):
        assert strategy.small_model(**shapes).feature_size == 4
        assert StrategyFixture(strategy=strategy, scenario="class").build().feature_size == 4
        assert (
            StrategyFixture(strategy=strategy, scenario="class", model=gated).build().feature_size
            == 3
        )
    assert Combine(Naive(), Gating()).small_model(**shapes) is None


def test_check_strategy_changes_no_strategy_or_generator():
    strategy = Naive()
    before = torch.get_rng_state()
    check_strategy(strategy)
    assert vars(strategy) == {}
    assert torch.equal(torch.get_rng_state(), before)
