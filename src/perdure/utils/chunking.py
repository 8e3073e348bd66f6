"""Cut batches into pieces that fit into memory, and fill up small batches."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

FEWEST_ROWS = 16
"""Fewest rows of a private batch that a model, or another function of records, gets.

Kernels for one row, or for three, round differently from kernels for many rows. So one more record
would change the rounding of the others; for inputs far from 0, before a normalisation or a softmax,
the difference can be large. No difference was found from 5 rows on; see the tests of slack.
"""


HELD_BYTES = 2**28
"""Largest size in bytes of rows that are copied at once; larger rows are read in pieces."""

PIECE_BYTES = 2**24
"""Number of bytes of one piece."""

PASS_BYTES = 2**20
"""Largest size in bytes of the inputs of one pass through a model without gradients, on a CPU."""

MOST_ROWS = 2048
"""Largest number of rows of such a pass."""

FEWEST_PASSED = 32
"""Number of rows of such a pass that large rows get, too."""


def row_slices(rows: Tensor, *, always: bool = False) -> Iterator[slice]:
    """Cut rows (n, ...) into pieces that may be copied; a single piece if the rows are small.

    Args:
        rows: tensor; only its shape and dtype are read.
        always: True to cut small rows as well.
    """
    n = len(rows)
    size = max(1, n)
    if always or rows.nbytes > HELD_BYTES:
        size = max(1, PIECE_BYTES * n // max(1, rows.nbytes))
    for start in range(0, max(1, n), size):
        yield slice(start, min(n, start + size))


def rows_per_pass(rows: Tensor) -> int:
    """Return the number of rows (n, ...) for one pass through a model without gradients.

    Large batches are slow on a CPU: layers of a convolutional network then exceed the caches, and
    the allocator returns and fetches their pages in every layer. With 64 rows of CIFAR-10 instead
    of 2,048, a pass of the CNN takes half the processor time.
    """
    if rows.device.type != "cpu" or not len(rows):
        return MOST_ROWS
    return min(MOST_ROWS, max(FEWEST_PASSED, PASS_BYTES * len(rows) // max(1, rows.nbytes)))


def by_pieces(answer: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Apply a model or another function to rows (n, ...) in passes; one pass for no rows."""
    size = rows_per_pass(rows)
    parts = [answer(rows[start : start + size]) for start in range(0, max(1, len(rows)), size)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def chunks(tensors: Mapping[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """Cut the rows (n, ...) into pieces of at most `size` rows.

    Clipping is per record, so a clipped sum over pieces is the same as over all rows.
    """
    n = len(next(iter(tensors.values())))
    for start in range(0, n, size):
        yield {name: value[start : start + size] for name, value in tensors.items()}


def filled_chunks(
    tensors: Mapping[str, Tensor], size: int, *, fill: bool = True
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Cut the rows into pieces, and fill up the last piece with copies.

    The last piece gets the size of the others; a single piece gets at least `FEWEST_ROWS` rows (or
    `size`, if that is smaller). So the rounding of a row does not depend on the number of rows.

    Args:
        tensors: name to (n, ...).
        size: largest number of rows in a piece.
        fill: False to leave the last piece unchanged.

    Returns:
        The pieces, each with the number of its rows before filling; these rows come first.
    """
    for i, piece in enumerate(chunks(tensors, size)):
        count = len(next(iter(piece.values())))
        least = min(size, FEWEST_ROWS) if i == 0 else size
        yield (filled(piece, least) if fill else piece), count


def filled(tensors: Mapping[str, Tensor], least: int = FEWEST_ROWS) -> dict[str, Tensor]:
    """Return the rows with copies of the first row at the end, so that there are `least` rows.

    Copies are used because they are finite if the row itself is; another row might raise an error
    in a loss, or spoil a sum. If there is no row, blank rows are used.

    Args:
        tensors: name to (n, ...).
        least: smallest number of rows.
    """
    missing = least - len(next(iter(tensors.values())))
    if missing <= 0:
        return dict(tensors)
    first = tensors if least > missing else blank_row(tensors)
    return {
        name: torch.cat([value, first[name][:1].expand(missing, *value.shape[1:])])
        for name, value in tensors.items()
    }


def blank_row(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return one row of zeros, with the shapes and dtypes of the rows in `tensors`."""
    return {name: value.new_zeros(1, *value.shape[1:]) for name, value in tensors.items()}
