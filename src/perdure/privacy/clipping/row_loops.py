"""Compiled loops over the rows of records: one pass over them where torch takes many.

Every loop gives what its counterpart by torch in `clip` gives: the same integers, and norms that
differ in the order of a sum in float64. Numba is loaded at the first long row, and compiles in two
seconds.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

LONG_ROW = 2**11
"""Numbers in a record's row from which loading the loops pays.

It is a length, which is public, and not a number of records: how a row is rounded depends on it.
"""

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


class RowLoops(NamedTuple):
    """The loops.

    Args:
        add_squares: adds the squares of each row to its place.
        add_grid_rows: adds the rows, in whole grid steps, to a sum, and the squares of each row,
            in whole grid steps, to its place.
    """

    add_squares: Callable[[Floats, Doubles], None]
    add_grid_rows: Callable[[Floats, Doubles, Doubles, Doubles], None]


def takes(rows: dict[str, Tensor]) -> bool:
    """Return True for rows long enough for the loops, in float32 and in the processor's memory."""
    numbers = sum(row[:1].numel() for row in rows.values())
    return numbers >= LONG_ROW and all(
        row.dtype is torch.float32 and row.device.type == "cpu" for row in rows.values()
    )


def table_of(rows: Tensor) -> Floats:
    """(n, numbers) view of the rows, or a copy where they are not in order."""
    table: Floats = rows.detach().reshape(len(rows), -1).contiguous().numpy()
    return table


@cache
def row_loops() -> RowLoops:
    """Compile the loops."""
    import numba

    # terms of a sum may be added in any order, several at a time; nothing else may change
    jit: Any = numba.njit(nogil=True, fastmath={"reassoc"})
    return RowLoops(jit(_add_squares), jit(_add_grid_rows))


def _add_squares(rows: Floats, squares: Doubles) -> None:
    for i in range(len(rows)):
        total = 0.0
        for j in range(rows.shape[1]):
            value = np.float64(rows[i, j])
            total += value * value
        squares[i] += total


def _add_grid_rows(rows: Floats, scales: Doubles, total: Doubles, squares: Doubles) -> None:
    for i in range(len(rows)):
        scale = scales[i]
        own = 0.0
        if scale != 0.0:  # a row of scale 0 may hold what is not a number
            for j in range(rows.shape[1]):
                units = np.rint(np.float64(rows[i, j]) * scale)
                own += units * units
                total[j] += units
        squares[i] += own
