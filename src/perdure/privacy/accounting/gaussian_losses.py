"""Privacy loss distributions of one Gaussian step, sampled or not, for dp-accounting to compose.

Bounds, distributions and pessimistic discretisation equal those of dp-accounting's
`from_gaussian_mechanism`, up to rounding. That function looks for the output at each privacy loss
in a Python loop, which takes nine tenths of a calibration; here one formula covers the whole grid.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from perdure.privacy.accounting.charges import Relation

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

Numbers = npt.NDArray[np.float64]


def gaussian_step(
    rate: float, noise: float, relation: Relation, interval: float
) -> "PrivacyLossDistribution":
    """Privacy loss distribution of one step, by connecting the dots (Doroshenko et al. 2022).

    Args:
        rate: probability that a record takes part in the step.
        noise: standard deviation of the noise divided by the sensitivity.
        relation: how neighbouring data sets differ.
        interval: distance between two points of the grid of privacy losses.
    """
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
    from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss

    sides = [AdjacencyType.REMOVE, AdjacencyType.ADD][: 1 if rate == 1 else 2]
    if relation == "replace-one":
        sides = [AdjacencyType.REPLACE]
    masses = []
    for side in sides:
        loss = GaussianPrivacyLoss(noise, sampling_prob=rate, adjacency_type=side)
        masses.append(_discretised(loss, side.name, rate, noise, interval))
    return PrivacyLossDistribution(*masses)


def _discretised(loss: Any, side: str, rate: float, noise: float, interval: float) -> Any:
    """Probabilities on the grid that give an upper bound, from the exact deltas at its points."""
    from dp_accounting.pld import pld_pmf

    bounds = loss.connect_dots_bounds()
    lowest = math.floor(bounds.epsilon_lower / interval)
    highest = math.ceil(bounds.epsilon_upper / interval)
    epsilons = np.arange(lowest, highest + 1) * interval
    return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(
        interval, lowest, highest, _deltas(loss, side, rate, noise, epsilons)
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
