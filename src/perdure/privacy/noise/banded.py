"""Noise that is correlated over the steps.

For records that take part in a fixed order, without sampling.

A training run releases prefix sums A x of the steps' clipped sums x. Write A = B C and release B (C
x + z): what a record adds to C x bounds its influence, and later noise takes back part of the
earlier (matrix mechanism, DP-FTRL; Denisov et al. 2022, Choquette-Choo et al. 2023). Here C is the
lower-triangular Toeplitz matrix of the first b coefficients of the square root of A, c_k =
binom(2k, k) / 4^k (banded square root: Kalinin and Lampert 2024, section 4), rounded to multiples
of 2^-16: any such matrix is valid. On the grid of `perdure.privacy.grid`, with x_t the integer sum
of step t, step t releases

    w_t = sum over k of c_k x_{t-k} + z_t                exactly, in 2^-16 of a grid step
    y_t = w_t - c_1 y_{t-1} - ... - c_{b-1} y_{t-b+1}    from what was released: post-processing

with z_t integers of standard deviation sigma |c| clip_norm. So y = x + C^-1 z.

Sensitivity: a record whose steps lie at least b apart adds vectors of at most |c| clip_norm with
disjoint support to C x, so k of them have norm at most sqrt(k) |c| clip_norm: the cost of k steps
of a Gaussian with noise multiplier sigma. Rounding and slack grow by the same factor. With b = 1
the noise is independent and this is the plain Gaussian mechanism without sampling.
"""

import math
from collections.abc import Iterator, Mapping
from typing import TypeVar

from torch import Tensor

from perdure.errors import PrivacyError

_T = TypeVar("_T")

PARTS = 2**16
"""Parts of a grid step: coefficients are multiples of one over it."""
MOST = 2**44
"""Largest sum, in grid steps, whose weighted sums are exact in 64 bits."""


def coefficients(bands: int) -> tuple[int, ...]:
    """First column of C, cut to `bands` and times 2^16: of 1, 1/2, 3/8, 5/16, ..."""
    values = [1.0]
    for k in range(1, bands):
        values.append(values[-1] * (2 * k - 1) / (2 * k))
    return tuple(round(PARTS * value) for value in values)


class BandedNoise:
    """Steps of one reserved block, in order; a block begins a chain of its own.

    A step that failed may be asked for again: what it adds to the chain counts once `commit` has
    been called, and is kept by its number, so that no sum is in the chain twice.

    Guarantee: over a block, the noise is `C^-1 z`; with blocks in one chain a repeated block would
    meet earlier noise again. The exact sums of the last b - 1 steps stay in here.

    Args:
        bands: b; the least distance between two steps of one record.
        first: number of the first step of the block.
    """

    def __init__(self, bands: int, first: int = 0) -> None:
        self._c = coefficients(bands)
        self._first = first
        self._sums: dict[int, Tensor] = {}
        self._released: dict[int, Tensor] = {}
        self._impulse: dict[int, float] = {}
        self.gain = math.sqrt(sum(c * c for c in self._c)) / PARTS

    def weighted(self, units: Tensor, step: int) -> Tensor:
        """(d,) int64 weighted sum of this step's and earlier exact sums, in parts of a grid step.

        Raises:
            PrivacyError: for a sum too large to be weighted exactly, or a step that counts already.
        """
        if step in self._impulse:
            raise PrivacyError(
                f"step {step} was already released; call reserve() for its block again"
            )
        if len(units) and int(units.abs().max()) > MOST:
            raise PrivacyError(
                "a private sum is too large for correlated noise; use smaller batches, or "
                "Privacy(bands=None)"
            )
        total = units * self._c[0]
        for c, past in self._past(self._sums, step):
            total += c * past
        return total

    def released(self, noisy: Tensor, step: int) -> Tensor:
        """(d,) float64 noisy sum of this step, in grid steps, from the noisy `weighted`."""
        value = noisy.double() / PARTS
        for c, past in self._past(self._released, step):
            value -= c / PARTS * past
        return value

    def commit(self, units: Tensor, value: Tensor, step: int) -> None:
        """Let a step count, once it is done.

        Args:
            units: (d,) int64 its exact sum.
            value: (d,) float64 what `released` gave for it.
            step: its number.
        """
        first = 1.0 if step == self._first else 0.0
        carried = sum(c / PARTS * y for c, y in self._past(self._impulse, step))
        self._impulse[step] = first - carried
        self._sums[step] = units.clone()
        self._released[step] = value.clone()
        for kept in (self._sums, self._released):
            kept.pop(step - len(self._c) + 1, None)

    def deviation(self, step: int) -> float:
        """Standard deviation of a committed step's noise, in units of sigma times the clip norm."""
        recent = [y for at, y in self._impulse.items() if at <= step]
        return self.gain * math.sqrt(sum(y * y for y in recent))

    def _past(self, values: Mapping[int, _T], step: int) -> Iterator[tuple[int, _T]]:
        """Coefficients of the steps before, with their values."""
        for k, c in enumerate(self._c[1:], 1):
            if step - k in values:
                yield c, values[step - k]
