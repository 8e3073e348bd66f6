"""Held records of one party: memory updated every step, values stored beside rows, and memory
pools.
"""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import nn

from helpers.reference_gradients import opened
from perdure.contract.plan import MemoryPlan, Plan
from perdure.contract.strategy import Strategy
from perdure.curator.remembered_rows import NOTED_ROWS
from perdure.data.scenarios import permuted, split
from perdure.errors import DataError, PrivacyError, StrategyError
from perdure.learner.learner import Learner
from perdure.models.classifier import Classifier
from perdure.planning.exposure import exposure
from perdure.privacy.settings import Privacy
from perdure.strategies import DER, ERACE, GDumb, Joint, Naive, Replay
from perdure.utils.modules import untouched

PRIVATE = Privacy(noise_multiplier=1.0, seed=0)
EITHER = pytest.mark.parametrize("privacy", [None, PRIVATE], ids=["plain", "private"])


def learner_of(model, strategy, **changes):
    options = {
        "optimizer": partial(torch.optim.SGD, lr=0.5),
        "iterations": 6,
        "batch_size": 8,
    } | changes
    return Learner(model=model, strategy=strategy, **options)


@dataclass(frozen=True, kw_only=True)
class Given(Strategy):
    """Plain training with a plan that the test gives."""

    given: Plan

    def plan(self, experience):
        return self.given


def given(**options):
    pool = options.pop("pool", "experience")
    return Given(given=Plan(pool=pool, memory=MemoryPlan(**{"capacity": 12} | options)))


# --------------------------------------------------------------------------- every step


def test_step_memory_returns_only_rows_of_earlier_steps(toy_stream, toy_model):
    """This holds in the first experience too, where the first step has no stored rows."""
    offered = []
    stream = toy_stream()
    learner = opened(
        learner_of(toy_model(stream), given(selection="reservoir", update="step")), stream
    )
    for step in range(4):
        batch = learner.session.held.sample(step)
        new = batch.take(~batch.from_memory)
        assert len(new) == 8 and int(batch.from_memory.sum()) == (8 if offered else 0)
        assert learner.curator.context.memory_share == (0.5 if offered else 0.0)
        assert set(batch.ids[batch.from_memory].tolist()) <= set(offered)
        learner.session.held.observe(batch, lambda forward, rows: {})
        offered += new.ids.tolist()
        memory = learner.session.held.memory
        assert memory.offered == len(offered) and len(memory) == min(12, len(offered))
        assert set(memory.rows.ids.tolist()) <= set(offered) and not memory.rows.from_memory.any()


def test_step_memory_gets_no_row_twice_at_the_experience_end(toy_stream, toy_model):
    stream = toy_stream()
    learner = opened(
        learner_of(toy_model(stream), given(selection="reservoir", update="step")), stream
    )
    learner.train(range(3))
    before = learner.session.held.memory.rows
    learner.finish()
    memory = learner.session.held.memory
    assert memory.rows is before and memory.offered == 24 and memory.latest == 0


@pytest.mark.statistical
def test_step_memory_is_a_uniform_sample_of_all_records(toy_stream, toy_model):
    """400 seeds keep 12 of 48 records; each count lies within 4.5 standard deviations of a quarter
    (48 x 7e-6: 3e-4).
    """
    stream = toy_stream()
    counts = torch.zeros(48)
    model = toy_model(stream)
    trials = 400
    for seed in range(trials):
        learner = learner_of(model, given(selection="reservoir", update="step"), seed=seed)
        learner.prepare(stream)
        for index in range(2):
            learner.begin(index)
            for step in range(3):  # an epoch
                learner.session.held.observe(
                    learner.session.held.sample(step), lambda forward, rows: {}
                )
            learner.session.held.store(lambda forward, rows: {})
        counts[learner.session.held.memory.rows.ids] += 1
    spread = (trials * 0.25 * 0.75) ** 0.5
    assert counts.sum() == 12 * trials and float((counts - trials / 4).abs().max()) < 4.5 * spread
    # labels 0, 1 came before 2, 3
    halves = counts.view(-1, 4)[:, :2].sum(), counts.view(-1, 4)[:, 2:].sum()
    assert abs(float(halves[0] - halves[1])) < 4.5 * 2 * (24 * trials * 0.25 * 0.75) ** 0.5


class Stopped(BaseException):
    """An exception in place of the end of the process."""


def run(stream, model, strategy, folder, stops=(), **changes):
    """Run, stop after the given (experience, step) pairs, resume each time, and return the last
    learner.
    """
    for stop in [*stops, None]:

        def look(point, learner, stop=stop):
            if (
                point == "step.done"
                and (learner.position.experience, learner.position.step) == stop
            ):
                raise Stopped

        learner = learner_of(
            model(stream), strategy, folder=folder, blocks=3, callbacks=[look], **changes
        )
        try:
            learner.fit(stream)
        except Stopped:
            assert stop
    return learner


@EITHER
@pytest.mark.parametrize(
    "strategy",
    [
        DER(memory_size=10, beta=0.5),
        ERACE(memory_size=10),
        Replay(memory_size=10, selection="ring", update="step"),
    ],
    ids=lambda strategy: strategy.name,
)
def test_a_resumed_run_has_the_same_step_memory_bit_for_bit(
    toy_stream, toy_model, tmp_path, strategy, privacy
):
    ends = [
        run(toy_stream(), toy_model, strategy, tmp_path / name, stops, privacy=privacy).snapshot()
        for name, stops in (("whole", ()), ("stopped", ((0, 3), (0, 5), (1, 1), (1, 4))))
    ]
    assert ends[0].facts == ends[1].facts
    for mine, theirs in zip(
        (ends[0].tensors, ends[0].private), (ends[1].tensors, ends[1].private), strict=True
    ):
        assert mine.keys() == theirs.keys()
        assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert "memory.ids" in ends[0].private


# ---------------------------------------------------------------------- what is stored beside a row


def peeking(forward, batch):
    """Return each row's mean logit minus the mean of all rows, so that rows depend on each
    other.
    """
    logits = forward(batch.inputs)
    return {
        "seen": logits.mean(1) - logits.mean(),
        "rows": torch.full((len(batch),), float(len(batch))),
    }


@pytest.mark.parametrize("update", ["experience", "step"])
def test_remember_is_called_on_single_rows_under_privacy(toy_stream, toy_model, update):
    stream = toy_stream()
    learner = learner_of(
        toy_model(stream), given(selection="reservoir", update=update), privacy=PRIVATE
    )
    opened(learner, stream)
    learner.session.held.reserve(range(2), "start")
    for step in range(2):
        batch = learner.session.held.sample(step)
        if update == "step":
            learner.session.held.observe(batch, peeking)
    learner.session.held.store(peeking)
    stored = learner.session.held.memory.rows.stored
    assert len(stored["rows"]) > 4 and bool((stored["rows"] == 1).all())
    torch.testing.assert_close(stored["seen"], torch.zeros_like(stored["seen"]), atol=1e-6, rtol=0)


def test_remember_gets_all_rows_of_the_step_without_privacy(toy_stream, toy_model):
    stream = toy_stream()
    learner = opened(
        learner_of(toy_model(stream), given(selection="reservoir", update="step")), stream
    )
    learner.session.held.observe(learner.session.held.sample(0), peeking)
    assert bool((learner.session.held.memory.rows.stored["rows"] == 8).all())


@pytest.mark.parametrize("update", ["experience", "step"])
def test_privacy_refuses_a_remember_hook_that_couples_rows(toy_stream, toy_model, update):
    stream = toy_stream()
    learner = learner_of(
        toy_model(stream), given(selection="reservoir", update=update), privacy=PRIVATE
    )
    held = opened(learner, stream).session.held
    held.reserve(range(1), "start")
    batch = held.sample(0)

    def at_random(forward, batch):
        return {"noise": torch.rand_like(batch.inputs)}

    ask = partial(held.observe, batch) if update == "step" else held.store
    with pytest.raises(PrivacyError, match=r"may not draw random numbers .*\(vmap: "):
        ask(at_random)


def test_private_memory_stores_values_of_the_last_step_of_a_row(toy_stream, toy_model):
    """Records that were in no step get the values at the end of the experience."""
    stream = toy_stream()
    moment = [0.0]

    def remember(forward, batch):
        return {"when": torch.full((len(batch),), moment[0])}

    learner = learner_of(
        toy_model(stream),
        given(capacity=1000, selection="reservoir", update="step"),
        privacy=PRIVATE,
    )
    held = opened(learner, stream).session.held
    held.reserve(range(5), "start")
    last = {}
    for step in range(5):
        moment[0] = step + 1.0
        batch = held.sample(step)
        held.observe(batch, lambda forward, rows: {"at": remember(forward, rows)["when"]})
        last |= dict.fromkeys(batch.ids.tolist(), moment[0])
    moment[0] = 9.0
    held.store(lambda forward, rows: {"at": remember(forward, rows)["when"]})
    rows = held.memory.rows
    expected = [last.get(i, 9.0) for i in rows.ids.tolist()]
    assert rows.stored["at"].tolist() == expected and len(rows) == 24
    assert set(expected) >= {9.0, 5.0} and len(set(expected)) > 3


def test_rows_drawn_from_memory_are_not_offered_to_memory_again(toy_stream, toy_model):
    """Rows drawn from memory are not offered again; only new rows are marked as drawn."""
    stream = toy_stream()
    learner = learner_of(
        toy_model(stream),
        given(capacity=1000, selection="reservoir", update="step"),
        privacy=PRIVATE,
    )
    held = opened(learner, stream, index=1).session.held
    held.reserve(range(4), "start")
    kept = held.memory.rows.ids.tolist()
    for step in range(4):
        held.observe(held.sample(step), lambda forward, rows: {})
    drawn = held.snapshot()[0][f"noted.{NOTED_ROWS}"]
    assert len(drawn) == 24 and 0 < int(drawn.sum()) < 24
    held.store(lambda forward, rows: {})
    ids = held.memory.rows.ids.tolist()
    assert ids == kept + stream[1].train.ids.tolist() and held.memory.offered == 48


def test_the_remember_hook_does_not_change_running_statistics(toy_stream):
    stream = toy_stream()
    model = Classifier(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)), 6, 4)
    learner = opened(learner_of(model, DER(memory_size=8)), stream)
    model.train()
    batch = learner.session.held.sample(0)
    model(batch.inputs)
    before = {name: value.clone() for name, value in model.named_buffers()}
    learner.session.held.observe(batch, lambda forward, rows: {"logits": forward(rows.inputs)})
    assert (
        all(torch.equal(value, before[name]) for name, value in model.named_buffers())
        and model.training
    )
    logits = learner.session.held.memory.rows.stored["logits"]
    with untouched(model):
        # in training mode, as the loss saw them
        torch.testing.assert_close(logits, model(batch.inputs).detach())


# --------------------------------------------------------------------------- a pool of memory


@pytest.fixture
def four(toy_data):
    """Return a stream of four experiences with 12 records of one class each."""
    return split(toy_data, scenario="class", experiences=4)


def test_a_memory_pool_declares_its_size_and_partitions(four):
    sizes = (100, 300, 600, 12)
    stages = [
        replace(e, train=replace(e.train, declared_size=n))
        for e, n in zip(four, sizes, strict=True)
    ]
    plan = Plan(pool="memory", memory=MemoryPlan(capacity=200))
    for seen, size in ((1, 100), (2, 200), (3, 200)):
        found = exposure(stages[:seen], plan, batch_size=20)
        assert found.pool_size == size and found.rate == 20 / size
        assert found.scope == {f"experience-{k}": 20 / size for k in range(seen)}
    found = exposure(stages[:3], plan, batch_size=20, excluded={"experience-1"})
    assert found.pool_size == 200 * 700 / 1000 and found.scope.keys() == {
        "experience-0",
        "experience-2",
    }


def test_the_number_of_steps_depends_on_the_memory_size(four, toy_model):
    """3 epochs of 12, 16, 16 and 16 stored records, with 4 records per step."""
    learner = learner_of(
        toy_model(four), GDumb(memory_size=16), epochs=3, iterations=None, batch_size=4
    )
    learner.prepare(four)
    assert [learner.training.steps(index) for index in range(4)] == [9, 12, 12, 12]
    naive = learner_of(toy_model(four), Naive(), epochs=3, iterations=None)
    naive.prepare(four)
    assert naive.training.steps_of(four.experiences[:1]) == 5


@EITHER
def test_a_memory_pool_holds_only_stored_records(four, toy_model, privacy):
    learner = learner_of(toy_model(four), GDumb(memory_size=16), privacy=privacy)
    opened(learner, four, index=2)
    pooled = learner.session.held.rows
    stored = learner.session.held.memory.rows
    assert set(pooled.ids.tolist()) == set(stored.ids.tolist()) and set(stored.tasks.tolist()) == {
        0,
        1,
        2,
    }
    assert learner.session.held.memory.latest == 2 and learner.session.held.memory.offered == 36
    learner.begin(2)  # as after a stop: it is not offered again
    assert learner.session.held.memory.offered == 36
    assert torch.equal(learner.session.held.memory.rows.ids, stored.ids)
    if privacy:
        learner.session.held.reserve(range(6), "start")
    for step in range(6):
        batch = learner.session.held.sample(step)
        assert set(batch.ids.tolist()) <= set(stored.ids.tolist())
    learner.session.held.store(lambda forward, rows: {})
    assert learner.session.held.memory.offered == 36


def test_pooled_memory_shuffles_stored_rows_with_new_rows(toy_stream, toy_model):
    """One epoch of the pool contains each of the 24 new and 12 stored rows once; the context has no
    memory share.
    """
    stream = toy_stream()
    learner = opened(learner_of(toy_model(stream), given(use="pooled")), stream, index=1)
    batches = [learner.session.held.sample(step) for step in range(5)]
    assert [len(batch) for batch in batches] == [
        8,
        8,
        8,
        8,
        4,
    ] and learner.curator.context.memory_share == 0
    ids = torch.cat([batch.ids for batch in batches])
    stored = torch.cat([batch.from_memory for batch in batches])
    held = learner.session.held.memory.rows.ids.tolist()
    assert sorted(ids.tolist()) == sorted(stream[1].train.ids.tolist() + held)
    assert sorted(ids[stored].tolist()) == sorted(held)
    assert len({int(batch.from_memory.sum()) for batch in batches}) > 1
    again = learner.session.held.sample(5)
    assert not torch.equal(again.ids, batches[0].ids)


@pytest.mark.parametrize("pool", ["all", "memory"])
def test_step_memory_needs_the_plan_setting_pool_experience(toy_stream, toy_model, pool):
    stream = toy_stream()
    learner = learner_of(toy_model(stream), given(pool=pool, selection="reservoir", update="step"))
    with pytest.raises(StrategyError, match=f"needs pool='experience'; given pool='{pool}'"):
        opened(learner, stream)


def test_opening_an_experience_without_records_is_refused(toy_stream, toy_model):
    stream = toy_stream()
    nobody = replace(
        stream[0], train=replace(stream[0].train.take(torch.arange(0)), declared_size=24)
    )
    stream = replace(stream, experiences=(nobody, stream[1]))
    with pytest.raises(
        DataError, match="experience 0 has no training records; leave it out of the stream"
    ):
        opened(learner_of(toy_model(stream), Replay(memory_size=8)), stream)


def test_a_drawn_stored_copy_does_not_mark_the_new_copy_drawn(toy_data, toy_model):
    """The new and the stored copy are one record; if the stored copy is drawn, the new one is not
    marked.
    """
    stream = permuted(toy_data, experiences=2)
    learner = learner_of(
        toy_model(stream),
        given(capacity=1000, selection="reservoir", update="step"),
        privacy=PRIVATE,
    )
    held = opened(learner, stream, index=1).session.held
    held.reserve(range(6), "start")
    noted = set()
    for step in range(6):
        batch = held.sample(step)
        held.observe(batch, lambda forward, rows: {})
        noted |= set(batch.ids[~batch.from_memory].tolist())
    mask = held.snapshot()[0][f"noted.{NOTED_ROWS}"]
    assert set(stream[1].train.ids[mask].tolist()) == noted and 0 < len(noted) < 48


# --------------------------------------------------------------------------- opened again


@pytest.mark.parametrize(
    ("strategy", "kept"),
    [
        (Naive(), True),
        (Joint(), True),
        (given(), True),
        (given(update="step"), False),
    ],
    ids=["plain", "all records", "memory", "moving memory"],
)
def test_an_experience_opened_again_reuses_its_pool(toy_stream, toy_model, strategy, kept):
    """Every round of a federation opens the experience again."""
    stream = toy_stream()
    learner = opened(learner_of(toy_model(stream), strategy), stream, 1)
    held = learner.session.held
    pool = held.pool
    rows = held.sample(0)
    learner.begin(1)
    assert (held.pool is pool) == kept
    assert held.step == -1
    again = held.sample(0)
    for name, value in rows.tensors().items():
        assert torch.equal(value, again.tensors()[name]), name


def test_restoring_a_snapshot_builds_a_new_pool(toy_stream, toy_model):
    stream = toy_stream()
    learner = opened(learner_of(toy_model(stream), given()), stream, 1)
    snapshot = learner.snapshot()
    pool = learner.session.held.pool
    learner.restore(snapshot)
    learner.begin(1)
    assert learner.session.held.pool is not pool
