"""Conversion of a user's arrays to tensors; errors name the row and column of a bad value.

Guarantee: none. A message may quote a value, so it is for the holder of the data only, before a
curator holds the records.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from perdure.data.row_view import changed_rows
from perdure.data.value_checks import first_not_finite
from perdure.errors import DataError
from perdure.utils.chunking import row_slices

TEXT_KINDS = "OSU"
"""Kinds of NumPy arrays that may contain words."""
KINDS = {"U": "words", "S": "words", "O": "objects", "M": "dates", "m": "spans of time"}
"""Kinds of NumPy arrays without numbers, and their description."""
LARGEST = 2**63 - 1
"""Largest int64."""
WIDER = {"uint16": "int64", "uint32": "int64", "uint64": "int64", "float128": "float64"}
"""Types of numbers that torch does not support, and the types that they are converted to."""


def array_of(value: object, name: str) -> NDArray[Any] | Tensor:
    """Return tensors unchanged, and convert other values with one row per record to an array.

    Args:
        value: a tensor, an array, a column of a table, or a list of numbers, words or tensors.
        name: name of the argument, for the message.

    Raises:
        DataError: if the value cannot be an array.
    """
    if isinstance(value, Tensor):
        if value.is_meta:
            raise DataError(f"{name} are on the device 'meta', without values; load them first")
        return value.detach()
    _refuse_others(value, name)
    if isinstance(value, list | tuple) and value and all(isinstance(v, Tensor) for v in value):
        return _stacked(value, name)
    try:
        found = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{name} have rows of different lengths; allowed: rows of one shape; "
            "perdure.data.from_tokens pads sequences"
        ) from error
    masked = int(np.ma.getmaskarray(value).sum()) if isinstance(value, np.ma.MaskedArray) else 0
    if masked:
        raise DataError(
            f"{name} are a masked array, with {masked} values masked; allowed: "
            "an array with all values; fill it, as in array.filled(0), or leave the rows out"
        )
    if found.dtype.name == "uint64" and found.size and found.max() > LARGEST:
        raise DataError(
            f"{name} have {found.max()}; allowed: whole numbers up to {LARGEST}; convert inputs to "
            "float32, and ids to words"
        )
    if found.dtype.name in WIDER:
        found = found.astype(WIDER[found.dtype.name])
    if not found.dtype.isnative:
        found = found.astype(found.dtype.newbyteorder("="))
    return found


def pixels_of(value: object) -> NDArray[Any] | None:
    """Return a PIL image as bytes (height, width) or (height, width, 3); None for other values.

    Args:
        value: any value; palettes and transparency are converted to red, green and blue.
    """
    mode = getattr(value, "mode", None)
    if mode is None or not hasattr(value, "getbands") or not hasattr(value, "convert"):
        return None
    plain = value if mode in ("L", "RGB") else value.convert("L" if mode == "1" else "RGB")
    return np.asarray(plain)


def _refuse_others(value: object, name: str) -> None:
    """Refuse a data frame, data set or mapping; the message names the function that reads it."""
    kind = type(value).__name__
    if kind == "DataFrame":
        fix = "perdure.data.from_pandas(table, target='column') takes a table"
    elif isinstance(value, Mapping):
        keys = ", ".join(map(repr, list(value)[:5]))
        fix = f"choose one by its key, such as {name}[{next(iter(value), 'key')!r}]; it has {keys}"
    elif isinstance(value, str | bytes) or hasattr(value, "__fspath__"):
        fix = "load it first; perdure.data.from_folder reads a folder of images"
    elif hasattr(value, "__array__") or isinstance(value, Sequence):
        return
    elif hasattr(value, "__getitem__") and hasattr(value, "__len__"):
        fix = "perdure.data.from_torch takes a dataset"
    else:
        fix = "numpy.asarray or torch.as_tensor may convert it"
    raise DataError(f"{name} are a {kind}; allowed: an array, a tensor or a list; {fix}")


def _stacked(rows: Sequence[Tensor], name: str) -> Tensor:
    for number, row in enumerate(rows):
        if row.shape != rows[0].shape:
            raise DataError(
                f"{name} have shape {tuple(row.shape)} in row {number} and "
                f"{tuple(rows[0].shape)} in row 0; allowed: rows of one shape"
            )
    return torch.stack(list(rows)).detach()


def numbers_of(value: object, name: str) -> Tensor:
    """Convert an array of numbers to a tensor, without a copy if possible.

    Args:
        value: numbers, in a form that `array_of` takes.
        name: name of the argument, for the message.

    Raises:
        DataError: if the values are words, dates or complex, or rows have different lengths.
    """
    found = array_of(value, name)
    if isinstance(found, np.ndarray):
        if found.dtype.kind not in "biuf":
            raise DataError(
                f"{name} are {KINDS.get(found.dtype.kind, found.dtype.name)}"
                f"{_example(found)}; allowed: numbers; "
                "perdure.data.from_pandas turns words and dates into numbers"
            )
        if any(stride < 0 for stride in found.strides):
            found = np.ascontiguousarray(found)
        with warnings.catch_warnings():
            # a read-only array, such as a mapped file, is allowed, because arrays of a user are
            # never changed
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            found = torch.from_numpy(found)
    if found.is_complex() or found.layout != torch.strided or found.is_quantized:
        raise DataError(f"{name} are {found.dtype}, {found.layout}; allowed: dense real numbers")
    return found


def _example(values: NDArray[Any]) -> str:
    return f", such as {values.flat[0]}" if values.size else ""


def as_float32(values: Tensor, name: str, notes: dict[str, None]) -> Tensor:
    """Convert numbers to float32, and add a note about it.

    Args:
        values: (n, ...) numbers.
        name: name of the argument, for note and message.
        notes: notes about changes to the data, to which one is added.
    """
    if values.dtype == torch.float32:
        return values
    notes[f"{name} were {str(values.dtype).removeprefix('torch.')}; they are float32 now"] = None
    return changed_rows(values, Tensor.float)


def refuse_not_finite(values: Tensor, name: str, columns: Sequence[str] = ()) -> None:
    """Refuse NaN and infinity; the message has the row and the column of the first one.

    Args:
        values: (n, ...) numbers.
        name: name of the argument and its part, for the message.
        columns: names of the columns of values (n, k), if they have names.

    Raises:
        DataError: names row and column.
    """
    found = first_not_finite(values)
    if found is None:
        return
    row, column = found
    raise DataError(
        f"{name} have {float(values[row][column])} in row {row}{_told(column, columns)}; allowed: "
        "finite float32 numbers; repair or leave out the row"
    )


def refuse_outside(
    values: Tensor, low: Tensor, high: Tensor, name: str, columns: Sequence[str] = ()
) -> None:
    """Refuse values outside a declared range; the message has row and column of the first one.

    Args:
        values: (n, ...) numbers.
        low: smallest allowed value, which broadcasts to one row.
        high: largest allowed value.
        name: name of the argument and its part, for the message.
        columns: names of the columns of values (n, k), if they have names.

    Raises:
        DataError: names row and column.
    """
    for piece in row_slices(values, always=True):
        rows = values[piece]
        outside = (rows < low) | (rows > high)
        if not bool(outside.any()):
            continue
        row, *column = outside.nonzero()[0].tolist()
        least = float(low.expand(rows.shape[1:])[tuple(column)])
        most = float(high.expand(rows.shape[1:])[tuple(column)])
        raise DataError(
            f"{name} have {float(rows[row][tuple(column)]):g} in row {piece.start + row}"
            f"{_told(tuple(column), columns)}; allowed: the declared range {least:g} to {most:g}; "
            "clip the values, or declare the range that values may have"
        )


def _told(column: tuple[int, ...], columns: Sequence[str]) -> str:
    if columns and len(column) == 1:
        return f", column {columns[column[0]]!r}"
    return f", column {', '.join(map(str, column))}" if column else ""
