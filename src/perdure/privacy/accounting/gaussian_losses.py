"""Privacy loss distributions of Gaussian steps, sampled or not, for dp-accounting to compose.

Bounds, distributions, pessimistic discretisation and repetition equal those of dp-accounting's
`from_gaussian_mechanism` and `self_compose`, up to rounding. A bound on the rounding of repeated
steps counts as an infinite loss here; at many steps and a small delta theirs may be below the exact
epsilon. They look for the output at each privacy loss in a Python loop, and for the tails by sums
of exponentials, which takes nine tenths of a calibration; here one formula covers the whole grid.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from perdure.privacy.accounting.charges import Relation

if TYPE_CHECKING:
    from dp_accounting.pld.pld_pmf import DensePLDPmf
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

Numbers = npt.NDArray[np.float64]

TAIL = 1e-15
"""Probability of the tails that repeated steps cut off; it counts as an infinite loss."""
ROUNDING = 4 * 2.0**-52
"""Bound per step on the error of a delta by the transforms, in float64; it counts as the tails do.

The largest error of 265 random steps, against transforms of 64-bit mantissas, is 1.6 * 2^-52.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Losses:
    """Pessimistic probabilities of the privacy losses of one step, on a grid.

    Args:
        interval: distance between two points of the grid.
        lowest: smallest loss, in intervals.
        masses: (n,) probability of every loss on the grid, from the smallest.
        infinite: probability of an infinite loss.
    """

    interval: float
    lowest: int
    masses: Numbers
    infinite: float

    def pmf(self) -> "DensePLDPmf":
        """Return the losses as a distribution of dp-accounting."""
        from dp_accounting.pld.pld_pmf import DensePLDPmf

        return DensePLDPmf(self.interval, self.lowest, self.masses, self.infinite, True)

    def repeated(self, steps: int) -> "Losses":
        """Return the losses of `steps` steps together; tails and rounding count as infinite."""
        low, high = self._bounds(steps)
        least = max(high - low + 1, len(self.masses))
        # transforms of such lengths are fast
        size = min(odd << (-(-least // odd) - 1).bit_length() for odd in (1, 3, 5, 9, 15))
        size += size % 2
        around = np.fft.irfft(np.fft.rfft(self.masses, size) ** steps, size)
        masses = np.roll(around, -low)[: high - low + 1]
        infinite = TAIL + steps * ROUNDING - math.expm1(steps * math.log1p(-self.infinite))
        return Losses(
            interval=self.interval,
            lowest=self.lowest * steps + low,
            masses=masses,
            infinite=min(1.0, infinite),
        )

    def _bounds(self, steps: int) -> tuple[int, int]:
        """Return the first and last index of the sum of `steps` losses, without tails of `TAIL`.

        Uses the Chernoff bound at 40 orders, as dp-accounting does, but with a product per order
        instead of a sum of exponentials, which takes most of the time of a calibration.
        """
        n = len(self.masses)
        low = 0
        high = (n - 1) * steps
        rest = math.log(2 / TAIL)
        places = np.arange(n) / n
        for sign in (1, -1):
            one = np.exp(sign * places)
            power = np.ones(n)
            for order in range(1, 21):
                power *= one
                moment = float(self.masses @ power)
                if moment <= 0:
                    continue
                bound = (steps * math.log(moment) + rest) * n / (sign * order)
                if sign > 0:
                    high = min(high, math.ceil(bound))
                else:
                    low = max(low, math.floor(bound))
        return low, high


@dataclass(frozen=True, kw_only=True, eq=False)
class GaussianStep:
    """Privacy losses of one Gaussian step, for a removed and for an added record.

    Args:
        sides: losses for a removed record and, if they differ, for an added one.
    """

    sides: tuple[Losses, ...]

    def once(self) -> "PrivacyLossDistribution":
        """Return the privacy loss distribution of one step."""
        return self._both(self.sides)

    def repeated(self, steps: int) -> "PrivacyLossDistribution":
        """Return the privacy loss distribution of `steps` steps together."""
        return self._both(side.repeated(steps) for side in self.sides)

    def _both(self, sides: Iterable[Losses]) -> "PrivacyLossDistribution":
        from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

        return PrivacyLossDistribution(*(side.pmf() for side in sides))


def gaussian_step(rate: float, noise: float, relation: Relation, interval: float) -> GaussianStep:
    """Return the privacy losses of one step, by connecting the dots (Doroshenko et al. 2022).

    Args:
        rate: probability that a record takes part in the step.
        noise: standard deviation of the noise divided by the sensitivity.
        relation: how neighbouring data sets differ.
        interval: distance between two points of the grid of privacy losses.
    """
    from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss

    sides = [AdjacencyType.REMOVE, AdjacencyType.ADD][: 1 if rate == 1 else 2]
    if relation == "replace-one":
        sides = [AdjacencyType.REPLACE]
    found = []
    for side in sides:
        loss = GaussianPrivacyLoss(noise, sampling_prob=rate, adjacency_type=side)
        found.append(_discretised(loss, side.name, rate, noise, interval))
    return GaussianStep(sides=tuple(found))


def _discretised(loss: Any, side: str, rate: float, noise: float, interval: float) -> Losses:
    """Return probabilities on the grid that give an upper bound, from the exact deltas (alg. 1)."""
    bounds = loss.connect_dots_bounds()
    lowest = math.floor(bounds.epsilon_lower / interval)
    highest = max(math.ceil(bounds.epsilon_upper / interval), lowest + 1)
    epsilons = np.arange(lowest, highest + 1) * interval
    deltas = np.minimum.accumulate(_deltas(loss, side, rate, noise, epsilons))
    falls = np.diff(deltas)
    growth = math.expm1(interval)
    masses = np.empty_like(deltas)
    masses[0] = 1 - deltas[0] + falls[0] / growth
    masses[1:-1] = (falls[1:] - falls[:-1] * math.exp(interval)) / growth
    masses[-1] = falls[-1] / math.expm1(-interval)
    return Losses(
        interval=interval,
        lowest=lowest,
        masses=np.maximum(masses, 0.0),
        infinite=float(deltas[-1]),
    )


def _deltas(loss: Any, side: str, rate: float, noise: float, epsilons: Numbers) -> Numbers:
    """Delta at every epsilon: P(loss >= epsilon) in one data set - e^epsilon times P in the other.

    Under sampling, the loss of an added record stays below -log(1 - rate), and the loss of a
    removed record stays above log(1 - rate).
    """
    deltas = np.zeros_like(epsilons)
    inside = np.ones(len(epsilons), dtype=bool)
    if rate < 1 and side == "ADD":
        inside = epsilons < -math.log1p(-rate)
    elif rate < 1 and side == "REMOVE":
        inside = epsilons > math.log1p(-rate)
        deltas[~inside] = -np.expm1(epsilons[~inside])
    own = epsilons[inside]
    outputs = noise**2 * _output_per_variance(side, rate, noise, own)
    outputs += {"ADD": 0.5, "REMOVE": -0.5, "REPLACE": 0.0}[side]
    beyond = np.exp(own + loss.mu_lower_log_cdf(outputs))
    deltas[inside] = loss.mu_upper_cdf(outputs) - beyond
    return np.clip(deltas, 0, 1)


def _output_per_variance(side: str, rate: float, noise: float, epsilons: Numbers) -> Numbers:
    """Output at which the loss is epsilon, minus the midpoint of both means, over the variance."""
    if side == "ADD":
        return _unsampled(rate, -epsilons)
    if side == "REMOVE":
        return -_unsampled(rate, epsilons)
    if rate == 1:
        return -epsilons / 2
    half = np.abs(epsilons) / 2
    with np.errstate(divide="ignore"):
        # log of sinh(half) (1 - rate) / rate e^(1 / (2 noise^2)); minus infinity at 0
        log = half + np.log(-np.expm1(-2 * half) / 2)
        log += 0.5 / noise**2 + math.log1p(-rate) - math.log(rate)
    large = np.maximum(log, 0.0)
    arc = np.where(
        log > 0,
        large + np.log1p(np.sqrt(1 + np.exp(-2 * large))),
        np.arcsinh(np.exp(np.minimum(log, 0.0))),
    )
    return -np.sign(epsilons) * arc - epsilons / 2


def _unsampled(rate: float, epsilons: Numbers) -> Numbers:
    """Convert losses of the sampled step to the unsampled one: log(1 + (e^epsilon - 1) / rate)."""
    if rate == 1:
        return epsilons
    small = np.minimum(epsilons, 1.0)
    large = np.maximum(epsilons, 1.0)
    return np.where(
        epsilons < 1,
        np.log1p(np.expm1(small) / rate),
        large - math.log(rate) + np.log1p((rate - 1) * np.exp(-large)),
    )
