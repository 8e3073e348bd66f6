"""The records of a curator: exposure, sampling, raw access and memory."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.curator_bench import REPLAY, declared, simulated
from perdure.contract.plan import MemoryPlan, Plan
from perdure.curator.record_groups import group_records
from perdure.data.records import Records
from perdure.data.scenarios import permuted, split
from perdure.errors import PrivacyError
from perdure.planning.exposure import exposure

# --------------------------------------------------------------------------- who is exposed


def test_sampling_rates_use_declared_sizes_and_memory_capacity(toy_stream):
    """The rate is 256/12,000 in the first experience, and 256/13,000 with 1,000 memory records in
    the pool.
    """
    experiences = declared(toy_stream(), 12_000, 12_000).experiences
    first = exposure(experiences[:1], REPLAY, batch_size=256, rate=None)
    assert first.scope == {"experience-0": 256 / 12_000} and first.pool_size == 12_000
    second = exposure(experiences, REPLAY, batch_size=256, rate=None)
    assert second.scope == {"experience-0": 256 / 13_000, "experience-1": 256 / 13_000}
    assert (second.rate, second.pool_size) == (256 / 13_000, 13_000)


def test_sampling_exposes_only_the_partitions_in_the_pool(toy_stream):
    experiences = declared(toy_stream(), 100, 300).experiences
    alone = exposure(experiences, Plan(), batch_size=30, rate=None)
    assert alone.scope == {"experience-1": 0.1} and alone.pool_size == 300
    joint = exposure(experiences, Plan(pool="all"), batch_size=40, rate=None)
    assert joint.scope == {"experience-0": 0.1, "experience-1": 0.1} and joint.pool_size == 400
    small = exposure(experiences, REPLAY, batch_size=30, rate=None)
    assert small.pool_size == 400  # a memory of 1,000 cannot hold more than the 100 there were


def test_the_sampling_rate_is_at_most_1_and_can_be_given(toy_stream):
    experiences = toy_stream().experiences
    assert exposure(experiences[:1], Plan(), batch_size=10_000, rate=None).rate == 1.0
    given_rate = exposure(experiences, REPLAY, batch_size=8, rate=0.25)
    assert given_rate.rate == 0.25 and set(given_rate.scope.values()) == {0.25}


# --------------------------------------------------------------------------- sampling


def test_an_epoch_without_privacy_is_a_permutation_of_records(bench):
    test = bench(batch_size=7).open()
    sizes = [len(test.held.sample(step)) for step in range(4)]
    assert sizes == [7, 7, 7, 3]
    epochs = [
        torch.cat([test.held.sample(step).ids for step in range(4 * e, 4 * e + 4)])
        for e in range(2)
    ]
    everyone = test.curator.raw("a test").ids.sort().values
    assert all(torch.equal(ids.sort().values, everyone) for ids in epochs)
    assert not torch.equal(*epochs)


def test_a_batch_depends_only_on_the_seed_and_the_step(bench):
    first, again, other = (bench(seed=seed).open().held for seed in (0, 0, 1))
    forth = [first.sample(step).ids for step in range(6)]
    back = [again.sample(step).ids for step in reversed(range(6))]
    assert all(torch.equal(a, b) for a, b in zip(forth, reversed(back), strict=True))
    assert not torch.equal(forth[0], other.sample(0).ids)


def test_every_batch_has_the_planned_number_of_memory_rows(bench):
    test = bench(batch_size=6)
    plan = Plan(memory=MemoryPlan(capacity=10, batch_size=4))
    test.whole(0, plan)
    batch = test.open(1, plan).held.sample(0)
    assert batch.from_memory.tolist() == [False] * 6 + [True] * 4
    assert set(batch.tasks[:6].tolist()) == {1} and set(batch.tasks[6:].tolist()) == {0}
    assert set(batch.labels[:6].tolist()) <= {2, 3} and set(batch.labels[6:].tolist()) <= {0, 1}


def test_the_plan_pool_all_pools_records_of_all_experiences(bench):
    test = bench().open(1, Plan(pool="all"))
    assert torch.bincount(test.curator.raw("a test").tasks).tolist() == [24, 24]
    assert test.held.pool.current.tasks.unique().tolist() == [1]


@pytest.mark.statistical
def test_poisson_sampling_includes_records_at_the_stated_rate(bench, toy_stream):
    """2,000 steps over 24 records at rate 1/4. The standard score of the total stays within 4
    (probability 6e-5) and that of each record within 5 (24 x 6e-7); a rate 5 % off would score
    6.
    """
    test = bench(simulated(), declared(toy_stream(), 32, 32))
    steps = range(2000)
    held = test.open(0, steps=steps).held
    counts = torch.zeros(2000)
    sizes = []
    for step in steps:
        ids = held.sample(step).ids
        counts[ids] += 1
        sizes.append(float(len(ids)))

    def score(total, trials, rate):
        return float((total - trials * rate) / (trials * rate * (1 - rate)) ** 0.5)

    members = counts[held.rows.ids]
    assert held.exposure.rate == 8 / 32 and len(members) == 24  # declared 32, there are 24
    assert abs(score(members.sum(), 48_000, 0.25)) < 4
    assert max(abs(score(count, 2000, 0.25)) for count in members) < 5
    assert (
        abs(score(members.sum(), 48_000, 0.25 * 1.05))
        > 4
        < abs(score(members.sum(), 48_000, 0.25 * 0.95))
    )
    # of a binomial; a fixed size would have none
    spread = torch.tensor(sizes).var() / (24 * 0.25 * 0.75)
    assert 0.85 < spread < 1.15


@pytest.mark.property
@settings(deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=25), st.floats(0.01, 1.0), st.integers(0, 99)
)
def test_a_record_is_drawn_at_most_once_per_step(ids, rate, seed):
    rows = torch.tensor(ids)
    grouped = group_records(rows, torch.zeros_like(rows))
    assert sorted(grouped.order.tolist()) == list(range(len(ids)))
    coins = torch.rand(
        len(grouped.counts), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    drawn = rows[grouped.rows(coins < rate, coins[coins < rate] / rate)]
    assert drawn.tolist() == rows.unique()[coins < rate].tolist()


def test_sampling_handles_random_numbers_close_to_the_rate():
    coin = torch.tensor([torch.nextafter(torch.tensor(1.0).double(), torch.tensor(0.0).double())])
    assert group_records(torch.tensor([5, 5, 5]), torch.zeros(3)).rows(
        coin < 1.0, coin
    ).tolist() == [2]


@pytest.mark.statistical
@pytest.mark.parametrize("plan", [Plan(memory=MemoryPlan(capacity=100)), Plan(pool="all")])
def test_permuted_copies_of_an_image_are_drawn_as_one_record(bench, toy_data, plan):
    """A step contains at most one of the permuted copies, at the charged rate, and each copy
    equally often. 400 steps over 48 records at rate 1/8; scores within 4 (6e-5 each).

    400 steps over 48 records at rate 1/8: scores within 4 (6e-5 each).
    """
    test = bench(simulated(sampling_rate=0.125), permuted(toy_data, experiences=2))
    test.whole(0, plan)
    held = test.open(1, plan, steps=range(400)).held
    assert len(held.rows) == 96 and len(held.rows.ids.unique()) == 48
    tasks = []
    for step in range(400):
        batch = held.sample(step)
        assert len(batch.ids.unique()) == len(batch)
        tasks += batch.tasks.tolist()
    n = 400 * 48
    assert abs(len(tasks) - n / 8) < 4 * (n / 8 * 7 / 8) ** 0.5
    assert abs(sum(tasks) - len(tasks) / 2) < 4 * (len(tasks) / 4) ** 0.5


def test_privacy_refuses_one_id_for_two_records_of_an_experience(bench, toy_stream):
    stream = toy_stream()
    train = stream[0].train
    doubled = replace(train, ids=torch.where(train.ids == train.ids[1], train.ids[0], train.ids))
    stream = replace(stream, experiences=(replace(stream[0], train=doubled), stream[1]))
    bench(stream=stream).open()
    with pytest.raises(PrivacyError, match=r"'experience-0' share an id.*its own id"):
        bench(simulated(), stream).open()


# --------------------------------------------------------------------------- raw records and memory


def test_the_curator_refuses_raw_records_under_privacy(bench):
    assert len(bench().open().curator.raw("a plot")) == 24
    with pytest.raises(
        PrivacyError, match=r"raw records were asked for \(a plot\).*curator.release"
    ):
        bench(simulated()).open().curator.raw("a plot")
    closed = bench()
    with pytest.raises(PrivacyError, match="no open experience; call open"):
        closed.curator.raw("nothing")
    closed.open().held.close()
    with pytest.raises(PrivacyError, match="no open experience"):
        closed.curator.raw("the past")


def test_stored_values_are_returned_with_their_memory_row(bench):
    """The values are the model's logits at storage time, as in DER; new rows have zeros."""
    test = bench(batch_size=6)
    plan = Plan(memory=MemoryPlan(capacity=8))
    test.whole(0, plan, remember=lambda forward, batch: {"logits": forward(batch.inputs)})
    batch = test.open(1, plan).held.sample(0)
    replayed = batch.from_memory
    expected = test.model(batch.inputs[replayed]).detach()
    torch.testing.assert_close(batch.stored["logits"][replayed], expected)
    assert batch.stored["logits"][~replayed].abs().sum() == 0 and len(expected) == 6
    test.finish(lambda forward, batch: {"logits": forward(batch.inputs) + 1})
    rows = test.held.memory.rows
    torch.testing.assert_close(
        rows.stored["logits"], test.model(rows.inputs).detach() + (rows.tasks == 1)[:, None]
    )


def test_private_memory_keeps_a_record_by_declared_probability(bench, toy_stream):
    plan = Plan(memory=MemoryPlan(capacity=30))
    test = bench(simulated(), declared(toy_stream(), 40, 60))
    tags = {int(i): float(test.private_sum.tags(torch.tensor([i]))) for i in range(48)}
    for index, threshold in ((0, 30 / 40), (1, 30 / 100)):
        test.whole(index, plan)
        kept = set(test.held.memory.rows.ids.tolist())
        offered = torch.cat([e.train.ids for e in test.stream.experiences[: index + 1]]).tolist()
        assert kept == {i for i in offered if tags[i] < threshold}
    assert test.held.memory.offered == 100


def test_memory_without_privacy_is_class_balanced(bench):
    test = bench()
    for index in range(2):
        test.whole(index, Plan(memory=MemoryPlan(capacity=12)))
    assert torch.bincount(test.held.memory.rows.labels).tolist() == [3, 3, 3, 3]


def test_split_streams_have_no_record_in_two_partitions(toy_data):
    stream = split(toy_data, scenario="class", experiences=2)
    assert isinstance(stream[0].train, Records)
    assert not set(stream[0].train.ids.tolist()) & set(stream[1].train.ids.tolist())


def test_equal_ids_in_two_partitions_are_two_records():
    """If one of the two is missing, the other does not take its place."""
    ids = torch.tensor([7, 7, 8, 7])
    owner = torch.tensor([0, 1, 0, 0])
    grouped = group_records(ids, owner)
    assert grouped.ids.tolist() == [7, 7, 8] and grouped.counts.tolist() == [2, 1, 1]
    assert sorted(grouped.order[:2].tolist()) == [0, 3] and grouped.order[2:].tolist() == [1, 2]
