"""Mechanisms with discrete answers.

Integer noise on counts, and the choice of one of many public answers.

Discrete Gaussian (Canonne, Kamath and Steinke 2020, "The discrete Gaussian for differential
privacy"):

    P(z) = exp(-z^2 / (2 s^2)) / sum over all integers of the same,   z an integer

Exponential mechanism (McSherry and Talwar 2007), of scores of which one record moves any two by at
most 1 against each other: P(j) = exp(e score_j) / sum over i of exp(e score_i) is e-DP, and of
bounded range e, so that it costs at most e^2 / 8 of zero-concentrated privacy (Cesar and Rogers
2021).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import final

import numpy as np
import torch
from torch import Tensor

from perdure.errors import ConfigError, DataError

BUFFER_BYTES = 4096
WORD = 64
"""Bits of a word."""


# --------------------------------------------------------------------------- integer noise


class Integers:
    """Uniform integers out of a stream of random bytes.

    Args:
        stream: from a number of bytes to so many.
    """

    def __init__(self, stream: Callable[[int], bytes]) -> None:
        self._stream = stream
        self._words: list[int] = []

    def below(self, n: int) -> int:
        """Uniform on 0 .. n - 1, without bias.

        As many bits as n - 1 has, drawn again until they are below n.
        """
        bits = (n - 1).bit_length()
        while True:
            value = self._bits(bits)
            if value < n:
                return value

    def _bits(self, bits: int) -> int:
        value = 0
        have = 0
        while have < bits:
            value = value << WORD | self._word()
            have = have + WORD
        return value >> (have - bits)

    def _word(self) -> int:
        if not self._words:
            self._words = np.frombuffer(self._stream(BUFFER_BYTES), dtype="<u8").tolist()
        return self._words.pop()


def discrete_gaussian(n: int, sigma: float, stream: Callable[[int], bytes]) -> Tensor:
    """(n,) int64 independent draws of P(z) proportional to exp(-z^2 / (2 sigma^2)).

    Exact: every decision compares integers, and sigma is the very rational number that the float
    stands for. The leak of floating-point noise (Mironov 2012) cannot occur here. The time of a
    draw depends on its numbers, so do not let others measure it.

    Args:
        n: how many.
        sigma: above 0 and finite.
        stream: of random bytes, from a number of them to so many.

    Source: Canonne, Kamath and Steinke 2020, algorithms 1 to 3.
    """
    if not 0 < sigma < math.inf:
        raise ConfigError.of("sigma", sigma, "finite and above 0")
    variance = Fraction(sigma) ** 2
    integers = Integers(stream)
    return torch.tensor([_gaussian(variance, integers) for _ in range(n)], dtype=torch.int64)


def _gaussian(variance: Fraction, integers: Integers) -> int:
    """Algorithm 3: a discrete Laplace y of scale t, kept with a probability.

    The probability is exp(-(|y| - s^2/t)^2 / (2 s^2)).
    """
    a = variance.numerator
    b = variance.denominator
    t = math.isqrt(a // b) + 1
    while True:
        y = _laplace(t, integers)
        if bernoulli_exp((abs(y) * t * b - a) ** 2, 2 * a * b * t**2, integers):
            return y


def _laplace(t: int, integers: Integers) -> int:
    """Algorithm 2: P(y) proportional to exp(-|y| / t)."""
    while True:
        remainder = integers.below(t)
        if not bernoulli_exp(remainder, t, integers):
            continue
        times = 0
        while bernoulli_exp(1, 1, integers):
            times += 1
        size = remainder + t * times
        negative = integers.below(2)
        if size or not negative:  # else 0 would come twice as often
            return -size if negative else size


def bernoulli_exp(numerator: int, denominator: int, integers: Integers) -> bool:
    """Algorithm 1: true with probability exp(-numerator / denominator)."""
    while numerator > denominator:
        if not bernoulli_exp(1, 1, integers):
            return False
        numerator -= denominator
    k = 1
    while integers.below(denominator * k) < numerator:
        k += 1
    return k % 2 == 1


def counted(values: Tensor, bins: int, *, strict: bool) -> Tensor:
    """(bins,) int64: how often each bin comes up in `values` (n,).

    One record changes one of them by 1.

    Args:
        strict: refuse values that are no bin. Under privacy they count nowhere instead: an error
            would tell of them.

    Raises:
        ConfigError: for less than one bin.
        DataError: for values that are not whole numbers, or (where `strict`) outside the bins.
    """
    if bins < 1:
        raise ConfigError.of("bins", bins, "whole numbers from 1")
    if values.is_floating_point() or values.is_complex():
        raise DataError(
            f"bins of records are {values.dtype}; give whole numbers from 0 to {bins - 1}, int64"
        )
    inside = (values >= 0) & (values < bins)
    if strict and not bool(inside.all()):
        worst = int(values[~inside][0])
        raise DataError(
            f"a record is in bin {worst}; allowed: 0 to {bins - 1}; increase bins=, or clamp the "
            "numbers that `of` returns"
        )
    return torch.bincount(values[inside].long(), minlength=bins)


# ------------------------------------------------------------------------ the choice of one of many


@final
@dataclass(frozen=True, kw_only=True)
class Frequency:
    """Number of records in each bin: the score of a top-k.

    Guarantee: one record raises the score of at most one bin, by 1, and lowers none.

    Args:
        bins: how many there are.
        k: how many are chosen.
    """

    bins: int
    k: int = 1

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise ConfigError.of("bins", self.bins, "whole numbers from 1")
        if not 1 <= self.k <= self.bins:
            raise ConfigError.of("k", self.k, f"1 to {self.bins}, the number of bins")

    def scores(self, values: Tensor, *, strict: bool) -> Tensor:
        """(bins,) float64 of the records' bins (n,)."""
        return counted(values, self.bins, strict=strict).double()


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Quantile:
    """Distance of each candidate from a q-quantile: the score of a quantile.

    At most q n records below it, at least q n up to it.

        score(c) = -max(0, #{x < c} - q n, q n - #{x <= c}) / (2 max(q, 1 - q))

    Where no record equals a candidate this is -|#{x < c} - q n|; where many do, that would not tell
    their value from its neighbours.

    Guarantee: one record moves any two scores by at most 1 against each other. One more adds 0 or 1
    to each count and q to q n, so each difference moves by at most max(q, 1 - q), and a score by at
    most 1/2. It may rise for one candidate and fall for another, so the half is needed.

    Args:
        q: above 0 and below 1.
        candidates: (m,) public numbers, increasing.

    Raises:
        ConfigError: for another q, or candidates that are not finite and increasing.

    Source: Smith 2011, "Privacy-preserving statistical estimation with optimal convergence rates",
    for the exponential mechanism on ranks.
    """

    q: float
    candidates: Tensor

    def __post_init__(self) -> None:
        if not 0 < self.q < 1:
            raise ConfigError.of("q", self.q, "a number above 0 and below 1")
        grid = torch.as_tensor(self.candidates, dtype=torch.float64).detach().cpu()
        object.__setattr__(self, "candidates", grid)
        if (
            grid.dim() != 1
            or not len(grid)
            or not bool(grid.isfinite().all() and (grid.diff() > 0).all())
        ):
            raise ConfigError.of(
                "candidates", grid.tolist()[:4], "one row of finite numbers in increasing order"
            )

    @property
    def k(self) -> int:
        """Number of candidates that are chosen: one."""
        return 1

    def scores(self, values: Tensor, *, strict: bool) -> Tensor:
        """(m,) float64 of the records' numbers (n,); NaN is below no candidate.

        Raises:
            DataError: where `strict`, for what is not a number.
        """
        numbers = values.detach().double().cpu()
        missing = numbers.isnan()
        if strict and bool(missing.any()):
            raise DataError(
                f"{int(missing.sum())} records have NaN; return a number for every record from `of`"
            )
        numbers = torch.where(missing, math.inf, numbers)
        below, up_to = (
            self._ranks(torch.bucketize(numbers, self.candidates, right=right))
            for right in (True, False)
        )
        wanted = self.q * len(numbers)
        off = torch.maximum(below - wanted, wanted - up_to).clamp(min=0)
        return -off / (2 * max(self.q, 1 - self.q))

    def _ranks(self, passed: Tensor) -> Tensor:
        """(m,) float64: how many records have passed at most j candidates.

        `passed` (n,) says how many each has.
        """
        return torch.bincount(passed, minlength=len(self.candidates) + 1).cumsum(0)[:-1].double()


KnownUtility = Frequency | Quantile


def best(scores: Tensor, k: int) -> Tensor:
    """(k,) int64: the places of the highest scores, best first; of equal ones the first."""
    return torch.argsort(scores, descending=True, stable=True)[:k]


def exponential(scores: Tensor, k: int, *, noise_multiplier: float, uniform: Tensor) -> Tensor:
    """(k,) int64 places drawn with P(j) proportional to exp(score_j / noise_multiplier).

    They are drawn without replacement.

    The k highest of score / noise_multiplier + Gumbel noise are k draws of the exponential
    mechanism, one after another without those drawn before (Durfee and Rogers 2019, section 4.1).

    Guarantee: each draw is e-DP and of bounded range e = 1 / noise_multiplier, for scores of which
    one record moves any two by at most 1 against each other; up to the rounding of float64, which
    moves each probability by some 1e-14: uniforms have 53 bits, and Gumbel noise made of them lies
    between -3.6 and 37.4.

    Args:
        scores: (m,).
        uniform: (m,) in [0, 1), 53 random bits each.
    """
    # (j + 1) / 2^53 is a float64 of its own for every j; where it is 1 the noise would be infinite
    waits = -torch.log(uniform + 2.0**-53)
    gumbel = -torch.log(waits.clamp(min=2.0**-54))
    return best(scores.cpu() / noise_multiplier + gumbel, k)
