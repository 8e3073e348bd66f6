"""Correlated noise over the steps of a training run (banded matrix factorisation).

It is for records that take part in a fixed order, without sampling.

A training run releases prefix sums A x of the clipped sums x of its steps. Write A = B C and
release B (C x + z): the norm of a record's part of C x is its sensitivity, and later noise cancels
a part of earlier noise (matrix mechanism, DP-FTRL; Denisov et al. 2022, Choquette-Choo et al.
2023). Here C is the lower-triangular Toeplitz matrix of the first b coefficients of the square root
of A, c_k = binom(2k, k) / 4^k (banded square root: Kalinin and Lampert 2024, section 4), rounded to
multiples of 2^-16: any such matrix is valid. On the grid of `perdure.privacy.grid`, with x_t the
integer sum of step t, step t releases

    w_t = sum over k of c_k x_{t-k} + z_t                exactly, in 2^-16 of a grid step
    y_t = w_t - c_1 y_{t-1} - ... - c_{b-1} y_{t-b+1}    computed from earlier releases:
    post-processing

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
"""Number of parts of a grid step; coefficients are multiples of 1 / PARTS."""
MOST = 2**44
"""Largest sum, in grid steps, whose weighted sums are exact in 64 bits."""


def coefficients(bands: int) -> tuple[int, ...]:
    """First column of C, cut to `bands` numbers and multiplied by 2^16: 1, 1/2, 3/8, 5/16, ..."""
    values = [1.0]
    for k in range(1, bands):
        values.append(values[-1] * (2 * k - 1) / (2 * k))
    return tuple(round(PARTS * value) for value in values)


class BandedNoise:
    """Correlated noise of one reserved block of steps; each block begins a new chain.

    A step that failed may be repeated: it enters the chain only when `commit` is called, under its
    step number, so that no sum enters the chain twice.

    Guarantee: over a block, the noise is `C^-1 z`. Blocks share no chain, because a repeated block
    would then use earlier noise again. The exact sums of the last b - 1 steps stay in this object.

    Args:
        bands: b, the smallest distance between two steps of one record.
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
        """(d,) int64 weighted sum of the exact sums up to this step, in parts of a grid step.

        Raises:
            PrivacyError: if a sum is too large to be weighted exactly, or the step was committed.
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
        """Return (d,) float64 noisy sum of a step, in grid steps, from its noisy `weighted` sum."""
        value = noisy.double() / PARTS
        for c, past in self._past(self._released, step):
            value -= c / PARTS * past
        return value

    def commit(self, units: Tensor, value: Tensor, step: int) -> None:
        """Add a finished step to the chain.

        Args:
            units: (d,) int64 exact sum of the step.
            value: (d,) float64 result of `released` for the step.
            step: number of the step.
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
        """Yield the coefficients of earlier steps with the values of these steps."""
        for k, c in enumerate(self._c[1:], 1):
            if step - k in values:
                yield c, values[step - k]
