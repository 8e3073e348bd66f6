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
from collections import deque

from torch import Tensor

from perdure.errors import PrivacyError

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

    Guarantee: over a block, the noise is `C^-1 z`; with blocks in one chain a repeated block would
    meet earlier noise again. The exact sums of the last b - 1 steps stay in here.

    Args:
        bands: b; the least distance between two steps of one record.
    """

    def __init__(self, bands: int) -> None:
        self._c = coefficients(bands)
        self._sums: deque[Tensor] = deque(maxlen=bands - 1)
        self._released: deque[Tensor] = deque(maxlen=bands - 1)
        self._impulse: list[float] = []
        self.gain = math.sqrt(sum(c * c for c in self._c)) / PARTS

    def weighted(self, units: Tensor) -> Tensor:
        """(d,) int64 weighted sum of this step's and earlier exact sums, in parts of a grid step.

        Raises:
            PrivacyError: for a sum too large to be weighted exactly.
        """
        if len(units) and int(units.abs().max()) > MOST:
            raise PrivacyError(
                "a private sum is too large for correlated noise; use smaller batches or no bands"
            )
        total = units * self._c[0]
        for c, past in zip(self._c[1:], self._sums, strict=False):
            total += c * past
        self._sums.appendleft(units.clone())
        return total

    def released(self, noisy: Tensor) -> Tensor:
        """(d,) float64 noisy sum of this step, in grid steps, from the noisy `weighted`."""
        value = noisy.double() / PARTS
        for c, past in zip(self._c[1:], self._released, strict=False):
            value -= c / PARTS * past
        self._released.appendleft(value.clone())
        first = 1.0 if not self._impulse else 0.0
        recent = self._impulse[: -len(self._c) : -1]
        carried = sum(c / PARTS * y for c, y in zip(self._c[1:], recent, strict=False))
        self._impulse.append(first - carried)
        return value

    @property
    def deviation(self) -> float:
        """Standard deviation of the last step's noise, in units of sigma times the clip norm."""
        return self.gain * math.sqrt(sum(y * y for y in self._impulse))
