"""Rows of a batch by position."""

import torch

from perdure.data.records import Batch, Records


def test_rows_at_positions_are_those_that_an_index_takes():
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
