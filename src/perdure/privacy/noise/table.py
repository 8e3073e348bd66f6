"""Integer tables of the rounded Gaussian, made and used without floating-point numbers.

The noise is an integer k with the probability of a rounded Gaussian Z of standard deviation S:

    P(k) = Phi((k + 1/2) / S) - Phi((k - 1/2) / S)

A draw takes three steps. It chooses a cell of `width` = 2^b integers on one side of 0, with a
probability proportional to width * P(first integer of the cell). It then chooses an integer of the
cell, uniformly. It keeps the integer k with probability P(k) / P(first integer), which is between
0.93 and 1; if k is not kept, the draw begins again. The cells beyond the first table are reached
through one more outcome of it, the tail, which leads to a second table, and so on to beyond 15
standard deviations. So every outcome of a table has a probability of at least 2^-15, and rounding
it to a multiple of 2^-64 changes it by a relative error of at most 2^-48.

Source: Walker 1977 (alias method); Canonne, Kamath and Steinke 2020 (why exact integers); Prest
2017 (why relative errors).
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from perdure.errors import PrivacyError

COLUMN_BITS = 11
"""Number of bits of a column of the first table, which has 2,048 columns."""
CUT_BITS = 64 - COLUMN_BITS
"""Number of bits of the threshold between the two outcomes of a column."""
EARLY_BITS = 12
"""Number of bits of the number that usually decides at once if an integer is kept."""
MISSING_BITS = 1 + EARLY_BITS
"""Number of bits of a threshold, without the offset, that do not fit into a draw's first word."""
CELLS_PER_DEVIATION = 256
"""Smallest number of cells per standard deviation, if it has so many integers; below 512."""
LEAST_SCALE = 64.0
"""Smallest S: with fewer integers per deviation, tail outcomes would be too rare to be precise."""
LARGEST_SCALE = 2.0**39
"""Largest S: a cell then has 2^30 integers, and a 64-bit word is just enough for one draw."""
DEVIATIONS = 15
"""Smallest number of standard deviations at which a draw may be cut off."""
LOG2_ERROR = -45
"""Binary logarithm of the relative error of each integer's probability inside the cut."""

_FIXED = 320
"""Number of binary digits after the point in the calculation of the tables."""
_ONE = 1 << _FIXED
_LEAST_FIRST = 16
_LEAST_LATER = 14
"""Smallest probabilities of an outcome: 2^-16 in the first table, 2^-14 in later ones."""

Words = npt.NDArray[np.uint64]
Small = npt.NDArray[np.uint16]
Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class GaussianTable:
    """Tables of the rounded Gaussian for one standard deviation S.

    Args:
        offset_bits: b; a cell has 2^b integers.
        cut: (2048,) upper end, out of 2^53, of the first outcome of each column.
        alias: (2048,) second outcome of each column, above its cut.
        early: (2049,) numbers of EARLY_BITS below which an integer of a cell is kept at once; 0
            for the tail.
        slope: (cells,) S-dependent factor of the exponent inside a cell, times 2^78.
        first: index of the first cell of every later table.
        ends: for every later table, (outcomes,) cumulated probability times 2^64, minus 1.
        tail: number of the outcome that leads from the first table to the second.
        deviations: the cut, in standard deviations.
        log2_error: bound on the relative error of every probability, as a binary logarithm.
    """

    offset_bits: int
    cut: Words
    alias: Small
    early: Small
    slope: Words
    first: tuple[int, ...]
    ends: tuple[Words, ...]
    tail: int
    deviations: float
    log2_error: float

    @property
    def cut_bits(self) -> int:
        """Number of bits of the threshold that fit into a draw's first word."""
        return CUT_BITS - MISSING_BITS - self.offset_bits


def refuse_scale(scale: float) -> None:
    """Refuse a standard deviation, in grid steps, for which there are no tables.

    Raises:
        PrivacyError: if the scale is below 64 or above 2^39.
    """
    if not LEAST_SCALE <= scale <= LARGEST_SCALE:
        raise PrivacyError(
            f"noise of {scale:.3g} grid steps cannot be drawn; allowed: 64 to 2^39; use a noise "
            "multiplier closer to 1"
        )


@lru_cache(maxsize=64)
def gaussian_table(scale: float) -> GaussianTable:
    """Build the tables of the rounded Gaussian of standard deviation `scale`, in grid steps.

    Raises:
        PrivacyError: if the scale is below 64 or above 2^39.
    """
    refuse_scale(scale)
    exact = Fraction(scale)
    bits = max(0, math.floor(math.log2(scale / CELLS_PER_DEVIATION)))
    width = 1 << bits
    wanted = math.ceil(DEVIATIONS * exact / width)
    weights = _weights(exact, width, wanted + wanted // 16 + 2)
    borders, counts = _levels(weights, wanted)
    slope = _slopes(exact, width, borders[-1])
    cut, alias = _alias(counts[0])
    loss = sum(1 / min(level) for level in counts) + 2.0**-58
    return GaussianTable(
        offset_bits=bits,
        cut=np.array(cut, dtype=np.uint64),
        alias=np.array(alias, dtype=np.uint16),
        early=np.array(_early(slope, borders[0], bits), dtype=np.uint16),
        slope=np.array(slope, dtype=np.uint64),
        first=tuple(borders[:-1]),
        ends=tuple(
            np.array(np.cumsum(np.array(level, dtype=object)) - 1, dtype=np.uint64)
            for level in counts[1:]
        ),
        tail=borders[0],
        deviations=float(borders[-1] * width / exact),
        log2_error=math.log2(loss),
    )


def _weights(scale: Fraction, width: int, cells: int) -> list[int]:
    """Probability of the first integer of every cell, up to a common factor, in fixed point.

    P(k) is exp(-z^2 / 2) times the sum over m of He_2m(z) / ((2m + 1)! (2 S)^2m), with z = k / S
    and the Hermite polynomials He of probability theory: the Taylor series of the density,
    integrated over the unit interval around k.
    """
    square = 1 / scale**2
    step = _exponential(width**2 * square / 2)
    twice = step * step >> _FIXED
    coefficients = _series(square, cells * width / scale)
    unit = _fixed(width**2 * square)
    weights = []
    density = _ONE
    ratio = step
    for j in range(cells):
        z2 = j * j * unit
        before = 0
        hermite = _ONE
        total = 0
        for m, coefficient in enumerate(coefficients):
            total += coefficient * hermite >> _FIXED
            after = ((z2 - ((4 * m + 1) << _FIXED)) * hermite >> _FIXED) - (
                2 * m * (2 * m - 1) * before
            )
            before = hermite
            hermite = after
        weights.append(density * total >> _FIXED)
        density = density * ratio >> _FIXED
        ratio = ratio * twice >> _FIXED
    return weights


def _series(square: Fraction, farthest: Fraction) -> list[int]:
    """Coefficients 1 / ((2m + 1)! (2 S)^2m) in fixed point, as many as are needed."""
    coefficients = [Fraction(1)]
    while True:
        m = len(coefficients)
        following = coefficients[-1] * square / (8 * m * (2 * m + 1))
        if following * (farthest**2 + 4 * m) ** m < Fraction(1, 2**80):
            return [_fixed(value) for value in coefficients]
        coefficients.append(following)


def _fixed(value: Fraction) -> int:
    return (value.numerator << _FIXED) // value.denominator


def _exponential(x: Fraction) -> int:
    """Compute exp(-x) in fixed point, for x >= 0."""
    total = 0
    term = _ONE
    n = 0
    while term:
        total += term if n % 2 == 0 else -term
        n += 1
        term = term * x.numerator // (x.denominator * n)
    return total


def _levels(weights: list[int], wanted: int) -> tuple[list[int], list[list[int]]]:
    """Last cell of every table, and the counts, out of 2^64, of the outcomes of each table.

    The last outcome of every table except the last table is the tail.
    """
    borders = [0]
    while borders[-1] < wanted:
        start = borders[-1]
        bits = _LEAST_FIRST if start == 0 else _LEAST_LATER
        least = sum(weights[start:]) >> bits
        end = start
        while end < len(weights) and weights[end] >= least and end - start < 2**COLUMN_BITS - 1:
            end += 1
        borders.append(end)
    # the tails end here, because there is no later table
    kept = weights[: borders[-1]]
    counts = []
    for start, end in pairwise(borders):
        tail = sum(kept[end:])
        counts.append(counts_of(kept[start:end] + ([tail] if tail else [])))
    return borders[1:], counts


def counts_of(weights: list[int]) -> list[int]:
    """Round shares to integers with sum 2^64, each with an error below 1, by largest remainders."""
    total = sum(weights)
    shares = [divmod(weight << 64, total) for weight in weights]
    counts = [whole for whole, _ in shares]
    missing = 2**64 - sum(counts)
    by_remainder = sorted(range(len(shares)), key=lambda i: shares[i][1], reverse=True)
    for i in by_remainder[:missing]:
        counts[i] += 1
    return counts


def _alias(counts: list[int]) -> tuple[list[int], list[int]]:
    """Cuts and aliases of equal columns (alias method) that represent the counts exactly."""
    columns = 2**COLUMN_BITS
    capacity = 2**CUT_BITS
    left = counts + [0] * (columns - len(counts))
    cut = [capacity] * columns
    alias = list(range(columns))
    small = [i for i in range(columns) if left[i] < capacity]
    large = [i for i in range(columns) if left[i] >= capacity]
    while small:
        poor = small.pop()
        rich = large[-1]
        cut[poor] = left[poor]
        alias[poor] = rich
        left[rich] -= capacity - left[poor]
        if left[rich] < capacity:
            small.append(large.pop())
    return cut, alias


def _slopes(scale: Fraction, width: int, cells: int) -> list[int]:
    """Factor G_j of each cell j, times 2^78: P(k) / P(first integer) = exp(-G_j (2 j t + t^2)).

    With t in [0, 1) the position of k in the cell and s = 1 / S^2,
    G = width^2 s / 2 (1 - s / 12 + s^2 z^2 / 720 + s^2 / 360). A cell of one integer has G = 0.

    The neglected terms are below 2^-50, because a cell of two integers needs S of 512 or more.
    """
    if width == 1:
        return [0] * cells
    square = 1 / scale**2
    places = 140
    unit = width**2 * square
    base = (unit.numerator << places) // (2 * unit.denominator)
    level = 1 - square / 12 + square**2 / 360
    constant = (level.numerator << places) // level.denominator
    curve = square**2 * unit / 720
    rise = (curve.numerator << places) // curve.denominator
    return [base * (constant + rise * j * j) >> (2 * places - 78) for j in range(cells)]


def _early(slope: list[int], cells: int, offset_bits: int) -> list[int]:
    """Compute, per cell, the number below which a draw is accepted early; 0 for the tail."""
    whole = 2**EARLY_BITS
    if offset_bits == 0:
        return [whole] * cells + [0] * (2**COLUMN_BITS + 1 - cells)
    kept = [
        whole - 2 - (slope[j] * (2 * j + 1) >> (78 - EARLY_BITS)) for j in range(cells)
    ]  # exp(-y) >= 1 - y; rounded down, minus one
    return kept + [0] * (2**COLUMN_BITS + 1 - cells)
