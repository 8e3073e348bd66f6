from functools import partial

import pytest
import torch
import torch.nn.functional as F

from perdure.contract.context import contexts
from perdure.contract.forward import Forward
from perdure.contract.plan import MemoryPlan, Plan
from perdure.contract.state import State
from perdure.data.records import Batch
from perdure.data.scenarios import split
from perdure.errors import ConfigError
from perdure.learner.learner import Learner
from perdure.privacy.settings import Privacy
from perdure.strategies import GDumb

EITHER = pytest.mark.parametrize(
    "privacy", [None, Privacy(noise_multiplier=1.0, seed=0)], ids=["plain", "private"]
)


@pytest.fixture
def four(toy_data):
    """Return a stream of four experiences with 12 records of one class each."""
    return split(toy_data, scenario="class", experiences=4)


def learner_of(model, **changes):
    options = {
        "optimizer": partial(torch.optim.Adam, lr=0.02),
        "iterations": 4,
        "batch_size": 4,
    } | changes
    return Learner(model=model, strategy=GDumb(memory_size=12), **options)


@EITHER
def test_gdumb_batches_contain_only_memory_rows(four, toy_model, privacy):
    found = []

    def look(point, learner):
        if point == "step.sampled":
            held = learner.session.held
            rows = held.memory.rows
            found.append((learner.position.experience, set(held.rows.ids.tolist()), rows))

    learner_of(toy_model(four), privacy=privacy, callbacks=[look]).fit(four)
    assert [index for index, _, _ in found] == [k for k in range(4) for _ in range(4)]
    for index, pooled, rows in found:
        assert pooled == set(rows.ids.tolist()) and set(rows.tasks.tolist()) == set(
            range(index + 1)
        )
        if not privacy:
            assert torch.bincount(rows.labels).tolist() == [12 // (index + 1)] * (index + 1)


@EITHER
def test_gdumb_offers_every_experience_to_memory_once(four, toy_model, privacy):
    offered = []

    def look(point, learner):
        if point in ("experience.begin", "experience.consolidated"):
            memory = learner.session.held.memory
            offered.append((memory.offered, memory.latest))

    learner_of(toy_model(four), privacy=privacy, callbacks=[look]).fit(four)
    assert offered == [(12 * (k + 1), k) for k in range(4) for _ in "ab"]


@EITHER
def test_gdumb_trains_from_the_initial_parameters(four, toy_model, privacy):
    starts = []
    model = toy_model(four)
    initial = {name: value.clone() for name, value in model.state_dict().items()}

    def look(point, learner):
        if point == "experience.begin":
            moments = len(learner.current_optimizer.state)
            starts.append(
                (
                    moments,
                    {name: value.clone() for name, value in learner.model.state_dict().items()},
                )
            )

    learner_of(model, privacy=privacy, callbacks=[look]).fit(four)
    for moments, start in starts:
        assert moments == 0 and all(
            torch.equal(start[name], value) for name, value in initial.items()
        )
    assert any(not torch.equal(initial[name], value) for name, value in model.state_dict().items())


@EITHER
def test_a_resumed_gdumb_run_offers_no_record_twice(four, toy_model, tmp_path, privacy):
    class Stopped(BaseException):
        pass

    def look(point, learner):
        if point == "step.done" and (learner.position.experience, learner.position.step) == (2, 3):
            raise Stopped

    options = {"privacy": privacy, "blocks": 2}
    whole = learner_of(toy_model(four), folder=tmp_path / "whole", **options)
    whole.fit(four)
    with pytest.raises(Stopped):
        learner_of(toy_model(four), folder=tmp_path / "cut", callbacks=[look], **options).fit(four)
    again = learner_of(toy_model(four), folder=tmp_path / "cut", **options)
    again.fit(four)
    mine = again.snapshot()
    theirs = whole.snapshot()
    assert mine.facts == theirs.facts
    assert [
        name for name, value in mine.tensors.items() if not torch.equal(value, theirs.tensors[name])
    ] == []
    assert [
        name for name, value in mine.private.items() if not torch.equal(value, theirs.private[name])
    ] == []


def test_the_gdumb_loss_is_plain_cross_entropy(four, toy_model):
    model = toy_model(four)
    at = contexts(four, "cpu")(1)
    batch = Batch.current(four[1].train, 1)
    losses = GDumb(memory_size=4).losses(Forward(model), batch, at, State())
    torch.testing.assert_close(
        losses, F.cross_entropy(model(batch.inputs)[:, :2], batch.labels, reduction="none")
    )


def test_private_gdumb_charges_records_at_the_memory_rate(four, toy_model):
    learner = learner_of(toy_model(four), privacy=Privacy(noise_multiplier=1.0, seed=0))
    learner.fit(four)
    assert [entry.scope for entry in learner.private_sum.ledger.entries] == [
        {f"experience-{k}": 4 / 12 for k in range(index + 1)} for index in range(4)
    ]


def test_gdumb_plans_a_restart_and_training_on_memory(four):
    assert GDumb(memory_size=9).plan(four[1]) == Plan(
        pool="memory", restart=True, memory=MemoryPlan(capacity=9)
    )
    assert (
        GDumb(memory_size="0.36 kB").plan(four[1]).memory.capacity == 10
        and GDumb.privacy_cost.reuses_past_records
    )


@pytest.mark.parametrize(
    ("size", "message"),
    [(0, "memory_size = 0"), ("2 TB", r"memory_size = '2 TB' is not allowed.*'1 GB'")],
)
def test_gdumb_refuses_invalid_options(four, size, message):
    with pytest.raises(ConfigError, match=message):
        GDumb(memory_size=size).plan(four[0])
