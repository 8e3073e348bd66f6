"""Checks that the holder of a data set makes before a curator holds the records.

Guarantee: none. Their answers depend on single records, so they are for the holder alone and
outside every privacy statement. Inside a curator nothing raises because of a record's values: an
error, or none, would tell of the record.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from perdure.data.experience import Stream
from perdure.errors import DataError
from perdure.utils.chunking import row_slices


def check_finite(streams: Iterable[Stream]) -> None:
    """Refuse training inputs that are NaN or infinite.

    >>> check_finite([stream])  # before a private run; `Learner.fit` does so by itself

    Args:
        streams: of all parties whose records are here.

    Raises:
        DataError: naming the first such value by experience, row and column.
    """
    seen: set[int] = set()
    for stream in streams:
        for experience in stream:
            records = experience.train
            if id(records.inputs) in seen:
                continue
            seen.add(id(records.inputs))
            found = first_not_finite(records.inputs)
            if found is None:
                continue
            row, column = found
            value = float(records.inputs[row][column])
            place = ", ".join(str(axis) for axis in column)
            raise DataError(
                f"experience {experience.index} of {stream.name} has {value} in row {row} (record "
                f"id {int(records.ids[row])}), column {place} of its training inputs; allowed: "
                "finite numbers; repair or leave out the row"
            )


def first_not_finite(inputs: Tensor) -> tuple[int, tuple[int, ...]] | None:
    """Return row and column of the first value of inputs (n, ...) that is NaN or infinite."""
    if not inputs.is_floating_point():
        return None
    for piece in row_slices(inputs, always=True):
        bad = ~torch.isfinite(inputs[piece])
        if bool(bad.any()):
            row, *column = bad.nonzero()[0].tolist()
            return piece.start + row, tuple(column)
    return None
