"""Streams: who is in which experience, with which label, identity and partition."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, TensorDataset

from perdure.datasets import Dataset, breast_cancer, digits
from perdure.errors import ConfigError, DataError
from perdure.records import Records
from perdure.streams import (
    Experience,
    Stream,
    blurry,
    from_avalanche,
    online,
    permute,
    permuted,
    public_coin,
    rotate,
    rotated,
    split,
)


def records(n: int, *, classes: int = 4, first_id: int = 0, partition: str = "toy") -> Records:
    """Random records with every class in turn, ids from `first_id`."""
    generator = torch.Generator().manual_seed(first_id)
    return Records(
        inputs=torch.rand(n, 1, 4, 6, generator=generator),
        labels=torch.arange(n) % classes,
        ids=torch.arange(n) + first_id,
        partition=partition,
    )


@pytest.fixture(scope="module")
def toy() -> Dataset:
    return Dataset(
        name="toy",
        train=records(400),
        test=records(80, first_id=400, partition="toy-test"),
        num_classes=4,
        input_shape=(1, 4, 6),
    )


def without(data: Dataset, record_id: int) -> Dataset:
    """Make the neighbouring data set; the declared size stays, since it is public."""
    rest = data.train.take(data.train.ids != record_id)
    train = Records(
        inputs=rest.inputs, labels=rest.labels, ids=rest.ids, partition="toy", declared_size=len(data.train)
    )
    return Dataset(name="toy", train=train, test=data.test, num_classes=4, input_shape=(1, 4, 6))


def places(stream: Stream) -> list[set[int]]:
    """Ids in each experience."""
    return [set(experience.train.ids.tolist()) for experience in stream]


# ---------------------------------------------------------------- split


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_class_and_task_splits_keep_labels_and_the_full_head(scenario):
    data = digits()
    stream = split(data, scenario=scenario, experiences=5)
    assert (len(stream), stream.num_classes, stream.scenario) == (5, 10, scenario)
    for e, experience in enumerate(stream):
        assert experience.classes == (2 * e, 2 * e + 1)
        for part in (experience.train, experience.test):
            assert set(part.labels.tolist()) == {2 * e, 2 * e + 1}
    assert sum(len(experience.train) for experience in stream) == len(data.train)
    assert sum(len(experience.test) for experience in stream) == len(data.test)


def test_the_domain_split_labels_the_position_within_the_slice():
    data = digits()
    stream = split(data, scenario="domain", experiences=5, class_order=[8, 3, *(0, 1, 2, 4, 5, 6, 7, 9)])
    assert (stream.num_classes, stream[0].classes) == (2, (0, 1))
    original = dict(zip(data.train.ids.tolist(), data.train.labels.tolist(), strict=True))
    first = stream[0].train
    assert {(original[i], label) for i, label in zip(first.ids.tolist(), first.labels.tolist(), strict=True)} == {
        (8, 0),
        (3, 1),
    }
    assert set(stream[4].test.labels.tolist()) == {0, 1}


def test_rows_stay_together_and_ids_survive(toy):
    for experience in split(toy, scenario="class", experiences=2, class_order=[2, 0, 3, 1]):
        for part, source, first in ((experience.train, toy.train, 0), (experience.test, toy.test, 400)):
            rows = part.ids - first
            assert torch.equal(part.inputs, source.inputs[rows])
            assert torch.equal(part.labels, source.labels[rows])


def test_experiences_of_a_split_are_partitions_of_their_own(toy):
    stream = split(toy, scenario="class", experiences=2)
    assert [experience.train.partition for experience in stream] == ["experience-0", "experience-1"]
    assert [experience.train.declared_size for experience in stream] == [200, 200]
    assert {experience.test.partition for experience in stream} == {"toy-test"}
    assert stream.assigned_by_record


def test_a_seed_gives_a_random_class_order(toy):
    orders = {seed: [e.classes for e in split(toy, scenario="class", experiences=4, seed=seed)] for seed in range(5)}
    assert len({tuple(order) for order in orders.values()}) > 1
    assert orders[3] == [e.classes for e in split(toy, scenario="class", experiences=4, seed=3)]


def test_a_declared_class_without_records_is_fine(toy):
    empty = toy.train.take(toy.train.labels != 1)
    data = Dataset(name="toy", train=empty, test=toy.test, num_classes=4, input_shape=(1, 4, 6))
    assert split(data, scenario="class", experiences=2)[0].classes == (0, 1)
    assert len(split(data, scenario="class", experiences=4)[1].train) == 0


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("scenario", {"scenario": "instance", "experiences": 2}),
        ("experiences", {"scenario": "class", "experiences": 3}),
        ("experiences", {"scenario": "class", "experiences": 0}),
        ("class_order", {"scenario": "class", "experiences": 2, "class_order": [0, 1, 2, 2]}),
        ("class_order", {"scenario": "class", "experiences": 2, "class_order": [0, 1, 2]}),
        ("seed", {"scenario": "class", "experiences": 2, "class_order": [0, 1, 2, 3], "seed": 1}),
    ],
)
def test_a_bad_split_is_refused_in_one_line(toy, field, arguments):
    with pytest.raises(ConfigError, match=rf"^{field} = [^\n]*$"):
        split(toy, **arguments)


# ---------------------------------------------------------------- permuted and rotated copies


def test_permuted_copies_are_the_same_records(toy):
    stream = permuted(toy, experiences=3, seed=1)
    assert stream.scenario == "domain"
    assert stream.num_classes == 4
    assert torch.equal(stream[0].train.inputs, toy.train.inputs)
    for experience in stream:
        assert experience.train.partition == "toy", "one image is one record, and its uses compose"
        assert torch.equal(experience.train.ids, toy.train.ids)
        assert torch.equal(experience.train.labels, toy.train.labels)
    one, two = stream[1].train.inputs, stream[2].train.inputs
    assert not torch.equal(one, two)
    assert torch.equal(one.flatten(1).sort().values, toy.train.inputs.flatten(1).sort().values)


def test_training_and_test_share_the_permutation(toy):
    stream = permuted(toy, experiences=2, seed=1)
    numbered = torch.arange(24.0).reshape(1, 1, 4, 6)
    same = Dataset(
        name="toy",
        train=Records(inputs=numbered, labels=torch.zeros(1, dtype=torch.int64)),
        test=Records(inputs=numbered, labels=torch.zeros(1, dtype=torch.int64)),
        num_classes=4,
        input_shape=(1, 4, 6),
    )
    order = permuted(same, experiences=2, seed=1)[1].train.inputs.flatten().long()
    for part, source in ((stream[1].train, toy.train), (stream[1].test, toy.test)):
        assert torch.equal(part.inputs, permute(source.inputs, order=order))
    assert torch.equal(permuted(same, experiences=2, seed=1)[1].test.inputs.flatten().long(), order)


def test_the_permutation_follows_the_seed_and_the_first_may_be_permuted_too(toy):
    same, other = (permuted(toy, experiences=2, seed=seed)[1].train.inputs for seed in (0, 1))
    assert torch.equal(same, permuted(toy, experiences=2)[1].train.inputs)
    assert not torch.equal(same, other)
    assert not torch.equal(permuted(toy, experiences=1, first_identity=False)[0].train.inputs, toy.train.inputs)


@pytest.mark.parametrize("scenario", ["task", "class"])
def test_permuted_with_a_wide_head(toy, scenario):
    stream = permuted(toy, experiences=3, scenario=scenario)
    assert stream.num_classes == 12
    assert stream[2].classes == (8, 9, 10, 11)
    assert torch.equal(stream[2].train.labels, toy.train.labels + 8)
    assert torch.equal(stream[2].test.labels, toy.test.labels + 8)


def test_a_table_can_be_permuted_but_not_rotated():
    table = breast_cancer()
    assert permuted(table, experiences=2)[1].train.inputs.shape == table.train.inputs.shape
    with pytest.raises(ConfigError, match="input_shape"):
        rotated(table)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_right_angles_are_exact(turns):
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(rotate(images, degrees=90 * turns), images.rot90(turns, (-2, -1)), atol=1e-5, rtol=0)


def test_an_oblong_image_is_turned_and_not_sheared():
    """A bright pixel keeps its distance to the centre."""
    image = torch.zeros(1, 1, 9, 17)
    image[0, 0, 4, 12] = 1  # four to the right of the centre
    turned = rotate(image, degrees=90)
    assert turned[0, 0, 0, 8] == pytest.approx(1, abs=1e-5)  # four above it


def test_rotated_copies_are_the_same_records(toy):
    stream = rotated(toy, angles=(0, 30))
    assert (stream.scenario, stream.num_classes) == ("domain", 4)
    assert torch.equal(stream[0].train.inputs, toy.train.inputs)
    assert torch.equal(stream[1].train.inputs, rotate(toy.train.inputs, degrees=30))
    assert torch.equal(stream[1].test.inputs, rotate(toy.test.inputs, degrees=30))
    assert {experience.train.partition for experience in stream} == {"toy"}
    assert torch.equal(stream[1].train.ids, toy.train.ids)


@pytest.mark.parametrize(
    ("make", "arguments", "field"),
    [
        (permuted, {"experiences": 0}, "experiences"),
        (permuted, {"experiences": 2, "scenario": "instance"}, "scenario"),
        (rotated, {"angles": ()}, "angles"),
    ],
)
def test_bad_copies_are_refused(toy, make, arguments, field):
    with pytest.raises(ConfigError, match=field):
        make(toy, **arguments)


# ---------------------------------------------------------------- the public coin


@pytest.mark.statistical
def test_the_coin_is_uniform():
    """Kolmogorov distance of 100,000 coins; 0.0062 is the 0.1 % point, and the seed is fixed."""
    coins = public_coin(torch.arange(100_000), seed=7).sort().values
    assert 0 <= coins[0] <= coins[-1] < 1
    assert (coins - torch.linspace(0, 1, 100_000, dtype=torch.float64)).abs().max() < 0.0062


@pytest.mark.statistical
def test_coins_of_different_seeds_and_purposes_are_unrelated():
    ids = torch.arange(20_000)
    coins = [public_coin(ids, seed=s, purpose=p) for s, p in ((0, 0), (1, 0), (0, 1), (1, 1), (-1, 0))]
    correlations = torch.corrcoef(torch.stack(coins)) - torch.eye(len(coins), dtype=torch.float64)
    assert correlations.abs().max() < 0.03, "four standard deviations"


def test_the_coin_belongs_to_the_record():
    coins = public_coin(torch.arange(50), seed=3)
    assert torch.equal(public_coin(torch.tensor([17, 4]), seed=3), coins[[17, 4]])


# ---------------------------------------------------------------- one-pass streams


@settings(max_examples=20, deadline=None)
@given(chunk=st.integers(1, 250), exact=st.booleans(), seed=st.integers(0, 2**32))
@pytest.mark.property
def test_online_shows_every_record_once(toy, chunk, exact, seed):
    parent = split(toy, scenario="class", experiences=2)
    stream = online(parent, chunk=chunk, seed=seed, exact=exact)
    assert [experience.index for experience in stream] == list(range(len(stream)))
    for task, whole in enumerate(parent):
        pieces = [experience for experience in stream if experience.task == task]
        assert len(pieces) == math.ceil(200 / chunk)
        ids = torch.cat([piece.train.ids for piece in pieces])
        assert torch.equal(ids.sort().values, whole.train.ids.sort().values)
        assert all(piece.train.partition == whole.train.partition for piece in pieces)
        assert all(piece.classes == whole.classes and piece.test is whole.test for piece in pieces)


def test_exact_pieces_have_the_size_asked_for_and_say_what_that_costs(toy):
    stream = online(split(toy, scenario="class", experiences=2), chunk=30)
    assert [len(experience.train) for experience in stream] == [30] * 6 + [20] + [30] * 6 + [20]
    assert not stream.assigned_by_record


def test_the_order_of_a_one_pass_stream_is_seeded(toy):
    parent = split(toy, scenario="class", experiences=2)
    first, again, other = (online(parent, chunk=30, seed=seed)[0].train.ids.tolist() for seed in (0, 0, 1))
    assert first == again != other
    assert first != sorted(first)


def test_one_record_changes_one_hashed_piece_but_many_exact_ones(toy):
    def pieces(data: Dataset, *, exact: bool) -> list[set[int]]:
        return places(online(split(data, scenario="class", experiences=1), chunk=20, exact=exact))

    def changed(record_id: int, *, exact: bool) -> int:
        pairs = zip(pieces(toy, exact=exact), pieces(without(toy, record_id), exact=exact), strict=True)
        return sum(before != after for before, after in pairs)

    earliest = min(pieces(toy, exact=True)[0])
    assert changed(earliest, exact=True) == 20
    assert {changed(record_id, exact=False) for record_id in (earliest, 0, 137, 399)} == {1}


def test_hashed_pieces_declare_the_size_met_on_average(toy):
    stream = online(split(toy, scenario="class", experiences=1), chunk=20, exact=False)
    assert {experience.train.declared_size for experience in stream} == {20}
    assert stream.assigned_by_record
    assert len({len(experience.train) for experience in stream}) > 1


def test_a_chunk_has_a_record(toy):
    with pytest.raises(ConfigError, match="chunk"):
        online(permuted(toy, experiences=1), chunk=0)


# ---------------------------------------------------------------- blurry boundaries


@pytest.mark.statistical
def test_blurry_moves_the_share_asked_for_and_keeps_every_record():
    n = 20_000
    data = Dataset(name="toy", train=records(n), test=records(80, first_id=n), num_classes=4, input_shape=(1, 4, 6))
    stream = blurry(data, experiences=4, blurry_share=0.3, class_order=[2, 0, 3, 1])
    assert set.union(*places(stream)) == set(range(n))
    assert sum(len(experience.train) for experience in stream) == n
    counts = torch.stack([e.train.labels.bincount(minlength=4) for e in stream]) / (n / 4)
    expected = torch.full((4, 4), 0.1)
    expected[range(4), [2, 0, 3, 1]] = 0.7
    assert (counts - expected).abs().max() < 0.03, "four and a half standard deviations; the seed is fixed"
    assert stream[0].classes == (0, 1, 2, 3)
    assert set(stream[0].test.labels.tolist()) == {2}
    assert [experience.train.partition for experience in stream] == [f"experience-{e}" for e in range(4)]


def test_disjoint_classes_never_leave(toy):
    stream = blurry(toy, experiences=2, blurry_share=0.5, disjoint_share=0.5, seed=1)
    shared = set(stream[0].classes) & set(stream[1].classes)
    assert len(shared) == 2
    for experience in stream:
        assert set(experience.train.labels.tolist()) <= set(experience.classes)
    seen = [set(experience.train.labels.tolist()) for experience in stream]
    assert seen[0] & seen[1] == shared


def test_without_blur_it_is_the_split(toy):
    plain, unblurred = split(toy, scenario="class", experiences=2), blurry(toy, experiences=2, blurry_share=0)
    assert places(plain) == places(unblurred)
    assert [e.classes for e in plain] == [e.classes for e in unblurred]


@settings(max_examples=20, deadline=None)
@given(record_id=st.integers(0, 399), seed=st.integers(0, 2**32))
@pytest.mark.property
def test_one_record_changes_one_blurry_experience(toy, record_id, seed):
    """What makes the experiences disjoint partitions: all other records stay where they are."""
    whole, rest = (
        places(blurry(data, experiences=4, blurry_share=0.5, seed=seed)) for data in (toy, without(toy, record_id))
    )
    assert [a - {record_id} for a in whole] == rest


@pytest.mark.parametrize(
    ("field", "value"),
    [("blurry_share", 1.2), ("disjoint_share", -0.1), ("experiences", 1), ("experiences", 3)],
)
def test_a_bad_blurry_stream_is_refused(toy, field, value):
    with pytest.raises(ConfigError, match=field):
        blurry(toy, **({"experiences": 2} | {field: value}))


# ---------------------------------------------------------------- the types


def test_a_stream_is_a_short_readable_sequence(toy):
    stream = split(toy, scenario="class", experiences=2)
    assert list(stream) == [stream[0], stream[1]] == [*stream.experiences]
    assert stream[-1] is stream[1]
    assert repr(stream) == "Stream('split-toy', class-incremental, 2 experiences, 4 classes, inputs (1, 4, 6))"


def test_moving_a_stream_moves_shared_records_once(toy, monkeypatch):
    """A machine may have one device only: a copy stands for the move."""

    def copied(self, device):
        return replace(self, inputs=self.inputs.clone(), labels=self.labels.clone(), ids=self.ids.clone())

    stream = online(split(toy, scenario="class", experiences=2), chunk=50)
    assert stream.to("cpu") is stream
    monkeypatch.setattr(Records, "to", copied)
    there = stream.to("elsewhere")
    assert there[0].test is there[1].test is not stream[0].test
    assert there[0].train is not stream[0].train
    assert places(there) == places(stream)
    assert there[-1].task == 1
    assert there.assigned_by_record == stream.assigned_by_record


def test_labels_must_be_declared(toy):
    with pytest.raises(DataError, match=r"experience 0 has train labels \[2, 3\]; declared: \(0, 1\)"):
        Experience(index=0, train=toy.train, test=toy.test.take(toy.test.labels < 2), classes=(0, 1))


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("scenario", {"scenario": "instance"}),
        ("experiences", {"experiences": ()}),
        ("classes", {"num_classes": 3}),
    ],
)
def test_a_bad_stream_is_refused(toy, field, change):
    good = {
        "name": "toy",
        "scenario": "class",
        "experiences": split(toy, scenario="class", experiences=1).experiences,
        "num_classes": 4,
        "input_shape": (1, 4, 6),
    }
    with pytest.raises(ConfigError, match=field):
        Stream(**(good | change))


def test_experiences_are_numbered_in_order(toy):
    first, second = split(toy, scenario="class", experiences=2)
    with pytest.raises(ConfigError, match="experiences"):
        Stream(name="x", scenario="class", experiences=(second, first), num_classes=4, input_shape=(1, 4, 6))


# ---------------------------------------------------------------- Avalanche


@pytest.fixture(scope="module")
def avalanche():
    """The package; importing it warns about packages of its own that are no longer maintained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import avalanche.benchmarks as benchmarks
    return benchmarks


def tensors(part: Records) -> TensorDataset:
    dataset = TensorDataset(part.inputs, part.labels)
    dataset.targets = part.labels.tolist()
    return dataset


def assert_same_rows(part: Records, source: Records, first_id: int = 0) -> None:
    rows = part.ids - first_id
    assert torch.equal(part.inputs, source.inputs[rows])
    assert torch.equal(part.labels, source.labels[rows])


@pytest.mark.reference
def test_a_class_incremental_benchmark_of_avalanche(toy, avalanche):
    benchmark = avalanche.nc_benchmark(
        tensors(toy.train), tensors(toy.test), 2, task_labels=False, fixed_class_order=[3, 1, 0, 2]
    )
    stream = from_avalanche(benchmark)
    assert (stream.scenario, stream.num_classes, stream.input_shape) == ("class", 4, (1, 4, 6))
    assert [e.classes for e in stream] == [(1, 3), (0, 2)]
    ours = split(toy, scenario="class", experiences=2, class_order=[3, 1, 0, 2])
    assert places(stream) == places(ours)
    assert [e.train.partition for e in stream] == ["experience-0", "experience-1"]
    assert stream.assigned_by_record
    for e, (experience, theirs) in enumerate(zip(stream, benchmark.train_stream, strict=True)):
        assert_same_rows(experience.train, toy.train)
        assert_same_rows(experience.test, toy.test, first_id=400)
        assert torch.equal(experience.train.inputs[7], theirs.dataset[7][0]), e


@pytest.mark.reference
def test_tasks_that_count_classes_from_zero_get_outputs_of_their_own(toy, avalanche):
    disjoint, shared = (
        from_avalanche(
            avalanche.nc_benchmark(
                tensors(toy.train),
                tensors(toy.test),
                2,
                task_labels=True,
                shuffle=False,
                class_ids_from_zero_in_each_exp=from_zero,
            )
        )
        for from_zero in (False, True)
    )
    assert disjoint.scenario == shared.scenario == "task"
    assert [e.classes for e in disjoint] == [(0, 1), (2, 3)]
    assert [e.classes for e in shared] == [(0, 1), (2, 3)]
    assert shared.num_classes == 4
    for experience in shared:
        assert_same_rows(experience.train, toy.train)
        assert_same_rows(experience.test, toy.test, first_id=400)


@pytest.mark.reference
def test_transforms_are_applied_item_by_item_from_the_eval_group(toy, avalanche):
    benchmark = avalanche.nc_benchmark(
        tensors(toy.train),
        tensors(toy.test),
        2,
        task_labels=False,
        shuffle=False,
        train_transform=lambda x: x + torch.rand(1),
        eval_transform=lambda x: 2 * x,
    )
    stream = from_avalanche(benchmark)
    for experience in stream:
        assert torch.equal(experience.train.inputs, 2 * toy.train.inputs[experience.train.ids])
        assert torch.equal(experience.train.labels, toy.train.labels[experience.train.ids])
        assert torch.equal(experience.test.inputs, 2 * toy.test.inputs[experience.test.ids - 400])


@pytest.mark.reference
def test_a_random_cut_of_the_records_is_no_partition(toy, avalanche):
    benchmark = avalanche.ni_benchmark(tensors(toy.train), tensors(toy.test), 4, task_labels=False, seed=1)
    stream = from_avalanche(benchmark)
    assert stream.scenario == "domain"
    assert set.union(*places(stream)) == set(range(400))
    assert {e.train.partition for e in stream} == {"avalanche"}
    assert not stream.assigned_by_record
    assert all(len(e.test) == 80 for e in stream), "one test part serves all"


@pytest.mark.reference
def test_copies_of_the_same_records_keep_their_ids(toy, avalanche):
    train, test = tensors(toy.train), tensors(toy.test)
    stream = from_avalanche(
        avalanche.nc_benchmark(
            [train, train],
            [test, test],
            2,
            task_labels=False,
            shuffle=False,
            one_dataset_per_exp=True,
            class_ids_from_zero_in_each_exp=True,
        )
    )
    assert stream.scenario == "domain"
    assert places(stream) == [set(range(400))] * 2
    assert {e.train.partition for e in stream} == {"avalanche"}
    assert stream.assigned_by_record


@pytest.mark.reference
def test_several_sources_have_ids_of_their_own(toy, avalanche):
    one, two = toy.train.take(torch.arange(100)), toy.train.take(torch.arange(100, 160))
    joined = ConcatDataset([tensors(one), tensors(two)])
    joined.targets = one.labels.tolist() + two.labels.tolist()
    stream = from_avalanche(avalanche.nc_benchmark(joined, tensors(toy.test), 2, task_labels=False, shuffle=False))
    assert set.union(*places(stream)) == set(range(160))
    for experience in stream:
        assert_same_rows(experience.train, toy.train)


@pytest.mark.reference
def test_the_newer_generators_of_avalanche(toy, avalanche):
    from avalanche.benchmarks.scenarios.supervised import class_incremental_benchmark
    from avalanche.benchmarks.utils import as_classification_dataset

    parts = {
        name: as_classification_dataset(tensors(part)) for name, part in (("train", toy.train), ("test", toy.test))
    }
    stream = from_avalanche(class_incremental_benchmark(parts, num_experiences=2, class_order=[0, 3, 2, 1]))
    assert [e.classes for e in stream] == [(0, 3), (1, 2)]
    for experience in stream:
        assert_same_rows(experience.train, toy.train)


@pytest.mark.reference
def test_what_is_no_benchmark_of_tensors_is_refused(toy, avalanche):
    with pytest.raises(ConfigError, match="benchmark = 'Dataset'"):
        from_avalanche(toy)
    pictures = avalanche.nc_benchmark(
        tensors(toy.train),
        tensors(toy.test),
        2,
        task_labels=False,
        eval_transform=lambda x: "a picture",
    )
    with pytest.raises(DataError, match="eval_transform"):
        from_avalanche(pictures)
