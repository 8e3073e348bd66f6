"""Compiled loops of the exact noise, which pass over memory once where NumPy needs many passes.

Every loop gives the same integers as the function of NumPy or torch that it replaces, which is used
for fewer than `COMPILED_FROM` numbers. Numba is loaded for the first large draw, and compiles in a
second.

All types are explicit in this file: Numba would turn a sum of a signed and an unsigned number into
a floating-point one.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from perdure.privacy.noise.fixed_point import share_of, upper_product
from perdure.privacy.noise.table import (
    COLUMN_BITS,
    EARLY_BITS,
    MISSING_BITS,
    Floats,
    Integers,
    Small,
    Words,
)

_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_SIGN_AT = np.uint64(COLUMN_BITS)
_COLUMN_MASK = np.uint64(2**COLUMN_BITS - 1)
_EARLY_AT = np.uint64(COLUMN_BITS + 1)
_EARLY_MASK = np.uint64(2**EARLY_BITS - 1)
_OFFSET_AT = np.uint64(COLUMN_BITS + 1 + EARLY_BITS)
_REST = np.uint64(63 - EARLY_BITS)


@cache
def gaussian_loops() -> tuple[Callable[..., int], Callable[..., Integers], Callable[..., int]]:
    """Compile `first_words`, `cells_of` and `settle` of `gaussian`."""
    import numba

    jit: Any = numba.njit(nogil=True)
    return jit(_first_words), jit(_cells), jit(_settling(jit(share_of(jit(upper_product)))))


def _first_words(
    words: Words,
    out: Integers,
    open_at: Integers,
    cut: Words,
    alias: Small,
    early: Small,
    offset_bits: int,
) -> int:
    bits = np.uint64(offset_bits)
    mask = (_ONE << bits) - _ONE
    left = _ZERO
    for i in range(len(words)):
        word = words[i]
        column = word & _COLUMN_MASK
        number = (word >> _EARLY_AT) & _EARLY_MASK
        offset = (word >> _OFFSET_AT) & mask
        threshold = word >> _OFFSET_AT >> bits
        own = cut[column]
        other = np.uint64(alias[column])
        outcome = column if threshold < own else other
        value = (outcome << bits) + offset
        if (threshold == own) | (number >= np.uint64(early[outcome])) | (value == _ZERO):
            open_at[left] = i
            left += _ONE
        else:
            negative = np.int64((word >> _SIGN_AT) & _ONE)
            out[i] += (np.int64(value) ^ -negative) + negative
    return int(left)


def _cells(first: Words, second: Words, cut: Words, alias: Small, offset_bits: int) -> Integers:
    bits = np.uint64(offset_bits)
    missing = np.uint64(MISSING_BITS) + bits
    cell = np.empty(len(first), dtype=np.int64)
    for i in range(len(first)):
        column = first[i] & _COLUMN_MASK
        threshold = first[i] >> _OFFSET_AT >> bits
        whole = (threshold << missing) | (second[i] >> (np.uint64(64) - missing))
        cell[i] = np.int64(column) if whole < cut[column] else np.int64(alias[column])
    return cell


def _settling(share: Callable[..., np.uint64]) -> Callable[..., int]:
    """Build the compiled `settle`, from the compiled probability that an integer is kept."""

    def settle(
        total: Integers,
        places: Integers,
        first: Words,
        third: Words,
        cell: Integers,
        slope: Words,
        offset_bits: int,
    ) -> int:
        bits = np.uint64(offset_bits)
        mask = (_ONE << bits) - _ONE
        left = 0
        for i in range(len(places)):
            number = (first[i] >> _EARLY_AT) & _EARLY_MASK
            offset = (first[i] >> _OFFSET_AT) & mask
            uniform = (number << _REST) | (third[i] >> (np.uint64(64) - _REST))
            if bits == _ZERO:
                kept = True
            else:
                place = offset << (np.uint64(64) - bits)
                doubled = (np.uint64(cell[i]) << np.uint64(51)) | (place >> np.uint64(14))
                kept = uniform < share(doubled, place, slope[i])
            value = np.int64((np.uint64(cell[i]) << bits) + offset)
            negative = np.int64((first[i] >> _SIGN_AT) & _ONE)
            if kept and (value > 0 or negative == 0):
                total[places[i]] += (value ^ -negative) + negative
            else:
                places[left] = places[i]
                left += 1
        return left

    return settle


@cache
def grid_loops() -> tuple[Callable[..., bool], Callable[..., None]]:
    """Compile the conversions of `perdure.privacy.grid`: to whole steps, and back to float32."""
    import numba

    jit: Any = numba.njit(nogil=True)
    return jit(_to_units), jit(_to_values)


def _to_units(values: Floats, factor: float, most: float, out: Integers) -> bool:
    inside = True
    for i in range(len(values)):
        # in float64, because a float32 product is rounded by more than a grid step
        whole = np.rint(np.float64(values[i]) * factor)
        inside &= abs(whole) < most  # false for NaN
        out[i] = np.int64(whole)
    return inside


def _to_values(units: npt.NDArray[Any], factor: float, out: Floats) -> None:
    for i in range(len(units)):
        out[i] = np.float32(np.float64(units[i]) * factor)
