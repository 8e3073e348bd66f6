"""Sums over memory: values, charges to all earlier partitions, and refusals for shared records."""

from dataclasses import replace

import pytest
import torch

from helpers.reference_gradients import PRIVATE, learner_of, opened
from perdure.errors import PrivacyError
from perdure.planning.budget import charges, planned
from perdure.privacy.accounting.charges import Charge, merged
from perdure.strategies import ICaRL, Replay

# --------------------------------------------------------------------------- sums over memory


def ones(forward, batch):
    return torch.ones(len(batch), 1)


def test_a_memory_release_sums_the_stored_rows(four, toy_model):
    learner = opened(learner_of(toy_model(four), Replay(memory_size=8), privacy=None), four, 1)
    rows = learner.session.held.memory.rows
    total = learner.curator.release(
        lambda forward, batch: batch.inputs, clip_norm=1.0, purpose="x", over="memory"
    )
    torch.testing.assert_close(total["value"], rows.inputs.sum(0))
    own = learner.curator.release(ones, clip_norm=1.0, purpose="n")
    assert len(rows) == 8 and float(own["value"]) == 12


def test_a_private_memory_sum_charges_all_earlier_partitions(four, toy_model, meetings):
    learner = opened(learner_of(toy_model(four), Replay(memory_size=24)), four, 2)
    rows = learner.session.held.memory.rows
    learner.curator.release(ones, clip_norm=0.5, purpose="x", over="memory")
    entry = learner.private_sum.ledger.entries[-1]
    assert entry.scope == {f"experience-{k}": 1.0 for k in range(3)}
    assert (entry.purpose, entry.steps, entry.clip_norm) == ("release:x", 1, 0.5)
    assert (
        float(meetings.exact("release:x")[-1]) == pytest.approx(0.5 * len(rows)) and len(rows) > 4
    )


def test_a_changed_memory_gives_a_new_ledger_entry(four, toy_model, meetings):
    """This also holds if the sum happens to be the same."""
    learner = opened(learner_of(toy_model(four), Replay(memory_size=24)), four, 1)
    held = learner.session.held
    scope = []
    for shift in (0.0, 0.0, 1e-3):
        learner.begin(1)
        held.memory.rows = replace(held.memory.rows, inputs=held.memory.rows.inputs + shift)
        learner.curator.release(ones, clip_norm=1.0, purpose="x", over="memory")
        scope.append(len(learner.private_sum.ledger.entries))
    assert scope[1] == scope[0] and scope[2] == scope[0] + 1 and meetings.reused == 0


def test_memory_releases_are_planned_for_all_earlier_partitions(four, toy_model):
    learner = learner_of(toy_model(four), ICaRL(memory_size=12))
    learner.prepare(four)
    assert charges(learner.training, four.experiences[:3], 1.0) == {
        f"experience-{k}": [
            Charge(4 / 24, 1.0, 4, "grid-gaussian"),
            Charge(1.0, 4.0, 1, "grid-gaussian"),
        ]
        for k in range(3)
    }
    out = charges(learner.training, four.experiences[:3], 1.0, frozenset({"experience-1"}))
    assert out.keys() == {"experience-0", "experience-2"}
    learner.fit(four)
    for partition, plan in planned(learner.training, learner.private_sum.schedule).items():
        assert merged(learner.private_sum.ledger.charges(partition)) == merged(plan)
        assert sum(c.steps for c in plan if c.sampling_rate == 1.0) == 4 - int(partition[-1])


@pytest.mark.deep(reason="full replay: calibrates and trains under a cap")
def test_excluded_partitions_are_not_in_memory_releases(four, toy_model, meetings):
    privacy = replace(PRIVATE, epsilon=6, delta=1e-5)
    learner = learner_of(toy_model(four), ICaRL(memory_size=12), privacy=privacy)
    learner.fit(four)
    left = learner.private_sum.schedule.excluded
    assert any(left)
    sums = [
        entry
        for entry in learner.private_sum.ledger.entries
        if entry.purpose == "release:class means"
    ]
    assert [entry.scope.keys() for entry in sums] == [
        {f"experience-{k}" for k in range(i + 1)} - left[i] for i in range(4)
    ]
    for i, exact in enumerate(meetings.exact("release:class means")):
        sums = torch.as_tensor(exact).view(4, -1)  # of the classes, one an experience
        assert not any(bool(sums[int(name[-1])].any()) for name in left[i])
        assert bool(sums[i].any())
    assert learner.private_sum.ledger.epsilon(delta=1e-5) <= 6


def test_a_private_memory_sum_of_shared_records_is_refused(copies, toy_model):
    learner = opened(learner_of(toy_model(copies), Replay(memory_size=24)), copies, 0)
    # there is one experience so far
    learner.curator.release(ones, clip_norm=1.0, purpose="x", over="memory")
    learner = opened(learner_of(toy_model(copies), Replay(memory_size=24)), copies, 1)
    entries = len(learner.private_sum.ledger.entries)
    with pytest.raises(
        PrivacyError,
        match="experiences share records, so a sum over memory would count one record tw",
    ):
        learner.curator.release(ones, clip_norm=1.0, purpose="x", over="memory")
    assert len(learner.private_sum.ledger.entries) == entries
    plain = opened(learner_of(toy_model(copies), Replay(memory_size=24), privacy=None), copies, 1)
    assert (
        float(plain.curator.release(ones, clip_norm=1.0, purpose="x", over="memory")["value"]) == 24
    )
