"""Mechanisms with discrete results: integer noise on counts, and the exponential mechanism.

The exponential mechanism chooses some of many public answers.

Discrete Gaussian (Canonne, Kamath and Steinke 2020, "The discrete Gaussian for differential
privacy"):

    P(z) = exp(-z^2 / (2 s^2)) / sum over all integers of the same,   z an integer

Exponential mechanism (McSherry and Talwar 2007), for scores such that one record changes the
difference of any two by at most 1: P(j) = exp(e score_j) / sum over i of exp(e score_i) is e-DP,
and has bounded range e, so it costs at most e^2 / 8 of zero-concentrated privacy (Cesar and Rogers
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
"""Number of bits of a word."""


# --------------------------------------------------------------------------- integer noise


class Integers:
    """Source of uniform integers, made from a stream of random bytes.

    Args:
        stream: function from a number n to n random bytes.
    """

    def __init__(self, stream: Callable[[int], bytes]) -> None:
        self._stream = stream
        self._words: list[int] = []

    def below(self, n: int) -> int:
        """Return a uniform integer from 0 to n - 1, without bias.

        As many random bits as n - 1 has are drawn until their number is below n.
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
    """Return (n,) int64 independent draws of P(z) proportional to exp(-z^2 / (2 sigma^2)).

    Exact: every decision compares integers, and sigma is the exact rational value of the float. So
    the leak of floating-point noise (Mironov 2012) cannot occur. The time of a draw depends on its
    result, so do not let others measure it.

    Args:
        n: number of draws.
        sigma: scale of the noise, above 0 and finite.
        stream: function from a number k to k random bytes.

    Source: Canonne, Kamath and Steinke 2020, algorithms 1 to 3.
    """
    if not 0 < sigma < math.inf:
        raise ConfigError.of("sigma", sigma, "finite and above 0")
    variance = Fraction(sigma) ** 2
    integers = Integers(stream)
    return torch.tensor([_gaussian(variance, integers) for _ in range(n)], dtype=torch.int64)


def _gaussian(variance: Fraction, integers: Integers) -> int:
    """Draw one discrete Gaussian (algorithm 3): a discrete Laplace y of scale t, kept or not.

    The probability that y is kept is exp(-(|y| - s^2/t)^2 / (2 s^2)); if not, another y is drawn.
    """
    a = variance.numerator
    b = variance.denominator
    t = math.isqrt(a // b) + 1
    while True:
        y = _laplace(t, integers)
        if bernoulli_exp((abs(y) * t * b - a) ** 2, 2 * a * b * t**2, integers):
            return y


def _laplace(t: int, integers: Integers) -> int:
    """Draw y from the discrete Laplace distribution, P(y) ~ exp(-|y| / t) (algorithm 2)."""
    while True:
        remainder = integers.below(t)
        if not bernoulli_exp(remainder, t, integers):
            continue
        times = 0
        while bernoulli_exp(1, 1, integers):
            times += 1
        size = remainder + t * times
        negative = integers.below(2)
        if size or not negative:  # otherwise 0 would have twice its probability
            return -size if negative else size


def bernoulli_exp(numerator: int, denominator: int, integers: Integers) -> bool:
    """Draw True with probability exp(-numerator / denominator) (algorithm 1)."""
    while numerator > denominator:
        if not bernoulli_exp(1, 1, integers):
            return False
        numerator -= denominator
    k = 1
    while integers.below(denominator * k) < numerator:
        k += 1
    return k % 2 == 1


def counted(values: Tensor, bins: int, *, strict: bool) -> Tensor:
    """Return (bins,) int64 counts: how often each bin occurs in `values` (n,).

    One record changes one count by 1.

    Args:
        values: (n,) bin of each record.
        bins: number of bins.
        strict: refuse values outside the bins. Under privacy they are ignored, because an error
            would reveal them.

    Raises:
        ConfigError: if there is less than one bin.
        DataError: if values are not whole numbers, or (if `strict`) outside the bins.
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
    """Number of records in each bin, as scores for the choice of the k most frequent bins.

    Guarantee: one record raises the score of at most one bin, by 1, and lowers none.

    Args:
        bins: number of bins.
        k: number of bins that are chosen.
    """

    bins: int
    k: int = 1

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise ConfigError.of("bins", self.bins, "whole numbers from 1")
        if not 1 <= self.k <= self.bins:
            raise ConfigError.of("k", self.k, f"1 to {self.bins}, the number of bins")

    def scores(self, values: Tensor, *, strict: bool) -> Tensor:
        """Return (bins,) float64 counts, from the bin (n,) of each record."""
        return counted(values, self.bins, strict=strict).double()


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Quantile:
    """Scores for the choice of a q-quantile from public candidates: closeness to the quantile.

    At most q n records are below a q-quantile, and at least q n are at most equal to it.

        score(c) = -max(0, #{x < c} - q n, q n - #{x <= c}) / (2 max(q, 1 - q))

    If no record equals a candidate, the term in the numerator is |#{x < c} - q n|. If many records
    equal one, that term alone would not distinguish it from its neighbours.

    Guarantee: one record changes the difference of any two scores by at most 1. Adding a record
    adds 0 or 1 to each count and q to q n, so each term changes by at most max(q, 1 - q), and a
    score by at most 1/2. One score may rise while another falls, so the factor 1/2 is needed.

    Args:
        q: level of the quantile, above 0 and below 1.
        candidates: (m,) public numbers in increasing order.

    Raises:
        ConfigError: if q is out of range, or candidates are not finite and increasing.

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
        """Return (m,) float64 scores of the candidates, from one number (n,) per record.

        NaN is below no candidate.

        Raises:
            DataError: if `strict` is True and a value is NaN.
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
        """Return (m,) float64 numbers of records that have passed at most j candidates.

        `passed` (n,) is the number of candidates that each record has passed.
        """
        return torch.bincount(passed, minlength=len(self.candidates) + 1).cumsum(0)[:-1].double()


KnownUtility = Frequency | Quantile


def best(scores: Tensor, k: int) -> Tensor:
    """Return (k,) int64 indices of the highest scores, best first; among equal scores the first."""
    return torch.argsort(scores, descending=True, stable=True)[:k]


def exponential(scores: Tensor, k: int, *, noise_multiplier: float, uniform: Tensor) -> Tensor:
    """Return (k,) int64 indices drawn with P(j) proportional to exp(score_j / noise_multiplier).

    They are drawn without replacement.

    The indices of the k largest values of score / noise_multiplier + Gumbel noise are k draws of
    the exponential mechanism, each without the indices drawn before (Durfee and Rogers 2019,
    section 4.1).

    Guarantee: each draw is e-DP and of bounded range e = 1 / noise_multiplier, if one record
    changes the difference of any two scores by at most 1. This holds up to the rounding of float64,
    which changes each probability by about 1e-14: uniforms have 53 bits, and Gumbel noise made from
    them is between -3.6 and 37.4.

    Args:
        scores: (m,) scores of the answers.
        k: number of answers that are drawn.
        noise_multiplier: 1 / e.
        uniform: (m,) numbers in [0, 1), with 53 random bits each.
    """
    # (j + 1) / 2^53 is a float64 of its own for every j; where it is 1 the noise would be infinite
    waits = -torch.log(uniform + 2.0**-53)
    gumbel = -torch.log(waits.clamp(min=2.0**-54))
    return best(scores.cpu() / noise_multiplier + gumbel, k)
