"""Checks of values that the holder of a data set makes before a curator holds the records.

Guarantee: none. The results depend on single records, so they are for the holder only and outside
every privacy statement. Inside a curator no error may depend on the values of a record, because the
error would reveal information about the record.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from perdure.data.experience import Stream
from perdure.data.record_identity import refuse_measured_records
from perdure.data.records import Records
from perdure.errors import DataError
from perdure.utils.checked_arguments import checked_arguments
from perdure.utils.chunking import row_slices


@checked_arguments
def check_finite(streams: Iterable[Stream], *, training: bool = True) -> None:
    """Refuse training and test inputs that are NaN or infinite.

    >>> check_finite([stream])  # before a private run; `Learner.fit` does so by itself

    Args:
        streams: the streams of all parties whose records this process holds.
        training: True to check training inputs, too.

    Raises:
        DataError: names the first such value by experience, row and column.
    """
    seen: set[int] = set()
    for stream in streams:
        for experience in stream:
            for part, records in (("training", experience.train), ("test", experience.test)):
                if id(records.inputs) in seen or (part == "training" and not training):
                    continue
                seen.add(id(records.inputs))
                where = f"experience {experience.index} of {stream.name}"
                _refuse_not_finite(records, part, where)


def _refuse_not_finite(records: Records, part: str, where: str) -> None:
    found = first_not_finite(records.inputs)
    if found is None:
        return
    row, column = found
    value = float(records.inputs[row][column])
    place = ", ".join(str(axis) for axis in column)
    raise DataError(
        f"{where} has {value} in row {row} (record id {int(records.ids[row])}), column {place} of "
        f"its {part} inputs; allowed: finite numbers; repair or leave out the row"
    )


def check_streams(streams: Sequence[Stream], *, training: bool) -> None:
    """Refuse inputs that are NaN or infinite, and records that are in training and evaluation.

    Args:
        streams: the streams of all parties whose records this process holds.
        training: True to check training inputs, which takes time. Without privacy they are checked
            only if a run ends in NaN.

    Raises:
        DataError: if a value or record is refused.
    """
    check_finite(streams, training=training)
    for stream in streams:
        refuse_measured_records(stream)


def first_not_finite(inputs: Tensor) -> tuple[int, tuple[int, ...]] | None:
    """Return row and column of the first value of inputs (n, ...) that is NaN or infinite."""
    if not inputs.is_floating_point():
        return None
    for piece in row_slices(inputs, always=True):
        rows = inputs[piece]
        # a sum is fast, and is not finite if a value is not
        if bool(rows.sum().isfinite()):
            continue
        bad = ~torch.isfinite(rows)
        if bool(bad.any()):
            row, *column = bad.nonzero()[0].tolist()
            return piece.start + row, tuple(column)
    return None
