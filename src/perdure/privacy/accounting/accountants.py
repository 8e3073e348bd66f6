"""Epsilon of all charges of one record, computed with dp-accounting.

`pld_epsilon` uses privacy loss distributions, `rdp_epsilon` Renyi DP, and `with_sampler` adds the
cost of integer noise.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal

from perdure.errors import PrivacyError
from perdure.privacy.accounting.charges import Charge, History, Relation
from perdure.privacy.accounting.gaussian_losses import gaussian_step
from perdure.privacy.grid import SENSITIVITY
from perdure.privacy.noise.table import DEVIATIONS, LOG2_ERROR

Accountant = Literal["pld", "rdp"]

WIDEST = 1e7

MOST_DRAWS = 2**48
"""Largest number of integers of noise for one record; a ledger refuses more, and every stated
epsilon allows for this number.
"""
DELTA_SHARE = 2.0**-10
"""Share of delta that is reserved for the difference between the integer sampler and ideal noise.
"""


# --------------------------------------------------------------------------- Renyi DP


@lru_cache(maxsize=4096)
def rdp_epsilon(history: History, delta: float, relation: Relation) -> float:
    """Epsilon under Renyi DP (Mironov 2017), converted at the best order.

    Args:
        history: merged charges of one record.
        delta: delta at which epsilon is stated, above 0 and below 1.
        relation: neighbouring relation.
    """
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    if not history or any(charge.noise_multiplier == 0 for charge in history):
        return math.inf if history else 0.0
    accountant = RdpAccountant()
    with quiet_absl():
        for charge in history:
            accountant.compose(rdp_event(charge, relation, dp_accounting), charge.steps)
        return with_sampler(lambda d: float(accountant.get_epsilon(d)), history, delta)


def rdp_event(charge: Charge, relation: Relation, library: Any) -> Any:
    """Build the event for the RDP accountant, which ignores the relation of an unsampled Gaussian.

    A discrete Gaussian costs no more than the Gaussian (Canonne, Kamath and Steinke 2020, theorem
    4). A mechanism that is epsilon-DP is randomised response at epsilon, processed further
    (Kairouz, Oh and Viswanath 2015).
    """
    if relation == "replace-one" and charge.sampling_rate < 1:
        raise PrivacyError(
            "RDP has no bound for Poisson sampling under replace-one; use accountant='pld'"
        )
    change = 2.0 if relation == "replace-one" else 1.0
    if charge.noise == "exponential":
        return library.RandomizedResponseDpEvent(
            2 / (1 + math.exp(min(change / charge.noise_multiplier, 700))), 2
        )
    if charge.noise == "discrete-gaussian":
        change = math.sqrt(change)  # one count falls by 1 and another rises by 1
    if charge.noise == "grid-gaussian":
        change *= SENSITIVITY
    gaussian = library.GaussianDpEvent(charge.noise_multiplier / change)
    sampled = charge.sampling_rate < 1
    return library.PoissonSampledDpEvent(charge.sampling_rate, gaussian) if sampled else gaussian


# ----------------------------------------------------------------------- privacy loss distributions


@lru_cache(maxsize=4096)
def pld_epsilon(history: History, delta: float, relation: Relation, interval: float) -> float:
    """Epsilon of the composed privacy loss distributions, rounded up on a grid of losses.

    The grid is coarser if losses reach hundreds, and finer if all losses are below 1. An epsilon of
    a million or more is returned as infinity.

    Args:
        history: merged charges of one record.
        delta: delta at which epsilon is stated, above 0 and below 1.
        relation: neighbouring relation.
        interval: distance between two points of the grid, before the grid is made coarser or finer.
    """
    if not history:
        return 0.0
    if any(charge.noise_multiplier == 0 for charge in history):
        return math.inf
    spread = _spread(history, relation)
    if spread > WIDEST:
        return math.inf
    interval *= _widening(spread)
    total: Any = None
    for charge in history:
        part = _steps(charge, relation, interval)
        total = part if total is None else total.compose(part)
    return with_sampler(lambda d: float(total.get_epsilon_for_delta(d)), history, delta)


def _widening(spread: float) -> float:
    """Factor for the grid's interval: above 1 to save memory, below 1 to resolve small losses."""
    if spread > 200:
        return float(10 ** math.ceil(math.log10(spread / 200)))
    return 10.0 ** min(0, math.floor(math.log10(spread)))


@lru_cache(maxsize=16)
def _steps(charge: Charge, relation: Relation, interval: float) -> Any:
    """Privacy loss distribution of all steps of `charge`.

    n unsampled steps with noise s are computed exactly, as one step with noise s / sqrt(n).
    """
    if charge.noise == "exponential":
        one = _selection(
            (2 if relation == "replace-one" else 1) / charge.noise_multiplier, interval
        )
    elif charge.noise == "discrete-gaussian":
        one = _counted(charge.noise_multiplier, interval)
        return one.self_compose(2 * charge.steps if relation == "replace-one" else charge.steps)
    elif charge.sampling_rate == 1:
        noise = _effective(charge) / math.sqrt(charge.steps)
        return gaussian_step(1.0, noise, relation, interval).once()
    else:
        step = _single(charge.sampling_rate, _effective(charge), relation, interval)
        return step.repeated(charge.steps)
    return one.self_compose(charge.steps)


def _spread(history: History, relation: Relation) -> float:
    """Size of the privacy losses that matter, which decides how coarse the grid is.

    The losses of one step reach 1/(2 s^2) + 10/s. The sum over all steps has mean at most k = sum n
    min(q / (2 s^2), q^2 (exp(1/s^2) - 1)), a bound on the KL divergence, with a spread of 10
    sqrt(2k). The loss of a selection reaches e = 1/s, and has mean at most min(e, e^2 / 2).
    """
    shift = 2.0 if relation == "replace-one" else 1.0
    reach = 0.0
    mean = 0.0
    for charge in history:
        n = charge.steps
        q = charge.sampling_rate
        s = _effective(charge) / shift
        if charge.noise == "exponential":
            reach = max(reach, 1 / s)
            mean = mean + n * min(1 / s, 0.5 / s**2)
            continue
        ratio = math.sqrt(n) / s if q == 1 else 1 / s
        reach = max(reach, ratio**2 / 2 + 10 * ratio)
        mean += n * min(q / (2 * s**2), q**2 * math.expm1(min(1 / s**2, 700)))
    return max(reach, mean + 10 * math.sqrt(2 * mean))


def _effective(charge: Charge) -> float:
    """Noise multiplier divided by a record's largest change of a sum, in units of the clip norm."""
    if charge.noise != "grid-gaussian":
        return charge.noise_multiplier
    return charge.noise_multiplier / SENSITIVITY


# ---------------------------------------------------------------- integers instead of real numbers


def with_sampler(epsilon_at: Callable[[float], float], history: History, delta: float) -> float:
    """Compute epsilon at delta of integer noise, from the ideal noise at a smaller delta.

    Over the N draws of a history, ln(real probability / ideal probability) of everything released
    is a sum of N terms of at most eta, the relative error of the sampler, with mean at most eta^2.
    By Hoeffding it exceeds lambda = N eta^2 + eta sqrt(2 N ln(1 / beta)) with probability at most
    beta. So epsilon grows by 2 lambda, and delta becomes

        delta e^lambda + (1 + e^(epsilon + lambda)) beta + the probability beyond the cut

    The cut at t standard deviations matters where one of two neighbours gives an output that the
    other cannot: with probability at most N P(|Z| > t - 1 / noise multiplier), and at most
    (1 + e^epsilon) N P(|Z| > t). Sampling and adaptive queries change nothing, since noise is
    independent of the data. See Prest 2017 for relative errors.

    Returns:
        Epsilon; infinite if the probability beyond the cut is too large for delta.
    """
    own = [charge for charge in history if charge.noise == "grid-gaussian"]
    ideal = epsilon_at(delta * (1 - DELTA_SHARE) if own else delta)
    if not own or math.isinf(ideal):
        return ideal
    error = 2.0**LOG2_ERROR
    # beta = delta / (2^12 e^(ideal + 2)): its share is below a quarter of DELTA_SHARE
    log_beta = math.log(delta) - 12 * math.log(2) - ideal - 2
    loss = MOST_DRAWS * error**2 + error * math.sqrt(2 * MOST_DRAWS * -log_beta)
    shift = SENSITIVITY / min(charge.noise_multiplier for charge in own)
    seen = MOST_DRAWS * (_two_sided(DEVIATIONS - shift) + _two_sided(DEVIATIONS))
    factored = MOST_DRAWS * _two_sided(DEVIATIONS) * (1 + math.exp(min(ideal + 1, 700)))
    beyond = min(seen, factored)
    return ideal + 2 * loss if beyond <= delta * DELTA_SHARE / 4 else math.inf


def _two_sided(t: float) -> float:
    """Return P(|Z| > t) for a standard normal Z."""
    return math.erfc(t / math.sqrt(2)) if t > 0 else 1.0


_single = lru_cache(maxsize=32)(gaussian_step)


@lru_cache(maxsize=8)
def _counted(noise: float, interval: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_discrete_gaussian_mechanism(
        noise, value_discretization_interval=interval
    )


@lru_cache(maxsize=8)
def _selection(epsilon: float, interval: float) -> Any:
    """Privacy loss distribution of the worst mechanism that is epsilon-DP."""
    from dp_accounting.pld import common, privacy_loss_distribution

    parameters = common.DifferentialPrivacyParameters(epsilon, 0.0)
    return privacy_loss_distribution.from_privacy_parameters(
        parameters, value_discretization_interval=interval
    )


@contextmanager
def quiet_absl() -> Iterator[None]:
    """Context manager that silences warnings about orders that the RDP accountant leaves out."""
    logger = logging.getLogger("absl")
    was = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = was
