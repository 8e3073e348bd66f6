"""Rows of a batch by position."""

from dataclasses import fields, replace

import pytest
import torch

from perdure.data.records import Batch, Records
from perdure.errors import DataError


def test_batch_take_returns_rows_at_the_given_positions():
    rng = torch.Generator().manual_seed(0)
    records = Records(
        inputs=torch.randn(9, 2, generator=rng), labels=torch.arange(9) % 3, ids=torch.arange(9) + 5
    )
    rows = Batch.current(records, 2).tensors() | {"stored.logits": torch.randn(9, 3, generator=rng)}
    batch = Batch.from_tensors(rows)
    places = torch.tensor([4, 0, 4, 8])
    expected = {name: value[places] for name, value in batch.tensors().items()}
    for taken in (batch.at(places), batch.take(places), batch.take(torch.tensor([4, 0, 4, -1]))):
        assert taken.tensors().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in taken.tensors().items())


@pytest.mark.parametrize("places", [[2, 3, 4], [0, 3, 8], [], [8], list(range(9))])
def test_batch_among_returns_the_rows_of_a_mask(places):
    batch = Batch.current(Records(inputs=torch.randn(9, 2), labels=torch.arange(9) % 3), 2)
    mask = torch.zeros(9, dtype=torch.bool)
    mask[places] = True
    expected = batch.take(mask).tensors()
    for name, value in batch.among(mask).tensors().items():
        assert torch.equal(value, expected[name])


def test_take_keeps_attributes_with_their_records():
    records = Records(
        inputs=torch.randn(4, 2),
        labels=torch.arange(4),
        attributes={
            "time": torch.tensor([3.0, 1.0, 2.0, 0.0]),
            "group": torch.tensor([0, 1, 1, 0]),
        },
    )
    taken = records.take(torch.tensor([2, 0])).to("cpu")
    assert taken.attributes["time"].tolist() == [2.0, 3.0]
    assert taken.attributes["group"].tolist() == [1, 0]
    assert records.take(records.attributes["group"] == 1).labels.tolist() == [1, 2]


@pytest.mark.parametrize("value", [torch.zeros(3), torch.zeros(4, 1), [0, 1, 2, 3]])
def test_an_attribute_without_one_number_per_record_is_refused(value):
    with pytest.raises(DataError, match=r"attribute 'time' is .*; allowed: a tensor \(4,\)"):
        Records(inputs=torch.zeros(4, 2), labels=torch.arange(4), attributes={"time": value})


def test_taken_records_have_every_field_of_made_ones():
    rng = torch.Generator().manual_seed(0)
    whole = Records(
        inputs=torch.randn(9, 2, generator=rng),
        labels=torch.arange(9) % 3,
        partition="part",
        declared_size=12,
        weights=torch.rand(9, generator=rng),
        attributes={"time": torch.arange(9.0)},
        public_facts=("classes",),
    )
    places = torch.tensor([4, 0, 8])
    made = replace(
        whole,
        inputs=whole.inputs[places],
        labels=whole.labels[places],
        ids=whole.ids[places],
        weights=whole.weights[places],
        attributes={"time": whole.attributes["time"][places]},
        declared_size=0,
    )
    taken = whole.take(places)
    for field in fields(Records):
        own, other = getattr(taken, field.name), getattr(made, field.name)
        if field.name == "attributes":
            own, other = own["time"], other["time"]
        same = torch.equal(own, other) if isinstance(own, torch.Tensor) else own == other
        assert same, field.name


def test_records_that_are_on_a_device_are_not_copied_to_it():
    records = Records(inputs=torch.randn(4, 2), labels=torch.arange(4))
    assert records.to("cpu") is records
    assert records.take(torch.tensor([1, 2])).to("meta").labels.device.type == "meta"


def test_take_selects_records_by_position_mask_or_slice():
    records = Records(inputs=torch.arange(8.0).view(4, 2), labels=torch.tensor([0, 1, 0, 1]))
    mask = torch.tensor([False, True, True, False])
    for index in (torch.tensor([1, 2]), torch.tensor([-3, -2]), mask, slice(1, 3)):
        assert records.take(index).ids.tolist() == [1, 2]
