"""Selection of the rows of a memory: reservoir, quotas, coins, ring and herding."""

from itertools import count, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.memory_rows import place, rows
from perdure.contract.plan import MemoryPlan
from perdure.curator.memory import (
    Memory,
    balanced,
    concatenate,
    groups_of,
    herd,
    herded,
    quota,
    reservoir,
)
from perdure.errors import ConfigError
from perdure.tasks import SingleLabel

# --------------------------------------------------------------------------- reservoir

PIECES = (13, 7, 20)
CAPACITY = 10
TRIALS = 3000


def unevenness(keep):
    """Sum of squared standard scores of how often each of 40 records was kept; about 40 when all
    are alike.

    40 / 39 of it follows chi-squared with 39 degrees of freedom: it leaves (18, 70) with
    probability 0.004.
    """
    counts = torch.zeros(sum(PIECES), dtype=torch.float64)
    for trial in range(TRIALS):
        kept = keep(place(trial))
        assert len(set(kept)) == len(kept) == CAPACITY
        counts[kept] += 1
    share = CAPACITY / sum(PIECES)
    return float(((counts - TRIALS * share).square() / (TRIALS * share * (1 - share))).sum())


def through_a_reservoir(generator, counted=True):
    kept = []
    offered = 0
    for piece in PIECES:
        places = reservoir(len(kept), offered if counted else len(kept), piece, CAPACITY, generator)
        kept = [(kept + list(range(offered, offered + piece)))[i] for i in places.tolist()]
        offered += piece
    return kept


@pytest.mark.statistical
def test_a_reservoir_keeps_records_with_equal_probability():
    assert 18 < unevenness(through_a_reservoir) < 70
    # a reservoir that forgets how many it was offered favours the last ones, and the test sees it
    assert unevenness(lambda generator: through_a_reservoir(generator, counted=False)) > 200
    # and so is one that keeps too regularly: each record exactly a quarter of the time
    turns = count()
    assert unevenness(lambda _: torch.arange(10).add(10 * (next(turns) % 4)).tolist()) < 18


def test_a_memory_that_is_not_full_keeps_every_offered_row():
    memory = Memory()
    plan = MemoryPlan(capacity=10, selection="reservoir")
    memory.offer(rows([0, 1, 0]), plan, place())
    memory.offer(rows([2, 2], task=1, first_id=50), plan, place(1))
    assert memory.rows.ids.tolist() == [0, 1, 2, 50, 51] and memory.offered == 5
    memory.offer(rows([3] * 30, task=2, first_id=90), plan, place(2))
    assert len(memory) == 10 and memory.offered == 35


def test_memory_copies_stored_rows_and_frees_the_other_rows():
    source = rows([0] * 8)
    memory = Memory()
    memory.offer(source, MemoryPlan(capacity=2, selection="reservoir"), place())
    kept = memory.rows.inputs.clone()
    source.inputs.zero_()
    assert (
        torch.equal(memory.rows.inputs, kept)
        and memory.rows.inputs.untyped_storage().nbytes() == 2 * 4
    )


# --------------------------------------------------------------------------- class-balanced


@pytest.mark.property
@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=40),
    st.integers(1, 25),
    st.none() | st.integers(1, 4),
)
def test_balanced_selection_keeps_the_first_rows_of_each_group(groups, capacity, per_class):
    kept = balanced(
        torch.tensor(groups, dtype=torch.int64).reshape(-1, 2), capacity, per_class
    ).tolist()
    names = sorted(set(groups))
    shares = [capacity // len(names) + (i < capacity % len(names)) for i in range(len(names))]
    if len(names) > capacity and not per_class:  # a hash says which have their one place
        shares = [int(name in {groups[i] for i in kept}) for name in names]
        assert sum(shares) == capacity
    for name, share in zip(names, shares, strict=True):
        places = [i for i, group in enumerate(groups) if group == name]
        assert [i for i in kept if groups[i] == name] == places[: per_class or share]
    assert kept == sorted(kept) and (per_class or len(kept) <= capacity)


def test_groups_have_equal_chances_if_memory_places_are_few():
    kept = balanced(torch.arange(3000)[:, None], 300, None)
    assert len(kept) == 300
    for third in range(3):
        assert 70 < int(((kept >= 1000 * third) & (kept < 1000 * third + 1000)).sum()) < 130


@pytest.mark.parametrize("selection", ["class-balanced", "ring"])
def test_pieces_of_a_stage_share_the_class_quotas_of_the_stage(selection):
    memory = Memory()
    plan = MemoryPlan(capacity=12, selection=selection)
    stages = torch.arange(60) // 30
    for piece in range(60):
        stage = int(stages[piece])
        new = rows([2 * stage, 2 * stage + 1] * 2, task=piece, first_id=100 * piece)
        memory.offer(new, plan, place(piece), stages=stages[: piece + 1])
    assert torch.bincount(memory.rows.labels).tolist() == [3, 3, 3, 3]


@pytest.mark.property
@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 12))
def test_the_share_of_a_group_never_grows_when_groups_are_added(capacity, groups):
    def shares(n):
        kept = balanced(torch.arange(n).repeat_interleave(capacity)[:, None], capacity, None)
        return torch.bincount(kept // capacity, minlength=n)

    before = shares(groups)
    after = shares(groups + 1)
    assert before.sum() == after.sum() == capacity and bool((after[:-1] <= before).all())


def test_class_quotas_shrink_as_experiences_arrive():
    memory = Memory()
    plan = MemoryPlan(capacity=12)
    for task in range(3):
        memory.offer(
            rows([2 * task, 2 * task + 1] * 10, task=task, first_id=100 * task), plan, place(task)
        )
        assert len(memory) == 12
        assert torch.bincount(memory.rows.labels).tolist() == [12 // (2 * task + 2)] * (
            2 * task + 2
        )
    fixed = Memory()
    for task in range(2):
        fixed.offer(rows([0, 1] * 10, task=task), MemoryPlan(capacity=1, per_class=4), place())
    assert torch.bincount(fixed.rows.tasks * 2 + fixed.rows.labels).tolist() == [4, 4, 4, 4]


@pytest.mark.statistical
def test_a_class_quota_is_filled_uniformly_at_random():
    """500 choices of 2 out of 8 rows in two stages; each is kept 125 times, within 5 standard
    deviations (1e-6 each).
    """
    counts = torch.zeros(8)
    for trial in range(500):
        memory = Memory()
        memory.offer(rows([0] * 8), MemoryPlan(capacity=4), place(trial))
        memory.offer(
            rows([1] * 8, task=1, first_id=100), MemoryPlan(capacity=4), place(trial + 10_000)
        )
        counts[memory.rows.ids[memory.rows.labels == 0]] += 1
    assert counts.sum() == 1000 and (counts - 125).abs().max() < 5 * (500 * 0.25 * 0.75) ** 0.5


# --------------------------------------------------------------------------- by coin

tags = st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=30)


@pytest.mark.property
@settings(deadline=None)
@given(tags, st.lists(st.floats(0, 1), min_size=1, max_size=4), st.data())
def test_private_memory_decides_per_record_and_never_readmits(coins, thresholds, data):
    def kept(members):
        memory = Memory()
        batch = rows([0] * len(coins))
        own = torch.tensor(coins, dtype=torch.float64)
        memory.offer_by_coin(batch.take(members), own[members], thresholds[0])
        history = [set(memory.rows.ids.tolist())]
        for later in sorted(thresholds[1:], reverse=True):
            memory.offer_by_coin(
                rows([]), torch.empty(0, dtype=torch.float64), min(later, thresholds[0])
            )
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


def test_concatenate_keeps_row_order_and_stored_values():
    first, second = (
        rows([0, 1], stored={"logits": torch.full((2, 3), float(k))}) for k in range(2)
    )
    both = concatenate([first, second])
    assert both.labels.tolist() == [0, 1, 0, 1] and both.stored["logits"][:, 0].tolist() == [
        0.0,
        0.0,
        1.0,
        1.0,
    ]
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
def test_the_memory_plan_refuses_an_invalid_option(options, field):
    with pytest.raises(ConfigError, match=field):
        MemoryPlan(**options)


# --------------------------------------------------------------------------- ring


@pytest.mark.property
@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), max_size=8), min_size=1, max_size=6), st.integers(1, 12)
)
def test_a_ring_keeps_the_latest_rows_of_every_class(offers, capacity):
    """The reference is a list of the last rows of each class, up to the quota."""
    memory = Memory()
    seen = {}
    first = 0
    for labels in offers:
        memory.offer(
            rows(labels, first_id=first), MemoryPlan(capacity=capacity, selection="ring"), place()
        )
        for i, label in enumerate(labels):
            seen.setdefault(label, []).append(first + i)
        first += len(labels)
        shares = (
            [capacity // len(seen) + (i < capacity % len(seen)) for i in range(len(seen))]
            if seen
            else []
        )
        if len(seen) > capacity:  # a hash says which have their one place
            shares = [int(label in memory.rows.labels) for label in sorted(seen)]
            assert sum(shares) <= capacity
        for label, share in zip(sorted(seen), shares, strict=True):
            seen[label] = seen[label][-share:] if share else []
            assert sorted(memory.rows.ids[memory.rows.labels == label].tolist()) == seen[label]
    assert memory.offered == first and len(memory) <= capacity


def test_a_ring_with_per_class_keeps_the_latest_per_experience():
    memory = Memory()
    plan = MemoryPlan(capacity=1, selection="ring", per_class=2)
    for start in (0, 3, 6):
        memory.offer(rows([0, 0, 1], first_id=start), plan, place())
    memory.offer(rows([0, 0, 0], task=1, first_id=20), plan, place())
    kept = {(t, y): [] for t, y in ((0, 0), (0, 1), (1, 0))}
    for i, task, label in zip(  # noqa: B905
        *(t.tolist() for t in (memory.rows.ids, memory.rows.tasks, memory.rows.labels))
    ):
        kept[task, label].append(i)
    assert {name: sorted(ids) for name, ids in kept.items()} == {
        (0, 0): [6, 7],
        (0, 1): [5, 8],
        (1, 0): [21, 22],
    }


# --------------------------------------------------------------------------- herding


@pytest.mark.property
@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 999))
def test_herding_picks_the_row_that_brings_the_mean_closest(n, most, seed):
    features = torch.randn(n, 3, generator=place(seed))
    chosen = herded(features, most).tolist()
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    mean = torch.nn.functional.normalize(unit.mean(0), dim=0)
    assert len(chosen) == min(n, most) == len(set(chosen))
    for k in range(1, len(chosen) + 1):
        gaps = {
            i: float((mean - unit[[*chosen[: k - 1], i]].mean(0)).norm())
            for i in set(range(n)) - {*chosen[: k - 1]}
        }
        assert gaps[chosen[k - 1]] <= min(gaps.values()) + 1e-9
    # a shorter list is a prefix
    assert herded(features, max(1, most - 1)).tolist() == chosen[: max(1, most - 1)]


def by_distances(features, most):
    """Herd by Algorithm 4 of the paper, with the distance of every candidate mean to the mean of
    all rows.
    """
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    mean = torch.nn.functional.normalize(unit.mean(0), dim=0)
    total = torch.zeros_like(mean)
    chosen = []
    for k in range(1, min(len(unit), most) + 1):
        gaps = (mean - (total + unit) / k).square().sum(1)
        gaps[chosen] = torch.inf
        chosen.append(int(gaps.argmin()))
        total = total + unit[chosen[-1]]
    return chosen


@pytest.mark.reference
@pytest.mark.parametrize("seed", range(3))
def test_herding_by_dot_products_equals_herding_by_distances(seed):
    features = torch.randn(90, 16, generator=place(seed)).relu()
    features[3:6] = 0  # rows without a direction, which are equal too
    assert herded(features, 60).tolist() == by_distances(features, 60)


def test_herding_ranks_only_as_many_rows_as_the_quota_keeps():
    plan = MemoryPlan(capacity=10, selection="herding")
    new = rows([2, 3] * 20, task=1)
    groups = groups_of([rows([0, 1]), new], None, SingleLabel())
    assert quota(groups, plan) == 3  # of 10 rows in 4 classes the first get 3
    features = torch.randn(40, 4, generator=place())
    assert len(herd(new.labels, features, quota(groups, plan))) == 2 * 3
    assert quota(groups, MemoryPlan(capacity=10, selection="herding", per_class=7)) == 7
    assert quota(groups, MemoryPlan(capacity=1, selection="herding")) == 1


def test_herding_keeps_the_best_ranked_rows_when_quotas_shrink():
    memory = Memory()
    plan = MemoryPlan(capacity=12, selection="herding")
    first = {}
    for task in range(3):
        new = rows([2 * task, 2 * task + 1] * 8, task=task, first_id=100 * task)
        features = torch.randn(16, 4, generator=place(task))
        memory.offer(new, plan, place(), features)
        for label in (2 * task, 2 * task + 1):
            own = torch.nonzero(new.labels == label).flatten()
            first[label] = new.ids[own[herded(features[own], 12)]].tolist()
        quota = 12 // (2 * task + 2)
        assert {
            label: memory.rows.ids[memory.rows.labels == label].tolist() for label in first
        } == {label: ids[:quota] for label, ids in first.items()}


def test_herding_keeps_all_rows_if_the_memory_is_large_enough():
    memory = Memory()
    memory.offer(rows([0, 0]), MemoryPlan(capacity=4, selection="herding"), place(), torch.eye(2))
    assert len(memory) == 2 and memory.offered == 2


# --------------------------------------------------------------------------- every step


def test_a_full_reservoir_equals_offering_all_rows_at_once():
    memory = Memory()
    plan = MemoryPlan(capacity=6, selection="reservoir")
    memory.offer(rows([0] * 8), plan, place(1))
    new = rows([1] * 9, first_id=100)
    slots = reservoir(6, 8, 9, 6, place(2))
    expected = concatenate([memory.rows, new]).take(slots)
    assert 0 < int((slots >= 6).sum()) < 6
    memory.offer(new, plan, place(2))
    for name, value in memory.rows.tensors().items():
        assert torch.equal(value, expected.tensors()[name])


def test_a_full_reservoir_overwrites_rows_in_place():
    memory = Memory()
    plan = MemoryPlan(capacity=6, selection="reservoir")
    offered = rows([0] * 8)
    memory.offer(offered, plan, place(1))
    at = memory.rows.inputs.data_ptr()
    first = offered.inputs.clone()
    memory.offer(rows([1] * 9, first_id=100), plan, place(2))
    assert memory.rows.inputs.data_ptr() == at and (memory.rows.labels == 1).any()
    assert torch.equal(offered.inputs, first)  # never over the records themselves


@pytest.mark.statistical
def test_a_reservoir_keeps_rows_offered_one_by_one_equally_often():
    """40 offers of one row each; the score of `unevenness` leaves (18, 70) with probability
    0.004.
    """

    def one_by_one(generator):
        memory = Memory()
        plan = MemoryPlan(capacity=CAPACITY, selection="reservoir")
        for i in range(sum(PIECES)):
            memory.offer(rows([0], first_id=i), plan, generator)
        return memory.rows.ids.tolist()

    counts = torch.zeros(sum(PIECES), dtype=torch.float64)
    trials = 200
    for trial in range(trials):
        kept = one_by_one(place(trial))
        assert len(set(kept)) == len(kept) == CAPACITY
        counts[kept] += 1
    share = CAPACITY / sum(PIECES)
    assert (
        18 < float(((counts - trials * share).square() / (trials * share * (1 - share))).sum()) < 70
    )


def test_a_memory_keeps_its_rows_if_no_new_row_is_selected():
    memory = Memory()
    plan = MemoryPlan(capacity=1, selection="reservoir")
    memory.offer(rows([0]), plan, place())
    memory.offered = 10**12
    before = memory.rows
    memory.offer(rows([1, 2], first_id=5), plan, place())
    assert memory.rows is before and memory.offered == 10**12 + 2
