"""Streams: experience, label, id and partition of each record."""

from dataclasses import replace

import pytest
import torch

from helpers.toy_data import places
from perdure.data.datasets.base import Dataset
from perdure.data.datasets.breast_cancer import breast_cancer
from perdure.data.datasets.digits import digits
from perdure.data.experience import Experience, Stream
from perdure.data.records import Records
from perdure.data.scenarios import blurry, online, permute, permuted, rotate, rotated, split
from perdure.errors import ConfigError, DataError

# ---------------------------------------------------------------- split


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_class_and_task_splits_keep_labels_and_all_classes(scenario):
    data = digits()
    stream = split(data, scenario=scenario, experiences=5)
    assert (len(stream), stream.num_classes, stream.scenario) == (5, 10, scenario)
    for e, experience in enumerate(stream):
        assert experience.classes == (2 * e, 2 * e + 1)
        for part in (experience.train, experience.test):
            assert set(part.labels.tolist()) == {2 * e, 2 * e + 1}
    assert sum(len(experience.train) for experience in stream) == len(data.train)
    assert sum(len(experience.test) for experience in stream) == len(data.test)


def test_a_domain_split_relabels_classes_within_each_slice():
    data = digits()
    stream = split(
        data, scenario="domain", experiences=5, class_order=[8, 3, *(0, 1, 2, 4, 5, 6, 7, 9)]
    )
    assert (stream.num_classes, stream[0].classes) == (2, (0, 1))
    original = dict(zip(data.train.ids.tolist(), data.train.labels.tolist(), strict=True))
    first = stream[0].train
    assert {
        (original[i], label)
        for i, label in zip(first.ids.tolist(), first.labels.tolist(), strict=True)
    } == {
        (8, 0),
        (3, 1),
    }
    assert set(stream[4].test.labels.tolist()) == {0, 1}


def test_split_accepts_unequal_increments(toy):
    stream = split(toy, scenario="class", increments=(1, 2, 1), class_order=(3, 1, 0, 2))
    assert [each.classes for each in stream] == [(3,), (1, 0), (2,)]
    assert [len(each.train) for each in stream] == [100, 200, 100]
    declared = replace(toy, train=toy.train.declared(800))
    sizes = [e.train.declared_size for e in split(declared, scenario="task", increments=(1, 3))]
    assert sizes == [200, 600]
    equal, same = (split(toy, scenario="class", **cut) for cut in CUTS)
    assert [e.train.placed_by for e in equal] == [e.train.placed_by for e in same]


CUTS = ({"experiences": 2}, {"increments": (2, 2)})


def test_a_split_keeps_inputs_labels_and_ids_together(toy):
    for experience in split(toy, scenario="class", experiences=2, class_order=[2, 0, 3, 1]):
        for part, source, first in (
            (experience.train, toy.train, 0),
            (experience.test, toy.test, 400),
        ):
            rows = part.ids - first
            assert torch.equal(part.inputs, source.inputs[rows])
            assert torch.equal(part.labels, source.labels[rows])


def test_the_experiences_of_a_split_are_separate_partitions(toy):
    stream = split(toy, scenario="class", experiences=2)
    assert [experience.train.partition for experience in stream] == ["experience-0", "experience-1"]
    assert [experience.train.declared_size for experience in stream] == [200, 200]
    assert {experience.test.partition for experience in stream} == {"toy-test"}
    assert stream.assigned_by_record


def test_split_with_a_seed_has_a_random_class_order(toy):
    orders = {
        seed: [e.classes for e in split(toy, scenario="class", experiences=4, seed=seed)]
        for seed in range(5)
    }
    assert len({tuple(order) for order in orders.values()}) > 1
    assert orders[3] == [e.classes for e in split(toy, scenario="class", experiences=4, seed=3)]


def test_split_accepts_a_class_without_records(toy):
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
        ("slices", {"scenario": "class"}),
        ("slices", {"scenario": "class", "experiences": 2, "increments": (2, 2)}),
        ("increments", {"scenario": "class", "increments": (1, 2)}),
        ("increments", {"scenario": "class", "increments": (4, 0)}),
        ("increments", {"scenario": "domain", "increments": (1, 3)}),
        ("class_order", {"scenario": "class", "experiences": 2, "class_order": [0, 1, 2, 2]}),
        ("class_order", {"scenario": "class", "experiences": 2, "class_order": [0, 1, 2]}),
        ("seed", {"scenario": "class", "experiences": 2, "class_order": [0, 1, 2, 3], "seed": 1}),
    ],
)
def test_split_refuses_an_invalid_argument_in_one_line(toy, field, arguments):
    with pytest.raises(ConfigError, match=rf"^{field} = [^\n]*$"):
        split(toy, **arguments)


# ---------------------------------------------------------------- permuted and rotated copies


def test_permuted_experiences_contain_the_same_records(toy):
    stream = permuted(toy, experiences=3, seed=1)
    assert stream.scenario == "domain"
    assert stream.num_classes == 4
    assert torch.equal(stream[0].train.inputs, toy.train.inputs)
    for experience in stream:
        assert experience.train.partition == "toy", "one image is one record, and its uses compose"
        assert torch.equal(experience.train.ids, toy.train.ids)
        assert torch.equal(experience.train.labels, toy.train.labels)
    one = stream[1].train.inputs
    two = stream[2].train.inputs
    assert not torch.equal(one, two)
    assert torch.equal(one.flatten(1).sort().values, toy.train.inputs.flatten(1).sort().values)


def test_permuted_uses_one_permutation_for_train_and_test(toy):
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


def test_permuted_streams_depend_on_the_seed(toy):
    same, other = (permuted(toy, experiences=2, seed=seed)[1].train.inputs for seed in (0, 1))
    assert torch.equal(same, permuted(toy, experiences=2)[1].train.inputs)
    assert not torch.equal(same, other)
    assert not torch.equal(
        permuted(toy, experiences=1, first_identity=False)[0].train.inputs, toy.train.inputs
    )


@pytest.mark.parametrize("scenario", ["task", "class"])
def test_permuted_class_streams_have_new_classes_per_experience(toy, scenario):
    stream = permuted(toy, experiences=3, scenario=scenario)
    assert stream.num_classes == 12
    assert stream[2].classes == (8, 9, 10, 11)
    assert torch.equal(stream[2].train.labels, toy.train.labels + 8)
    assert torch.equal(stream[2].test.labels, toy.test.labels + 8)


def test_permuted_accepts_a_table_and_rotated_refuses_one():
    table = breast_cancer()
    assert permuted(table, experiences=2)[1].train.inputs.shape == table.train.inputs.shape
    with pytest.raises(ConfigError, match="input_shape"):
        rotated(table)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotations_by_right_angles_are_exact(turns):
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(
        rotate(images, degrees=90 * turns), images.rot90(turns, (-2, -1)), atol=1e-5, rtol=0
    )


def test_rotating_a_non_square_image_keeps_distances():
    """A bright pixel keeps its distance from the centre."""
    image = torch.zeros(1, 1, 9, 17)
    image[0, 0, 4, 12] = 1  # four to the right of the centre
    turned = rotate(image, degrees=90)
    assert turned[0, 0, 0, 8] == pytest.approx(1, abs=1e-5)  # four above it


def test_rotated_experiences_contain_the_same_records(toy):
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
def test_permuted_and_rotated_refuse_invalid_arguments(toy, make, arguments, field):
    with pytest.raises(ConfigError, match=field):
        make(toy, **arguments)


# ---------------------------------------------------------------- the types


def test_a_stream_is_a_sequence_with_a_short_repr(toy):
    stream = split(toy, scenario="class", experiences=2)
    assert list(stream) == [stream[0], stream[1]] == [*stream.experiences]
    assert stream[-1] is stream[1]
    assert (
        repr(stream)
        == "Stream('split-toy', class-incremental, 2 experiences, 4 classes, inputs (1, 4, 6))"
    )


def test_moving_a_stream_to_a_device_copies_shared_records_once(toy, monkeypatch):
    """The machine may have only one device, so a copy stands in for the move."""

    def copied(self, device):
        return replace(
            self, inputs=self.inputs.clone(), labels=self.labels.clone(), ids=self.ids.clone()
        )

    stream = online(split(toy, scenario="class", experiences=2), chunk=50)
    assert stream.to("cpu") is stream
    monkeypatch.setattr(Records, "to", copied)
    there = stream.to("elsewhere")
    assert there[0].test is there[1].test is not stream[0].test
    assert there[0].train is not stream[0].train
    assert places(there) == places(stream)
    assert there[-1].stage == 1
    assert there.assigned_by_record == stream.assigned_by_record


def test_an_experience_refuses_undeclared_labels(toy):
    with pytest.raises(
        DataError,
        match=r"experience 0 has train labels \[2, 3\]; allowed: the declared classes \(0, 1\)",
    ):
        Experience(
            index=0, train=toy.train, test=toy.test.take(toy.test.labels < 2), classes=(0, 1)
        )


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("scenario", {"scenario": "instance"}),
        ("experiences", {"experiences": ()}),
        ("classes", {"num_classes": 3}),
    ],
)
def test_a_stream_refuses_an_invalid_field(toy, field, change):
    good = {
        "name": "toy",
        "scenario": "class",
        "experiences": split(toy, scenario="class", experiences=1).experiences,
        "num_classes": 4,
        "input_shape": (1, 4, 6),
    }
    with pytest.raises(ConfigError, match=field):
        Stream(**(good | change))


def test_a_stream_refuses_experiences_out_of_order(toy):
    first, second = split(toy, scenario="class", experiences=2)
    with pytest.raises(ConfigError, match="experiences"):
        Stream(
            name="x",
            scenario="class",
            experiences=(second, first),
            num_classes=4,
            input_shape=(1, 4, 6),
        )


# ---------------------------------------------------------------- declared sizes


def sizes(stream):
    return [(e.train.declared_size, e.train.size_counted) for e in stream]


def declaring(toy, size):
    return replace(toy, train=toy.train.declared(size))


@pytest.mark.parametrize(
    "build",
    [
        lambda data, **size: split(data, scenario="class", experiences=2, **size),
        lambda data, **size: split(data, scenario="domain", experiences=2, **size),
        lambda data, **size: blurry(data, experiences=2, **size),
        lambda data, **size: permuted(data, experiences=2, **size),
        lambda data, **size: rotated(data, angles=(0.0, 90.0), **size),
    ],
)
def test_every_splitter_accepts_a_declared_size(toy, build):
    assert {counted for _, counted in sizes(build(toy))} == {True}
    assert sizes(build(toy, declared_size=77)) == [(77, False)] * 2
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(ConfigError, match=r"declared_size = .* whole number"):
            build(toy, declared_size=wrong)


def test_declared_sizes_can_differ_between_experiences(toy):
    stream = split(toy, scenario="class", experiences=2, declared_size=[90, 110])
    assert sizes(stream) == [(90, False), (110, False)]
    with pytest.raises(
        ConfigError, match=r"declared_size = \(90,\) .* or 2 numbers, one per experience"
    ):
        split(toy, scenario="class", experiences=2, declared_size=(90,))


def test_experience_sizes_follow_from_the_declared_size(toy):
    data = declaring(toy, 1000)
    assert sizes(split(data, scenario="class", experiences=4)) == [(250, False)] * 4
    assert sizes(permuted(data, experiences=3)) == [(1000, False)] * 3
    # a tenth of each blurry class leaves: of 250 records, 25 are expected in the other experience
    stream = blurry(data, experiences=2, blurry_share=0.1, disjoint_share=0.75, seed=3)
    come = [
        25 * len(set(e.classes) - home) for e, home in zip(stream, ({0, 1}, {2, 3}), strict=True)
    ]
    assert sorted(come) == [0, 25]
    expected = [500 + come[0] - come[1], 500 + come[1] - come[0]]
    assert [size for size, _ in sizes(stream)] == expected


def test_size_counted_is_true_without_declared_size(toy):
    train = toy.train
    assert train.size_counted and train.take(torch.arange(5)).size_counted
    declared = train.declared(400)
    assert not declared.size_counted and not declared.to("cpu").size_counted
    assert declared.take(torch.arange(5)).size_counted
    assert train.declared(None) is train
    assert not replace(train, declared_size=401).size_counted


def test_ids_by_position_is_true_without_given_ids():
    rows = {"inputs": torch.zeros(3, 2), "labels": torch.zeros(3).long()}
    plain = Records(**rows)
    own = Records(**rows, ids=torch.tensor([4, 9, 2]))
    assert plain.ids_by_position and plain.take(torch.tensor([1])).ids_by_position
    assert not own.ids_by_position and not own.take(torch.tensor([1])).ids_by_position


def test_a_hand_made_stream_has_assigned_by_record_none(toy):
    part = split(toy, scenario="class", experiences=1)
    stream = Stream(
        name="mine",
        scenario="class",
        experiences=part.experiences,
        num_classes=4,
        input_shape=toy.input_shape,
    )
    assert stream.assigned_by_record is None
