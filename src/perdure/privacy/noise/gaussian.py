"""Sampler of the rounded Gaussian that uses secret random words and integer operations only.

Coordinate i of a draw reads word i of one stream, 64 bits, and this decides 99 of 100 draws. The
other draws (at the threshold of a column, with an integer of a cell that is not kept at once, or in
the tail) use further words of the same coordinate, read from blocks that are numbered by coordinate
and attempt. So every coordinate has its own counter, and a draw in several pieces, or on another
device, gives the same integers.

The time of a draw depends on its result, so do not let others measure it.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from perdure.privacy.noise.compiled import gaussian_loops
from perdure.privacy.noise.fixed_point import share_of, upper_product
from perdure.privacy.noise.table import (
    COLUMN_BITS,
    CUT_BITS,
    EARLY_BITS,
    MISSING_BITS,
    GaussianTable,
    Integers,
    Small,
    Words,
)

Stream = Callable[[int], npt.NDArray[np.uint8]]
"""Function from n to the next n bytes of the first words; valid until the next call."""
Blocks = Callable[[Words], Words]
"""Function from numbers of blocks (m, 2) to their words (m, 2)."""

PIECE = 2**15
"""Number of coordinates drawn at a time, so that their words stay in the processor's cache."""
COMPILED_FROM = 2**13
"""Fewest numbers of one draw for which loading the compiled loops saves time."""
OWN_BLOCKS = 16
"""Blocks per coordinate and attempt: two for its own words, the others for later tables."""
OWN_WORDS = 2
"""Blocks of each attempt: the first word, two words that decide ties, and one unused word."""


class Loops(NamedTuple):
    """Loops of a draw, either those of NumPy in this file or the compiled ones.

    Args:
        first_words: function `first_words`, which adds the integers that first words decide.
        cells: function `cells_of`, which finds the cells of undecided coordinates.
        settle: function `settle`, which adds the integers that are kept.
    """

    first_words: Callable[..., int]
    cells: Callable[..., Integers]
    settle: Callable[..., int]


def add_rounded_gaussian(
    total: Integers, table: GaussianTable, stream: Stream, blocks: Blocks
) -> None:
    """Add independent draws of the rounded Gaussian of `table` to integers, in place.

    Guarantee: every integer within `table.deviations` standard deviations has its probability up to
    a factor of 1 + 2^-45, if the words are uniform. Integers beyond them have probability 0.

    Args:
        total: (n,) int64, contiguous.
        table: tables for the standard deviation.
        stream: first words of the coordinates, in order.
        blocks: function that reads further words by number.
    """
    loops = _loops(len(total))
    shift = np.uint64(CUT_BITS - table.cut_bits)
    small = table.cut >> shift, table.alias, table.early, table.offset_bits
    open_at = np.empty(PIECE, dtype=np.int64)
    places = [open_at[:0].copy()]
    words = [np.empty(0, dtype=np.uint64)]
    for start in range(0, len(total), PIECE):
        out = total[start : start + PIECE]
        own = stream(8 * len(out)).view("<u8")
        left = loops.first_words(own, out, open_at, *small)
        places.append(open_at[:left] + start)
        words.append(own[open_at[:left]])
    _decide(total, np.concatenate(places), np.concatenate(words), table, blocks, loops)


def _loops(numbers: int) -> Loops:
    if numbers < COMPILED_FROM:
        return Loops(first_words, cells_of, settle)
    return Loops(*gaussian_loops())


def first_words(
    words: Words,
    out: Integers,
    open_at: Integers,
    cut: Words,
    alias: Small,
    early: Small,
    offset_bits: int,
) -> int:
    """Add the integers that first words decide; list the other coordinates, return their count."""
    column, negative, number, offset, threshold = _parts(words, offset_bits)
    own = cut[column]
    outcome = np.where(threshold < own, column, alias[column])
    value = (outcome << offset_bits) + offset
    undecided = (threshold == own) | (number >= early[outcome]) | (value == 0)
    out += np.where(undecided, 0, np.where(negative, -value, value))
    found = np.flatnonzero(undecided)
    open_at[: len(found)] = found
    return len(found)


def _parts(words: Words, offset_bits: int) -> tuple[Integers, Integers, Words, Integers, Words]:
    """Split random words into column, sign, early number, offset in the cell, and threshold."""
    column = (words & np.uint64(2**COLUMN_BITS - 1)).astype(np.int64)
    negative = (words >> np.uint64(COLUMN_BITS) & np.uint64(1)).astype(np.int64)
    rest = words >> np.uint64(COLUMN_BITS + 1)
    number = rest & np.uint64(2**EARLY_BITS - 1)
    rest = rest >> np.uint64(EARLY_BITS)
    offset = (rest & np.uint64(2**offset_bits - 1)).astype(np.int64)
    return column, negative, number, offset, rest >> np.uint64(offset_bits)


def _decide(
    total: Integers,
    places: Integers,
    words: Words,
    table: GaussianTable,
    blocks: Blocks,
    loops: Loops,
) -> None:
    """Draw the integers at `places` that no first word decided, attempt by attempt."""
    attempt = 0
    while len(places):
        # copies with one memory layout, because a loop is compiled for each layout
        own = _own_words(places, OWN_BLOCKS * attempt, OWN_WORDS, blocks).T.copy()
        first = own[0] if attempt else words
        cell = loops.cells(first, own[1], table.cut, table.alias, table.offset_bits)
        tail = np.flatnonzero(cell == table.tail)
        cell[tail] = in_tail(places[tail], attempt, table, blocks)
        left = loops.settle(
            total, places, first, own[2], cell, table.slope[cell], table.offset_bits
        )
        places = places[:left]
        attempt += 1


def cells_of(first: Words, second: Words, cut: Words, alias: Small, offset_bits: int) -> Integers:
    """Cells of undecided coordinates, or the tail, from their first and second random words."""
    column, _, _, _, threshold = _parts(first, offset_bits)
    missing = np.uint64(MISSING_BITS + offset_bits)
    whole = (threshold << missing) | (second >> (np.uint64(64) - missing))
    return np.where(whole < cut[column], column, alias[column]).astype(np.int64)


def settle(
    total: Integers,
    places: Integers,
    first: Words,
    third: Words,
    cell: Integers,
    slope: Words,
    offset_bits: int,
) -> int:
    """Add the accepted integers; move the places of the others first, and return their number."""
    _, negative, number, offset, _ = _parts(first, offset_bits)
    rest = np.uint64(63 - EARLY_BITS)
    uniform = (number << rest) | (third >> (np.uint64(64) - rest))
    value = (cell << offset_bits) + offset
    kept = uniform < keeping(cell, offset, slope, offset_bits)
    kept &= (value > 0) | (negative == 0)  # 0 only once, without a sign
    total[places[kept]] += np.where(negative, -value, value)[kept]
    left = places[~kept]
    places[: len(left)] = left
    return len(left)


def in_tail(places: Integers, attempt: int, table: GaussianTable, blocks: Blocks) -> Integers:
    """Cells of the coordinates that the first table assigned to the tail."""
    cell = np.zeros(len(places), dtype=np.int64)
    at = np.arange(len(places))
    for k, (first, ends) in enumerate(zip(table.first, table.ends, strict=True)):
        if not len(at):
            break
        word = _own_words(places[at], OWN_BLOCKS * attempt + OWN_WORDS + k // 2, 1, blocks)
        chosen = np.searchsorted(ends, word[:, k % 2])
        cell[at] = first + chosen
        if k < len(table.ends) - 1:
            at = at[chosen == len(ends) - 1]
    return cell


def _own_words(places: Integers, first: int, count: int, blocks: Blocks) -> Words:
    """(m, 2 count) words of coordinates (m,), from `count` blocks that begin at number `first`."""
    numbers = np.empty((len(places), count, 2), dtype=np.uint64)
    numbers[:, :, 0] = places[:, None]
    numbers[:, :, 1] = np.arange(first, first + count)
    own: Words = blocks(numbers.reshape(-1, 2)).reshape(len(places), 2 * count)
    return own


def keeping(cell: Integers, offset: Integers, slope: Words, offset_bits: int) -> Words:
    """Probability that an integer of a cell is kept, times 2^63, with an error of at most 4 units.

    Args:
        slope: slope of the cell's table, for every coordinate.
    """
    if not offset_bits:
        return np.full(len(cell), 2**63, dtype=np.uint64)
    place = offset.astype(np.uint64) << np.uint64(64 - offset_bits)
    doubled = (cell.astype(np.uint64) << np.uint64(51)) | (place >> np.uint64(14))
    return share_of(upper_product)(doubled, place, slope)
