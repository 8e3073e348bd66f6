"""Online and blurry streams by public random numbers: every record occurs once, and one record
changes few places.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.toy_data import places, records
from perdure.data.datasets.base import Dataset
from perdure.data.records import Records
from perdure.data.scenarios import blurry, online, permuted, public_coin, split
from perdure.errors import ConfigError


def without(data: Dataset, record_id: int) -> Dataset:
    """Return the neighbouring data set; the declared size stays, because it is public."""
    rest = data.train.take(data.train.ids != record_id)
    train = Records(
        inputs=rest.inputs,
        labels=rest.labels,
        ids=rest.ids,
        partition="toy",
        declared_size=len(data.train),
    )
    return Dataset(name="toy", train=train, test=data.test, num_classes=4, input_shape=(1, 4, 6))


# ---------------------------------------------------------------- the public coin


@pytest.mark.statistical
def test_public_random_numbers_of_records_are_uniform():
    """Kolmogorov distance of 100,000 numbers; 0.0062 is the 0.1 % point, and the seed is fixed."""
    coins = public_coin(torch.arange(100_000), seed=7).sort().values
    assert 0 <= coins[0] <= coins[-1] < 1
    assert (coins - torch.linspace(0, 1, 100_000, dtype=torch.float64)).abs().max() < 0.0062


@pytest.mark.statistical
def test_public_random_numbers_of_two_seeds_are_independent():
    ids = torch.arange(20_000)
    coins = [
        public_coin(ids, seed=s, purpose=p) for s, p in ((0, 0), (1, 0), (0, 1), (1, 1), (-1, 0))
    ]
    correlations = torch.corrcoef(torch.stack(coins)) - torch.eye(len(coins), dtype=torch.float64)
    assert correlations.abs().max() < 0.03, "four standard deviations"


def test_a_public_random_number_depends_only_on_its_record():
    coins = public_coin(torch.arange(50), seed=3)
    assert torch.equal(public_coin(torch.tensor([17, 4]), seed=3), coins[[17, 4]])


# ---------------------------------------------------------------- one-pass streams


@settings(max_examples=20, deadline=None)
@given(chunk=st.integers(1, 250), exact=st.booleans(), seed=st.integers(0, 2**32))
@pytest.mark.property
def test_online_pieces_contain_every_record_once(toy, chunk, exact, seed):
    parent = split(toy, scenario="class", experiences=2)
    stream = online(parent, chunk=chunk, seed=seed, exact=exact)
    assert [experience.index for experience in stream] == list(range(len(stream)))
    for task, whole in enumerate(parent):
        pieces = [experience for experience in stream if experience.stage == task]
        assert len(pieces) == math.ceil(200 / chunk)
        ids = torch.cat([piece.train.ids for piece in pieces])
        assert torch.equal(ids.sort().values, whole.train.ids.sort().values)
        assert all(piece.train.partition == whole.train.partition for piece in pieces)
        assert all(piece.classes == whole.classes and piece.test is whole.test for piece in pieces)


def test_exact_online_pieces_are_not_assigned_by_record(toy):
    stream = online(split(toy, scenario="class", experiences=2), chunk=30)
    assert [len(experience.train) for experience in stream] == [30] * 6 + [20] + [30] * 6 + [20]
    assert not stream.assigned_by_record


def test_the_order_of_online_pieces_depends_on_the_seed(toy):
    parent = split(toy, scenario="class", experiences=2)
    first, again, other = (
        online(parent, chunk=30, seed=seed)[0].train.ids.tolist() for seed in (0, 0, 1)
    )
    assert first == again != other
    assert first != sorted(first)


def test_one_record_changes_only_one_hashed_online_piece(toy):
    def pieces(data: Dataset, *, exact: bool) -> list[set[int]]:
        return places(online(split(data, scenario="class", experiences=1), chunk=20, exact=exact))

    def changed(record_id: int, *, exact: bool) -> int:
        pairs = zip(
            pieces(toy, exact=exact), pieces(without(toy, record_id), exact=exact), strict=True
        )
        return sum(before != after for before, after in pairs)

    earliest = min(pieces(toy, exact=True)[0])
    assert changed(earliest, exact=True) == 20
    assert {changed(record_id, exact=False) for record_id in (earliest, 0, 137, 399)} == {1}


def test_hashed_online_pieces_declare_the_given_chunk_size(toy):
    parent = split(toy, scenario="class", experiences=1, declared_size=400)
    stream = online(parent, chunk=20, exact=False)
    assert {experience.train.declared_size for experience in stream} == {20}
    assert stream.assigned_by_record
    assert len({len(experience.train) for experience in stream}) > 1


def test_online_refuses_a_chunk_below_1(toy):
    with pytest.raises(ConfigError, match="chunk"):
        online(permuted(toy, experiences=1), chunk=0)


# ---------------------------------------------------------------- blurry boundaries


@pytest.mark.statistical
def test_blurry_moves_the_given_share_and_keeps_all_records():
    n = 20_000
    data = Dataset(
        name="toy",
        train=records(n),
        test=records(80, first_id=n),
        num_classes=4,
        input_shape=(1, 4, 6),
    )
    stream = blurry(data, experiences=4, blurry_share=0.3, class_order=[2, 0, 3, 1])
    assert set.union(*places(stream)) == set(range(n))
    assert sum(len(experience.train) for experience in stream) == n
    counts = torch.stack([e.train.labels.bincount(minlength=4) for e in stream]) / (n / 4)
    expected = torch.full((4, 4), 0.1)
    expected[range(4), [2, 0, 3, 1]] = 0.7
    assert (counts - expected).abs().max() < 0.03, (
        "four and a half standard deviations; the seed is fixed"
    )
    assert stream[0].classes == (0, 1, 2, 3)
    assert set(stream[0].test.labels.tolist()) == {2}
    assert [experience.train.partition for experience in stream] == [
        f"experience-{e}" for e in range(4)
    ]


def test_disjoint_classes_of_blurry_stay_in_their_experience(toy):
    stream = blurry(toy, experiences=2, blurry_share=0.5, disjoint_share=0.5, seed=1)
    shared = set(stream[0].classes) & set(stream[1].classes)
    assert len(shared) == 2
    for experience in stream:
        assert set(experience.train.labels.tolist()) <= set(experience.classes)
    seen = [set(experience.train.labels.tolist()) for experience in stream]
    assert seen[0] & seen[1] == shared


def test_blurry_with_share_0_equals_split(toy):
    plain = split(toy, scenario="class", experiences=2)
    unblurred = blurry(toy, experiences=2, blurry_share=0)
    assert places(plain) == places(unblurred)
    assert [e.classes for e in plain] == [e.classes for e in unblurred]


@settings(max_examples=20, deadline=None)
@given(record_id=st.integers(0, 399), seed=st.integers(0, 2**32))
@pytest.mark.property
def test_removing_a_record_changes_only_one_blurry_experience(toy, record_id, seed):
    """All other records stay in place, so the experiences are disjoint partitions."""
    whole, rest = (
        places(blurry(data, experiences=4, blurry_share=0.5, seed=seed))
        for data in (toy, without(toy, record_id))
    )
    assert [a - {record_id} for a in whole] == rest


@pytest.mark.parametrize(
    ("field", "value"),
    [("blurry_share", 1.2), ("disjoint_share", -0.1), ("experiences", 1), ("experiences", 3)],
)
def test_blurry_refuses_invalid_arguments(toy, field, value):
    with pytest.raises(ConfigError, match=field):
        blurry(toy, **({"experiences": 2} | {field: value}))
