"""Exposure of one record, and the epsilon of it all.

By dp-accounting's loss distributions and Renyi DP.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal

from perdure.errors import PrivacyError
from perdure.privacy.accounting.charges import Charge, History, Relation

Accountant = Literal["pld", "rdp"]

WIDEST = 1e7


# --------------------------------------------------------------------------- Renyi DP


@lru_cache(maxsize=4096)
def rdp_epsilon(history: History, delta: float, relation: Relation) -> float:
    """Epsilon under Renyi DP (Mironov 2017), converted at the best order."""
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    if not history or any(charge.noise_multiplier == 0 for charge in history):
        return math.inf if history else 0.0
    accountant = RdpAccountant()
    with _quiet_absl():
        for charge in history:
            accountant.compose(_event(charge, relation, dp_accounting), charge.steps)
        return float(accountant.get_epsilon(delta))


def _event(charge: Charge, relation: Relation, library: Any) -> Any:
    """Build the event for the RDP accountant, which ignores the relation of an unsampled Gaussian.

    A discrete Gaussian costs no more than the Gaussian (Canonne, Kamath and Steinke 2020, theorem
    4). What is epsilon-DP is randomised response at epsilon, processed further (Kairouz, Oh and
    Viswanath 2015).
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
    gaussian = library.GaussianDpEvent(charge.noise_multiplier / change)
    sampled = charge.sampling_rate < 1
    return library.PoissonSampledDpEvent(charge.sampling_rate, gaussian) if sampled else gaussian


# ----------------------------------------------------------------------- privacy loss distributions


@lru_cache(maxsize=4096)
def pld_epsilon(history: History, delta: float, relation: Relation, interval: float) -> float:
    """Epsilon of the composed privacy loss distributions, pessimistic on a grid of `interval`.

    The grid is widened where losses run into the hundreds; a million and more is infinity.
    """
    if not history:
        return 0.0
    if any(charge.noise_multiplier == 0 for charge in history):
        return math.inf
    spread = _spread(history, relation)
    if spread > WIDEST:
        return math.inf
    interval *= 10 ** max(0, math.ceil(math.log10(spread / 200)))
    total: Any = None
    for charge in history:
        part = _steps(charge, relation, interval)
        total = part if total is None else total.compose(part)
    return float(total.get_epsilon_for_delta(delta))


def _steps(charge: Charge, relation: Relation, interval: float) -> Any:
    """PLD of all steps of `charge`; n unsampled steps are exactly one at noise / sqrt(n)."""
    if charge.noise == "exponential":
        one = _selection(
            (2 if relation == "replace-one" else 1) / charge.noise_multiplier, interval
        )
    elif charge.noise == "discrete-gaussian":
        one = _counted(charge.noise_multiplier, interval)
        return one.self_compose(2 * charge.steps if relation == "replace-one" else charge.steps)
    elif charge.sampling_rate == 1:
        return _single(1.0, charge.noise_multiplier / math.sqrt(charge.steps), relation, interval)
    else:
        one = _single(charge.sampling_rate, charge.noise_multiplier, relation, interval)
    return one.self_compose(charge.steps)


def _spread(history: History, relation: Relation) -> float:
    """Size of the losses that matter, by which the grid is widened to fit into memory.

    Those of one step reach 1/(2 s^2) + 10/s; the sum of all has mean at most
    k = sum n min(q / (2 s^2), q^2 (exp(1/s^2) - 1)), a bound on the KL divergence, give or take 10
    sqrt(2k). A selection's loss reaches e = 1/s, with mean at most min(e, e^2 / 2).
    """
    shift = 2.0 if relation == "replace-one" else 1.0
    reach = 0.0
    mean = 0.0
    for charge in history:
        n = charge.steps
        q = charge.sampling_rate
        s = charge.noise_multiplier / shift
        if charge.noise == "exponential":
            reach = max(reach, 1 / s)
            mean = mean + n * min(1 / s, 0.5 / s**2)
            continue
        ratio = math.sqrt(n) / s if q == 1 else 1 / s
        reach = max(reach, ratio**2 / 2 + 10 * ratio)
        mean += n * min(q / (2 * s**2), q**2 * math.expm1(min(1 / s**2, 700)))
    return max(reach, mean + 10 * math.sqrt(2 * mean))


@lru_cache(maxsize=8)
def _single(rate: float, noise: float, relation: Relation, interval: float) -> Any:
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    relations = {
        "add-remove": NeighboringRelation.ADD_OR_REMOVE_ONE,
        "replace-one": NeighboringRelation.REPLACE_ONE,
    }
    return privacy_loss_distribution.from_gaussian_mechanism(
        noise,
        sampling_prob=rate,
        value_discretization_interval=interval,
        neighboring_relation=relations[relation],
    )


@lru_cache(maxsize=8)
def _counted(noise: float, interval: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_discrete_gaussian_mechanism(
        noise, value_discretization_interval=interval
    )


@lru_cache(maxsize=8)
def _selection(epsilon: float, interval: float) -> Any:
    """PLD of what is epsilon-DP and of nothing else known: the worst there is."""
    from dp_accounting.pld import common, privacy_loss_distribution

    parameters = common.DifferentialPrivacyParameters(epsilon, 0.0)
    return privacy_loss_distribution.from_privacy_parameters(
        parameters, value_discretization_interval=interval
    )


@contextmanager
def _quiet_absl() -> Iterator[None]:
    """Silence the warnings about orders that RDP leaves out: that only loosens the bound."""
    logger = logging.getLogger("absl")
    was = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = was
