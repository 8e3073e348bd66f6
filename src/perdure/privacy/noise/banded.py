"""Noise that is correlated over the steps.

For records that take part in a fixed order, without sampling.

A training run releases prefix sums A x of the steps' clipped sums x. Write A = B C and release B (C
x + z): what a record adds to C x bounds its influence, and later noise takes back part of the
earlier (matrix mechanism, DP-FTRL; Denisov et al. 2022, Choquette-Choo et al. 2023). Here C is the
lower-triangular Toeplitz matrix of the first b coefficients of the square root of A, c_k =
binom(2k, k) / 4^k (banded square root: Kalinin and Lampert 2024, section 4). So step t releases

    x_t + sigma clip_norm |c| y_t,   z_t standard normal
    y_t = z_t - c_1 y_{t-1} - ... - c_{b-1} y_{t-b+1}

Sensitivity: a record whose steps lie at least b apart adds vectors of at most |c| clip_norm with
disjoint support, so k of them have norm at most sqrt(k) |c| clip_norm: the cost of k steps of a
Gaussian with noise multiplier sigma. With b = 1 the noise is independent and this is the plain
Gaussian mechanism without sampling.
"""

import math
from collections import deque

import torch
from torch import Tensor

from perdure.types import Params


def coefficients(bands: int) -> tuple[float, ...]:
    """First column of C, cut to `bands`: 1, 1/2, 3/8, 5/16, ..."""
    values = [1.0]
    for k in range(1, bands):
        values.append(values[-1] * (2 * k - 1) / (2 * k))
    return tuple(values)


class BandedNoise:
    """Noise of the steps of one reserved block, in order; a block begins a chain of its own.

    Guarantee: over a block, the noise is `gain * C^-1 z`; with blocks in one chain a repeated block
    would meet earlier noise again.

    Args:
        bands: b; the least distance between two steps of one record.
    """

    def __init__(self, bands: int) -> None:
        self._c = coefficients(bands)
        self._past: deque[Params] = deque(maxlen=bands - 1)
        self._impulse: list[float] = []
        self.gain = math.sqrt(sum(c * c for c in self._c))

    def next(self, fresh: Params) -> Params:
        """Noise of the next step from fresh standard normals.

        It is in units of sigma times the clip norm.
        """
        noise = {name: value - self._carried(name, value) for name, value in fresh.items()}
        self._past.appendleft(noise)
        first = 1.0 if not self._impulse else 0.0
        recent = self._impulse[: -len(self._c) : -1]
        self._impulse.append(first - sum(c * y for c, y in zip(self._c[1:], recent, strict=False)))
        return {name: self.gain * value for name, value in noise.items()}

    @property
    def deviation(self) -> float:
        """Standard deviation of the last step's noise, in units of sigma times the clip norm."""
        return self.gain * math.sqrt(sum(y * y for y in self._impulse))

    def _carried(self, name: str, like: Tensor) -> Tensor:
        total = torch.zeros_like(like)
        for c, past in zip(self._c[1:], self._past, strict=False):
            total += c * past[name]
        return total
