"""Draws of the rounded Gaussian from secret words, by integer operations alone.

Coordinate i of a draw reads word i of one stream, 64 bits; that decides 99 draws of 100. The
rest (the threshold of a column, an integer of a cell that is not kept at once, the tail) is
decided by further words of the coordinate's own, read from blocks numbered by coordinate and
attempt. So every coordinate has its own counter, and a draw in pieces, or on another device, gives
the same integers.

Draws take more or less time by what they give, so do not let others measure it.
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
"""So many more bytes of the words that coordinates read first; good until the next call."""
Blocks = Callable[[Words], Words]
"""Numbers of blocks (m, 2) to their words (m, 2)."""

PIECE = 2**15
"""Coordinates at a time: their words stay in the processor's cache."""
COMPILED_FROM = 2**13
"""Numbers of one draw from which loading the compiled loops pays."""
OWN_BLOCKS = 16
"""Blocks of a coordinate and attempt: two for its own words, and the rest for later tables."""
OWN_WORDS = 2
"""Blocks of every attempt: a first word, the two that decide ties, and one that is not used."""


class Loops(NamedTuple):
    """The loops of a draw: by NumPy in this file, or of `compiled`.

    Args:
        first_words: see there.
        cells: see `cells_of`.
        settle: see there.
    """

    first_words: Callable[..., int]
    cells: Callable[..., Integers]
    settle: Callable[..., int]


def add_rounded_gaussian(
    total: Integers, table: GaussianTable, stream: Stream, blocks: Blocks
) -> None:
    """Add independent draws of the rounded Gaussian of `table` to integers, in place.

    Guarantee: every integer within `table.deviations` standard deviations has its probability up
    to a factor of 1 + 2^-45, if the words are uniform; beyond, none.

    Args:
        total: (n,) int64, contiguous.
        table: of the standard deviation.
        stream: first words of the coordinates, in order.
        blocks: further words, by number.
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
    """Add the numbers that first words decide; list the open ones, and return their count."""
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
    """Column, sign, early number, offset in the cell and threshold of each word."""
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
    """Decide the coordinates at `places`, attempt after attempt, until none is left."""
    attempt = 0
    while len(places):
        # copies, so that every array of a loop has one layout: it would be compiled for each
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
    """Cells of coordinates, or the tail, from their first words and a word that decides ties."""
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
    """Add the integers that are kept; return how many are not, whose places come first now."""
    _, negative, number, offset, _ = _parts(first, offset_bits)
    rest = np.uint64(63 - EARLY_BITS)
    uniform = (number << rest) | (third >> (np.uint64(64) - rest))
    value = (cell << offset_bits) + offset
    kept = uniform < keeping(cell, offset, slope, offset_bits)
    kept &= (value > 0) | (negative == 0)  # 0 has one sign, or it would come twice as often
    total[places[kept]] += np.where(negative, -value, value)[kept]
    left = places[~kept]
    places[: len(left)] = left
    return len(left)


def in_tail(places: Integers, attempt: int, table: GaussianTable, blocks: Blocks) -> Integers:
    """Cells of the coordinates that the first table sent to the later ones."""
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
    """(m, 2 count) words of `count` blocks, from number `first` on, of coordinates (m,)."""
    numbers = np.empty((len(places), count, 2), dtype=np.uint64)
    numbers[:, :, 0] = places[:, None]
    numbers[:, :, 1] = np.arange(first, first + count)
    own: Words = blocks(numbers.reshape(-1, 2)).reshape(len(places), 2 * count)
    return own


def keeping(cell: Integers, offset: Integers, slope: Words, offset_bits: int) -> Words:
    """Probability that an integer of its cell is kept, times 2^63, within 4 units.

    Args:
        slope: of the cell's table, for every coordinate.
    """
    if not offset_bits:
        return np.full(len(cell), 2**63, dtype=np.uint64)
    place = offset.astype(np.uint64) << np.uint64(64 - offset_bits)
    doubled = (cell.astype(np.uint64) << np.uint64(51)) | (place >> np.uint64(14))
    return share_of(upper_product)(doubled, place, slope)
