"""Streams made from Avalanche benchmarks: the same rows, labels, ids and partitions."""

import warnings

import pytest
import torch
from torch.utils.data import ConcatDataset, TensorDataset

from helpers.toy_data import places
from perdure.avalanche.benchmarks import from_avalanche
from perdure.data.record_identity import refuse_records_in_two_partitions
from perdure.data.records import Records
from perdure.data.scenarios import online, split
from perdure.errors import ConfigError, DataError

# ---------------------------------------------------------------- Avalanche


@pytest.fixture(scope="module")
def avalanche():
    """Import the package, which warns about packages of its own that are no longer maintained."""
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
def test_a_class_incremental_benchmark_keeps_its_rows_and_ids(toy, avalanche):
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
def test_tasks_whose_labels_start_at_0_get_separate_outputs(toy, avalanche):
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
def test_the_eval_transform_is_applied_to_each_item(toy, avalanche):
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
def test_a_random_avalanche_split_is_not_assigned_by_record(toy, avalanche):
    benchmark = avalanche.ni_benchmark(
        tensors(toy.train), tensors(toy.test), 4, task_labels=False, seed=1
    )
    stream = from_avalanche(benchmark)
    assert stream.scenario == "domain"
    assert set.union(*places(stream)) == set(range(400))
    assert {e.train.partition for e in stream} == {"avalanche"}
    assert not stream.assigned_by_record
    assert all(len(e.test) == 80 for e in stream), "one test part serves all"


@pytest.mark.reference
def test_a_record_in_two_experiences_keeps_one_id(toy, avalanche):
    train = tensors(toy.train)
    test = tensors(toy.test)
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
@pytest.mark.parametrize("sources", ["one", "one tensor"])
def test_data_sets_over_the_same_inputs_share_a_partition(toy, avalanche, sources):
    """Disjoint classes do not imply disjoint records."""
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute

    source = TensorDataset(toy.train.inputs, toy.train.labels)
    coarse = toy.train.labels % 2

    def task(labels):
        held = source if sources == "one" else TensorDataset(toy.train.inputs, labels)
        targets = DataAttribute(labels.tolist(), "targets")
        tasks = DataAttribute([0] * len(labels), "targets_task_labels")
        return AvalancheDataset([held], data_attributes=[targets, tasks])

    parts = [task(coarse), task(2 + coarse)]
    stream = from_avalanche(benchmark_from_datasets(train=parts, test=parts))
    assert [e.classes for e in stream] == [(0, 1), (2, 3)]
    assert places(stream) == [set(range(400))] * 2
    assert {e.train.partition for e in stream} == {"avalanche"}
    assert stream.assigned_by_record
    refuse_records_in_two_partitions([stream])


@pytest.mark.reference
def test_several_source_data_sets_get_separate_ids(toy, avalanche):
    one = toy.train.take(torch.arange(100))
    two = toy.train.take(torch.arange(100, 160))
    joined = ConcatDataset([tensors(one), tensors(two)])
    joined.targets = one.labels.tolist() + two.labels.tolist()
    stream = from_avalanche(
        avalanche.nc_benchmark(joined, tensors(toy.test), 2, task_labels=False, shuffle=False)
    )
    assert set.union(*places(stream)) == set(range(160))
    for experience in stream:
        assert_same_rows(experience.train, toy.train)


@pytest.mark.reference
def test_benchmarks_of_newer_avalanche_generators_work(toy, avalanche):
    from avalanche.benchmarks.scenarios.supervised import class_incremental_benchmark
    from avalanche.benchmarks.utils import as_classification_dataset

    parts = {
        name: as_classification_dataset(tensors(part))
        for name, part in (("train", toy.train), ("test", toy.test))
    }
    stream = from_avalanche(
        class_incremental_benchmark(parts, num_experiences=2, class_order=[0, 3, 2, 1])
    )
    assert [e.classes for e in stream] == [(0, 3), (1, 2)]
    for experience in stream:
        assert_same_rows(experience.train, toy.train)


@pytest.mark.reference
def test_from_avalanche_refuses_objects_that_are_no_benchmark(toy, avalanche):
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


@pytest.mark.reference
def test_from_avalanche_refuses_data_without_targets(toy, avalanche):
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import AvalancheDataset, as_classification_dataset
    from avalanche.benchmarks.utils.data_attribute import DataAttribute

    known = as_classification_dataset(tensors(toy.train))
    bare = AvalancheDataset([TensorDataset(toy.train.inputs, toy.train.labels)])
    with pytest.raises(DataError, match="training experience 1 has no targets"):
        from_avalanche(benchmark_from_datasets(train=[known, bare], test=[known]))
    with pytest.raises(DataError, match="test experience 0 has no targets"):
        from_avalanche(benchmark_from_datasets(train=[known], test=[bare]))
    for target in (0.5, -1, (0, 1)):
        other = TensorDataset(toy.train.inputs, toy.train.labels)
        attribute = DataAttribute([target] * len(other), "targets")
        measured = AvalancheDataset([other], data_attributes=[attribute])
        with pytest.raises(DataError, match="training experience 0 has the target"):
            from_avalanche(benchmark_from_datasets(train=[measured], test=[known]))


@pytest.mark.reference
def test_assigned_by_record_is_unknown_if_records_are_left_out(toy, avalanche):
    from avalanche.benchmarks.scenarios import benchmark_with_validation_stream

    benchmark = avalanche.nc_benchmark(
        tensors(toy.train), tensors(toy.test), 2, task_labels=False, shuffle=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cut = benchmark_with_validation_stream(benchmark, validation_size=0.25, shuffle=True)
    assert from_avalanche(benchmark).assigned_by_record is True
    assert from_avalanche(cut).assigned_by_record is None
    assert from_avalanche(cut, assigned_by_record=True).assigned_by_record is True


@pytest.mark.reference
def test_from_avalanche_takes_declared_sizes_and_row_number_ids(toy, avalanche):
    benchmark = avalanche.nc_benchmark(
        tensors(toy.train), tensors(toy.test), 2, task_labels=False, shuffle=False
    )
    stream = from_avalanche(benchmark, declared_size=[210, 190])
    assert [e.train.declared_size for e in stream] == [210, 190]
    assert all(e.train.size_counted for e in from_avalanche(benchmark))
    assert online(stream, chunk=10, exact=False).assigned_by_record is False
