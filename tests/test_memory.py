from itertools import count, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.errors import ConfigError
from perdure.memory import Memory, MemoryPlan, balanced, concatenate, reservoir
from perdure.records import Batch


def rows(labels, task=0, first_id=0, stored=None):
    n = len(labels)
    ids = first_id + torch.arange(n)
    return Batch(
        inputs=ids[:, None].float(), labels=torch.tensor(labels), ids=ids, tasks=torch.full((n,), task),
        from_memory=torch.zeros(n, dtype=torch.bool), valid=torch.ones(n, dtype=torch.bool), stored=stored or {},
    )  # fmt: skip


def place(seed=0):
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------- reservoir

PIECES, CAPACITY, TRIALS = (13, 7, 20), 10, 3000


def unevenness(keep):
    """Sum of squared standard scores of how often each of 40 records was kept; about 40 when all are alike.

    40 / 39 of it follows chi-squared with 39 degrees of freedom: it leaves (18, 70) with probability 0.004.
    """
    counts = torch.zeros(sum(PIECES), dtype=torch.float64)
    for trial in range(TRIALS):
        kept = keep(place(trial))
        assert len(set(kept)) == len(kept) == CAPACITY
        counts[kept] += 1
    share = CAPACITY / sum(PIECES)
    return float(((counts - TRIALS * share).square() / (TRIALS * share * (1 - share))).sum())


def through_a_reservoir(generator, counted=True):
    kept, offered = [], 0
    for piece in PIECES:
        places = reservoir(len(kept), offered if counted else len(kept), piece, CAPACITY, generator)
        kept = [(kept + list(range(offered, offered + piece)))[i] for i in places.tolist()]
        offered += piece
    return kept


@pytest.mark.statistical
def test_a_reservoir_keeps_every_record_with_the_same_probability():
    assert 18 < unevenness(through_a_reservoir) < 70
    # a reservoir that forgets how many it was offered favours the last ones, and the test sees it
    assert unevenness(lambda generator: through_a_reservoir(generator, counted=False)) > 200
    # and so is one that keeps too regularly: each record exactly a quarter of the time
    turns = count()
    assert unevenness(lambda _: torch.arange(10).add(10 * (next(turns) % 4)).tolist()) < 18


def test_a_memory_that_is_not_full_keeps_everything():
    memory, plan = Memory(), MemoryPlan(capacity=10, selection="reservoir")
    memory.offer(rows([0, 1, 0]), plan, place())
    memory.offer(rows([2, 2], task=1, first_id=50), plan, place(1))
    assert memory.rows.ids.tolist() == [0, 1, 2, 50, 51] and memory.offered == 5
    memory.offer(rows([3] * 30, task=2, first_id=90), plan, place(2))
    assert len(memory) == 10 and memory.offered == 35


def test_what_is_kept_does_not_hold_on_to_the_rest():
    source = rows([0] * 8)
    memory = Memory()
    memory.offer(source, MemoryPlan(capacity=2, selection="reservoir"), place())
    kept = memory.rows.inputs.clone()
    source.inputs.zero_()
    assert torch.equal(memory.rows.inputs, kept) and memory.rows.inputs.untyped_storage().nbytes() == 2 * 4


# --------------------------------------------------------------------------- class-balanced


@pytest.mark.property
@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=40),
    st.integers(1, 25),
    st.none() | st.integers(1, 4),
)
def test_every_group_keeps_its_first_rows_up_to_its_share(groups, capacity, per_class):
    kept = balanced(torch.tensor(groups, dtype=torch.int64).reshape(-1, 2), capacity, per_class).tolist()
    names = sorted(set(groups))
    shares = [capacity // len(names) + (i < capacity % len(names)) for i in range(len(names))]
    for name, share in zip(names, shares, strict=True):
        places = [i for i, group in enumerate(groups) if group == name]
        assert [i for i in kept if groups[i] == name] == places[: per_class or share]
    assert kept == sorted(kept) and (per_class or len(kept) <= capacity)


@pytest.mark.property
@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 12))
def test_no_share_grows_when_groups_are_added(capacity, groups):
    def shares(n):
        kept = balanced(torch.arange(n).repeat_interleave(capacity)[:, None], capacity, None)
        return torch.bincount(kept // capacity, minlength=n)

    before, after = shares(groups), shares(groups + 1)
    assert before.sum() == after.sum() == capacity and bool((after[:-1] <= before).all())


def test_quotas_shrink_as_experiences_arrive():
    memory, plan = Memory(), MemoryPlan(capacity=12)
    for task in range(3):
        memory.offer(rows([2 * task, 2 * task + 1] * 10, task=task, first_id=100 * task), plan, place(task))
        assert len(memory) == 12
        assert torch.bincount(memory.rows.labels).tolist() == [12 // (2 * task + 2)] * (2 * task + 2)
    fixed = Memory()
    for task in range(2):
        fixed.offer(rows([0, 1] * 10, task=task), MemoryPlan(capacity=1, per_class=4), place())
    assert torch.bincount(fixed.rows.tasks * 2 + fixed.rows.labels).tolist() == [4, 4, 4, 4]


@pytest.mark.statistical
def test_a_quota_is_filled_at_random():
    """500 choices of 2 of 8, thinned from 4: each kept 125 times, within 5 standard deviations (1e-6 each)."""
    counts = torch.zeros(8)
    for trial in range(500):
        memory = Memory()
        memory.offer(rows([0] * 8), MemoryPlan(capacity=4), place(trial))
        memory.offer(rows([1] * 8, task=1, first_id=100), MemoryPlan(capacity=4), place(trial + 10_000))
        counts[memory.rows.ids[memory.rows.labels == 0]] += 1
    assert counts.sum() == 1000 and (counts - 125).abs().max() < 5 * (500 * 0.25 * 0.75) ** 0.5


# --------------------------------------------------------------------------- by coin

tags = st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=30)


@pytest.mark.property
@settings(deadline=None)
@given(tags, st.lists(st.floats(0, 1), min_size=1, max_size=4), st.data())
def test_membership_by_coin_is_monotone_and_each_record_s_own(coins, thresholds, data):
    def kept(members):
        memory = Memory()
        batch, own = rows([0] * len(coins)), torch.tensor(coins, dtype=torch.float64)
        memory.offer_by_coin(batch.take(members), own[members], thresholds[0])
        history = [set(memory.rows.ids.tolist())]
        for later in sorted(thresholds[1:], reverse=True):
            memory.offer_by_coin(rows([]), torch.empty(0, dtype=torch.float64), min(later, thresholds[0]))
            history.append(set(memory.rows.ids.tolist()))
        assert len(memory.tags) == len(memory)
        return history

    everyone = torch.arange(len(coins))
    history = kept(everyone)
    assert history[0] == {i for i, coin in enumerate(coins) if coin < thresholds[0]}
    assert all(later <= earlier for earlier, later in pairwise(history))
    dropped = data.draw(st.integers(0, len(coins) - 1))
    without = kept(everyone[everyone != dropped])
    assert without == [moment - {dropped} for moment in history]


# --------------------------------------------------------------------------- rows and plans


def test_concatenation_keeps_order_and_what_is_stored():
    first, second = (rows([0, 1], stored={"logits": torch.full((2, 3), float(k))}) for k in range(2))
    both = concatenate([first, second])
    assert both.labels.tolist() == [0, 1, 0, 1] and both.stored["logits"][:, 0].tolist() == [0.0, 0.0, 1.0, 1.0]
    assert concatenate([first]) is first


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"capacity": 0}, "memory capacity = 0"),
        ({"capacity": 5, "selection": "best"}, "memory selection = 'best'"),
        ({"capacity": 5, "per_class": 0}, "memory per_class = 0"),
        ({"capacity": 5, "batch_size": -1}, "memory batch_size = -1"),
    ],
)
def test_a_plan_that_is_none_is_refused(options, field):
    with pytest.raises(ConfigError, match=field):
        MemoryPlan(**options)
