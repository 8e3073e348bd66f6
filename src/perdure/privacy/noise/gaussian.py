"""Draws of the rounded Gaussian from secret words, by integer operations alone.

Coordinate i of a draw reads word i of one stream, 64 bits; that decides 99 draws of 100. What it
leaves open (the threshold of a column, an integer of a cell that is not kept at once, the tail) is
decided by further words of the coordinate's own, read from blocks numbered by coordinate and
attempt. So every coordinate has its own counter, and a draw in pieces, or on another device, gives
the same integers.

Draws take more or less time by what they give, so do not let others measure it.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from perdure.privacy.noise.table import (
    COLUMN_BITS,
    CUT_BITS,
    EARLY_BITS,
    GaussianTable,
    Small,
    Words,
)

Integers = npt.NDArray[np.int64]
Stream = Callable[[int], npt.NDArray[np.uint8]]
"""So many more bytes of the words that coordinates read first; good until the next call."""
Blocks = Callable[[Words], Words]
"""Numbers of blocks (m, 2) to their words (m, 2)."""

Share = Callable[[Words, Words, Words], Words]
"""Probability, times 2^63, that integers of their cells are kept (see `share_of`)."""

PIECE = 2**15
"""Coordinates at a time: their words stay in the processor's cache."""
COMPILED_FROM = 2**13
"""Numbers of one draw from which loading the compiled kernel pays."""
OWN_BLOCKS = 16
"""Blocks of a coordinate and attempt: two for its own words, and the rest for later tables."""
OWN_WORDS = 2
"""Blocks of every attempt: a first word, the two that decide ties, and one that is not used."""
_HALF = np.uint64(32)
_LOW = np.uint64(2**32 - 1)


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
    first, share = (
        compiled() if len(total) >= COMPILED_FROM else (first_words, share_of(upper_product))
    )
    shift = np.uint64(CUT_BITS - table.cut_bits)
    small = table.cut >> shift, table.alias, table.early, table.offset_bits
    open_at = np.empty(PIECE, dtype=np.int64)
    places = [open_at[:0].copy()]
    words = [np.empty(0, dtype=np.uint64)]
    for start in range(0, len(total), PIECE):
        out = total[start : start + PIECE]
        own = stream(8 * len(out)).view("<u8")
        left = first(own, out, open_at, *small)
        places.append(open_at[:left] + start)
        words.append(own[open_at[:left]])
    _decide(total, np.concatenate(places), np.concatenate(words), table, blocks, share)


def first_words(
    words: Words,
    out: Integers,
    open_at: Integers,
    cut: Words,
    alias: Small,
    early: Small,
    offset_bits: int,
) -> int:
    """Add what the first words decide; return how many are left open, listed in `open_at`."""
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


@cache
def compiled() -> tuple[Callable[..., int], Share]:
    """Compile `first_words` and `share_of` for the processor: one pass over the words.

    Numba is loaded here, at the first large draw. Types are spelt out: it would turn a sum of a
    signed and an unsigned number into a floating-point one.
    """
    import numba

    sign_at = np.uint64(COLUMN_BITS)
    column_mask = np.uint64(2**COLUMN_BITS - 1)
    early_at = np.uint64(COLUMN_BITS + 1)
    early_mask = np.uint64(2**EARLY_BITS - 1)
    offset_at = np.uint64(COLUMN_BITS + 1 + EARLY_BITS)
    one = np.uint64(1)
    zero = np.uint64(0)

    def kernel(
        words: Words,
        out: Integers,
        open_at: Integers,
        cut: Words,
        alias: Small,
        early: Small,
        offset_bits: int,
    ) -> int:
        bits = np.uint64(offset_bits)
        mask = (one << bits) - one
        left = zero
        for i in range(len(words)):
            word = words[i]
            column = word & column_mask
            number = (word >> early_at) & early_mask
            offset = (word >> offset_at) & mask
            threshold = word >> offset_at >> bits
            own = cut[column]
            other = np.uint64(alias[column])
            outcome = column if threshold < own else other
            value = (outcome << bits) + offset
            if (threshold == own) | (number >= np.uint64(early[outcome])) | (value == zero):
                open_at[left] = i
                left += one
            else:
                negative = np.int64((word >> sign_at) & one)
                out[i] += (np.int64(value) ^ -negative) + negative
        return int(left)

    jit: Any = numba.njit
    one_share = jit(share_of(jit(upper_product)))

    def shares(doubled: Words, place: Words, slope: Words) -> Words:
        kept = np.empty(len(place), dtype=np.uint64)
        for i in range(len(place)):
            kept[i] = one_share(doubled[i], place[i], slope[i])
        return kept

    return jit(nogil=True)(kernel), jit(nogil=True)(shares)


def _decide(
    total: Integers,
    places: Integers,
    words: Words,
    table: GaussianTable,
    blocks: Blocks,
    share: Share,
) -> None:
    """Decide the coordinates at `places`, attempt after attempt, until none is left."""
    attempt = 0
    while len(places):
        own = _own_words(places, OWN_BLOCKS * attempt, OWN_WORDS, blocks)
        first = own[:, 0] if attempt else words
        column, negative, number, offset, threshold = _parts(first, table.offset_bits)
        missing = np.uint64(CUT_BITS - table.cut_bits)
        whole = (threshold << missing) | (own[:, 1] >> (np.uint64(64) - missing))
        cell = np.where(whole < table.cut[column], column, table.alias[column]).astype(np.int64)
        tail = np.flatnonzero(cell == table.tail)
        cell[tail] = in_tail(places[tail], attempt, table, blocks)
        rest = np.uint64(63 - EARLY_BITS)
        uniform = (number << rest) | (own[:, 2] >> (np.uint64(64) - rest))
        value = (cell << table.offset_bits) + offset
        kept = uniform < keeping(cell, offset, table, share)
        kept &= (value > 0) | (negative == 0)  # 0 has one sign, or it would come twice as often
        total[places[kept]] += np.where(negative, -value, value)[kept]
        places = places[~kept]
        attempt += 1


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


def keeping(cell: Integers, offset: Integers, table: GaussianTable, share: Share) -> Words:
    """Probability that an integer of its cell is kept, times 2^63, within 4 units."""
    if not table.offset_bits:
        return np.full(len(cell), 2**63, dtype=np.uint64)
    place = offset.astype(np.uint64) << np.uint64(64 - table.offset_bits)
    doubled = (cell.astype(np.uint64) << np.uint64(51)) | (place >> np.uint64(14))
    return share(doubled, place, table.slope[cell])


def share_of(high: Callable[[Any, Any], Any]) -> Share:
    """Build exp(-y) times 2^63 with y = G (2 j + t) t below 1/16, from an upper product.

    exp(-y) = 1 - y (1 - y/2 (1 - y/3 (...))). Its arguments are 2 j + t times 2^50, t times 2^64
    and G times 2^78.
    """
    one = np.uint64(2**63)

    def share(doubled: Words, place: Words, slope: Words) -> Words:
        y = high(high(doubled, place), slope)
        value: Any = one
        for k in range(9, 0, -1):
            value = one - high(y, value) // np.uint64(k)
        kept: Words = value
        return kept

    return share


def upper_product(a: Words, b: Words) -> Words:
    """Upper 64 bits of the products, by halves of 32 bits."""
    a_low = a & _LOW
    a_high = a >> _HALF
    b_low = b & _LOW
    b_high = b >> _HALF
    cross = a_high * b_low + (a_low * b_low >> _HALF)
    other = a_low * b_high + (cross & _LOW)
    product: Words = a_high * b_high + (cross >> _HALF) + (other >> _HALF)
    return product
