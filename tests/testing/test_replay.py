"""Replays of every strategy, clipping and place without one record, with fixed answers.

No exact sum changes by more than its charge, and nothing else differs.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from helpers.replays import CLIPPINGS, PLACES, experiment, maker, settings
from helpers.strategy_examples import example, private
from perdure import strategies
from perdure.adversarial import FGSM, PGD
from perdure.data import InputDomain, Views, shift_and_flip
from perdure.errors import ConfigError, GuardError
from perdure.federated import Federation
from perdure.learner.learner import Learner
from perdure.strategies.bic import held_out
from perdure.strategies.naive import Naive
from perdure.testing.replay import replay, without_record

REFUSED = {
    "coral": "couples the records of a batch",
    "mir": "couples the records of a batch",
}
"""Strategies that are refused under privacy, and so have no replay: by name, with the reason."""
SHORT = {
    ("agem", "correlated", "alone"),
    ("cwr_star", "per-layer", "alone"),
    ("der", "flat", "alone"),
    ("ewc", "adaptive", "alone"),
    ("gdumb", "flat", "alone"),
    ("gem", "flat", "alone"),
    ("icarl", "flat", "alone"),
    ("ranpac", "flat", "alone"),
    ("naive", "correlated", "federated"),
    ("replay", "adaptive", "federated"),
    ("ewc", "flat", "federated"),
}
"""Combinations of the short suite: each kind of release, clipping and place."""


def combinations():
    """Yield all combinations; those outside the short suite are marked deep."""
    for name in private():
        for clipping in CLIPPINGS:
            for place in PLACES:
                deep = pytest.mark.deep(reason="full replay: strategies by clipping and place")
                marks = () if (name, clipping, place) in SHORT else deep
                yield pytest.param(name, clipping, place, marks=marks)


@pytest.mark.parametrize(("name", "clipping", "place"), list(combinations()))
def test_a_record_changes_no_sum_by_more_than_its_charge(
    name, clipping, place, toy_stream, toy_model
):
    parts = experiment(toy_stream(), name, clipping, place, toy_model)
    record = int(parts["streams"][0][0].train.ids[3])
    found = replay(**parts, record=record)
    assert found.unexplained == ()
    assert found.unpaid == ()
    assert [row for row in found.releases if row.ratio > 1] == []
    # by layers it may be one of several that is at its bound; a chain may end before its last sum
    assert found.largest > 0.8
    elsewhere = [row for row in found.releases if row.place == "client 1"]
    assert all(row.ratio == 0 for row in elsewhere) and bool(elsewhere) == (place == "federated")
    cost = example(name).privacy_cost
    names = {row.release for row in found.releases}
    assert any(row.startswith("reference") for row in names) == bool(cost.references)
    once = cost.releases + cost.histograms + cost.selections + cost.memory_releases
    assert any(row.startswith("release:") for row in names) == bool(once)


def test_every_strategy_can_be_replayed_or_gives_a_reason():
    assert set(private()) | set(REFUSED) == set(strategies.names())


@pytest.mark.parametrize("name", REFUSED)
def test_replay_gives_the_reason_for_a_refused_strategy(name, toy_stream, toy_model):
    parts = experiment(toy_stream(), name, "flat", "alone", toy_model)
    with pytest.raises(GuardError, match=REFUSED[name]):
        replay(**parts, record=0)


def test_correlated_noise_with_adaptive_clipping_is_refused():
    with pytest.raises(ConfigError, match="with sampling_rate or adaptive clipping"):
        settings(**CLIPPINGS["adaptive"], **CLIPPINGS["correlated"])


def test_a_record_held_out_by_bic_changes_its_releases(toy_stream, toy_model):
    stream = toy_stream()
    ids = stream[0].train.ids
    parts = experiment(stream, "bic", "flat", "alone", toy_model)
    found = replay(**parts, record=int(ids[held_out(ids)][0]))
    moved = [row for row in found.releases if row.release.startswith("release:") and row.ratio > 0]
    assert found.holds and moved


def test_a_stored_record_changes_reference_gradients(toy_stream, toy_model):
    parts = experiment(toy_stream(), "gem", "flat", "alone", toy_model)
    found = replay(**parts, record=0)
    [row] = [row for row in found.releases if row.release == "reference 0"]
    assert 0.9 < row.ratio <= 1


class Dropping(nn.Sequential):
    """A small model with dropout."""

    def __init__(self):
        torch.manual_seed(3)
        super().__init__(nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, 4))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"views": Views(count=2, change=shift_and_flip(pixels=1))}, "views"),
        ({"adversary": FGSM(epsilon=0.1)}, "adversary"),
        ({"model": lambda stream: Dropping()}, "dropout of 1"),
    ],
)
def test_replay_refuses_views_adversaries_and_dropout(changes, name, toy_stream, toy_model):
    parts = {"model": toy_model} | changes
    make = maker(toy_stream(), Naive(), **parts)
    with pytest.raises(ConfigError, match=f"{name} = .* depend on a row's position in the batch"):
        replay(make, [toy_stream()], record=0)


class ByShape(nn.Module):
    """A model that fails without rows, as models do that leave one size to `view`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Linear(5, 6)
        self.head = nn.Linear(6, 4)

    def features(self, x):
        return torch.tanh(self.body(x.view(x.shape[0], -1)))

    def forward(self, x):
        return self.head(self.features(x))


BESIDE = {
    "nothing": {},
    "views": {"views": Views(count=2, change=lambda x: x + 0.1 * torch.rand_like(x))},
    "an adversary": {"adversary": PGD(epsilon=0.1, steps=2, bounds=None)},
    "dropout": {"model": lambda stream: Dropping()},
    "record by record": {"privacy": settings(custom_forward="record-by-record")},
}


@pytest.mark.parametrize("beside", BESIDE)
def test_replay_with_alone_compares_one_record_with_no_record(beside, toy_stream):
    """A run that works with one record also works with an empty partition, random draws
    included.
    """
    make = maker(toy_stream(), Naive(), **({"model": lambda stream: ByShape()} | BESIDE[beside]))
    record = int(toy_stream()[0].train.ids[3])
    found = replay(make, [toy_stream()], record=record, alone=True)
    assert found.holds and found.unexplained == () and 0.9 < found.largest <= 1


@pytest.mark.parametrize(
    ("name", "place"),
    [
        pytest.param(
            name,
            place,
            marks=()
            if (name, place) in {("der", "alone"), ("agem", "alone")}
            else pytest.mark.deep(reason="full replay: every strategy with one record and none"),
        )
        for name in private()
        for place in PLACES
    ],
)
def test_replay_with_alone_passes_for_each_strategy(name, place, toy_stream, toy_model):
    own = (lambda stream: ByShape()) if name == "der" else toy_model
    parts = experiment(toy_stream(), name, "flat", place, own)
    record = int(parts["streams"][0][0].train.ids[3])
    found = replay(**parts, record=record, alone=True)
    assert found.unexplained == () and found.unpaid == () and found.largest <= 1


def test_replay_finds_an_error_that_occurs_without_records(toy_stream, toy_model):
    """A raw torch error reveals as much as an error of perdure."""

    class Failing(Learner):
        def train(self, steps):
            if self.position.experience == 0 and not len(self.session.held.rows):
                raise RuntimeError("reshape of 0 elements")
            return super().train(steps)

    make = maker(toy_stream(), Naive(), toy_model, kind=Failing)
    found = replay(make, [toy_stream()], record=0, alone=True)
    assert not found.holds and "an error: reshape of 0 elements" in found.unexplained


def test_replay_refuses_neighbours_with_alone(toy_stream, toy_model):
    make = maker(toy_stream(), Naive(), toy_model)
    with pytest.raises(ConfigError, match="alone=True"):
        replay(make, [toy_stream()], [toy_stream()], record=0, alone=True)


def test_replay_refuses_a_learner_without_privacy(toy_stream, toy_model):
    make = maker(toy_stream(), Naive(), toy_model)

    def bare(number):
        made = make(number)
        made.privacy = None
        return made

    with pytest.raises(ConfigError, match="only a private run can be replayed"):
        replay(bare, [toy_stream()], record=0)


def test_without_record_removes_one_record_and_keeps_sizes(toy_stream):
    stream = toy_stream()
    record = int(stream[1].train.ids[0])
    fewer = without_record(stream, record)
    assert [len(e.train) for e in fewer] == [24, 23]
    assert [e.train.declared_size for e in fewer] == [24, 24]


def test_replay_compares_the_outputs_that_the_user_names(toy_stream, toy_model):
    make = maker(toy_stream(), Naive(), toy_model)
    found = replay(
        make,
        [toy_stream()],
        record=0,
        outputs=lambda learner: {"records": len(learner.stream[0].train), "seed": learner.seed},
    )
    assert found.unexplained == ("output records",) and not found.holds


def test_replay_reports_an_error_that_depends_on_a_record(toy_stream, toy_model):
    """The error comes before any charge, because the neighbour lies outside its declared domain."""

    def declared(high):
        stream = toy_stream()
        domain = InputDomain(shape=stream.input_shape, range=(0.0, high))
        parts = [replace(e, train=replace(e.train, domain=domain)) for e in stream]
        return replace(stream, experiences=tuple(parts))

    make = maker(toy_stream(), Naive(), toy_model)
    found = replay(make, [declared(1.0)], [declared(0.1)], record=0)
    assert found.unexplained[0].startswith("an error: ") and not found.holds


def test_replay_compares_the_messages_of_a_federation(toy_stream, toy_model, monkeypatch):
    """A client that reports its real size is found by its reply."""
    parts = experiment(toy_stream(), "naive", "flat", "federated", toy_model)
    realised = property(lambda plan: lambda index: len(plan.stream[index].train))
    monkeypatch.setattr("perdure.planning.training_plan.TrainingPlan.declared_pool_size", realised)
    assert isinstance(parts["federation"], Federation)
    record = int(parts["streams"][0][0].train.ids[0])
    found = replay(**parts, record=record)
    assert any("metrics.num-examples" in name for name in found.unexplained)


def test_a_repeated_replay_gives_the_result_of_the_first(toy_stream, toy_model):
    parts = experiment(toy_stream(), "ewc", "flat", "alone", toy_model)
    assert replay(**parts, record=3) == replay(**parts, record=3)
    assert torch.get_num_threads() == 1
