"""Cut batches into pieces that fit into memory, and fill small ones up."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

FEWEST_ROWS = 16
"""Rows of the smallest private batch that a model, or another function of records, is shown.

Kernels for one row, or for three, round otherwise than those for many. So one record more would
change the rounding of the others, and on inputs far from 0, before a normalisation or a softmax,
that is no rounding any more. Nothing was found to change from 5 rows on; see the tests of slack.
"""


HELD_BYTES = 2**28
"""Most bytes of rows that are copied as a whole; of more, pieces are read one after another."""

PIECE_BYTES = 2**24
"""Bytes of such a piece."""


def row_slices(rows: Tensor, *, always: bool = False) -> Iterator[slice]:
    """Cut the rows (n, ...) into pieces that may be copied: one where all of them are small.

    Args:
        rows: of which shape and dtype are read only.
        always: whether small ones are cut as well.
    """
    n = len(rows)
    size = max(1, n)
    if always or rows.nbytes > HELD_BYTES:
        size = max(1, PIECE_BYTES * n // max(1, rows.nbytes))
    for start in range(0, max(1, n), size):
        yield slice(start, min(n, start + size))


def by_pieces(answer: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Answer (n, ...) for rows (n, ...): all at once where they are small, else piece by piece."""
    parts = [answer(rows[piece]) for piece in row_slices(rows)]
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
    """Cut the rows into pieces, and fill up the last one.

    It gets the size of the others, or, where there are none, `FEWEST_ROWS` rows (`size`, where that
    is less): how a row is rounded then does not depend on how many others there are.

    Args:
        tensors: name to (n, ...).
        size: largest number of rows in a piece.
        fill: False to leave the last piece as it is.

    Returns:
        the pieces, each with the number of its rows that are no filling. They come first.
    """
    for i, piece in enumerate(chunks(tensors, size)):
        count = len(next(iter(piece.values())))
        least = min(size, FEWEST_ROWS) if i == 0 else size
        yield (filled(piece, least) if fill else piece), count


def filled(tensors: Mapping[str, Tensor], least: int = FEWEST_ROWS) -> dict[str, Tensor]:
    """Add copies of the first row behind the rows, until there are `least`.

    Copies, because they run wherever the row itself runs, and are finite where it is: another row
    might make a loss raise, or spoil a sum. Without any row the filling is blank.

    Args:
        tensors: name to (n, ...).
        least: rows there must be.
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
    """One row of zeros like the rows of `tensors`, of which there may be none."""
    return {name: value.new_zeros(1, *value.shape[1:]) for name, value in tensors.items()}
