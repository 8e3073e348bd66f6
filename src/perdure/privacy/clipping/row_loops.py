"""Compiled loops that clip per-record rows in one pass over memory, where torch needs many.

Every loop has the same result as the function of torch that it replaces (in `clip`): the same
integers, and norms that differ only by the order of a sum in float64. Numba is loaded for the first
long row, and compiles in two seconds.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

LONG_ROW = 2**11
"""Shortest row, in numbers, for which the compiled loops are loaded.

The choice uses the length, which is public, and not the number of records, because it changes how a
row is rounded.
"""

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


class RowLoops(NamedTuple):
    """Compiled loops over the rows of a table.

    Args:
        add_squares: adds the squared norm of each row to an array, one entry per row.
        add_grid_rows: rounds the rows to whole grid steps, adds them to one sum, and adds the
            squared norm of each rounded row to an array.
    """

    add_squares: Callable[[Floats, Doubles], None]
    add_grid_rows: Callable[[Floats, Doubles, Doubles, Doubles], None]


def takes(rows: dict[str, Tensor]) -> bool:
    """Return True if the rows are long enough for the compiled loops, float32, and on the CPU."""
    numbers = sum(row[:1].numel() for row in rows.values())
    return numbers >= LONG_ROW and all(
        row.dtype is torch.float32 and row.device.type == "cpu" for row in rows.values()
    )


def table_of(rows: Tensor) -> Floats:
    """View the rows as a table (n, numbers); a copy if they are not contiguous."""
    table: Floats = rows.detach().reshape(len(rows), -1).contiguous().numpy()
    return table


@cache
def row_loops() -> RowLoops:
    """Compile the loops, once per process."""
    import numba

    # only the order in which terms of a sum are added may change
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
        if scale != 0.0:  # a row with scale 0 may contain NaN
            for j in range(rows.shape[1]):
                units = np.rint(np.float64(rows[i, j]) * scale)
                own += units * units
                total[j] += units
        squares[i] += own
