"""From charges to epsilon, and from epsilon to a noise multiplier.

Privacy loss distributions (PLD) decide. A coarse grid comes first: its epsilon is an upper bound
too, it takes no longer than Renyi DP (RDP), and it is far tighter. RDP is computed only for
comparison. The central-limit approximation of Gaussian DP is not offered, because its epsilon can
be below the true one.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from perdure.errors import BudgetError, ConfigError
from perdure.privacy.accounting.accountants import Accountant, pld_epsilon, rdp_epsilon
from perdure.privacy.accounting.charges import Charge, History, Noise, Relation, merged

INTERVAL = 1e-4
COARSE_INTERVAL = 1e-3
NOISE_RANGE = (0.05, 1e4)
ROUGH_RANGE = (1e-9, 1e6)
FINE_TOLERANCE = 5e-4
"""Largest gap, relative to the target, between the target and the cost of a calibrated history."""
FINE_CALLS = 4
"""Number of evaluations on the fine grid that a search may use to reach `FINE_TOLERANCE`."""


def epsilon(
    charges: Iterable[Charge],
    *,
    delta: float,
    accountant: Accountant = "pld",
    relation: Relation = "add-remove",
) -> float:
    """Epsilon of the composition of `charges` at `delta`.

    Guarantee: an upper bound. It also holds if queries depend on earlier answers, but the charges
    may not depend on them. PLD is pessimistically discretised at 1e-4, and coarser if epsilon
    reaches hundreds. An epsilon of a million or more is returned as infinity.

    Under replace-one a record may change into any other record. One step is then dominated by the
    pair (1-q) N(0, s^2) + q N(-1, s^2) against (1-q) N(0, s^2) + q N(1, s^2), with s = noise
    multiplier and q = sampling rate; at q = 1 this is sensitivity 2C. No other pair v, v' with |v|,
    |v'| <= 1 costs more, for this reason: with L and L' the densities of N(v') and N(0) relative to
    N(v), the divergence at order a >= 1 is q E[(1 - a L - (1-q)(a-1)/q L')+], a convex function
    with non-negative mixed derivative of two log-normals of mean 1; it grows with each entry of
    their covariance (Kahane's inequality), and |v-v'|^2, |v|^2 and (v-v').v are all largest at v =
    -v', |v| = 1. Orders below 1 follow by exchanging the two sides.

    Args:
        charges: charges of one record; the result is 0 if there are none.
        delta: number in (0, 1).
        accountant: "pld" (used in all reports) or "rdp" (looser, faster).
        relation: how neighbouring data sets differ.

    Raises:
        ConfigError: if delta, accountant or relation is not allowed.
        PrivacyError: if RDP is asked for Poisson-sampled charges under replace-one; no such bound
            is implemented.

    Source: Koskela et al. 2020, Doroshenko et al. 2022 (PLD); Mironov, Talwar and Zhang 2019 (RDP).
    """
    if not 0 < delta < 1:
        raise ConfigError.of("delta", delta, "0 < delta < 1")
    for field, value, allowed in (
        ("accountant", accountant, ("pld", "rdp")),
        ("relation", relation, ("add-remove", "replace-one")),
    ):
        if value not in allowed:
            raise ConfigError.of(field, value, allowed)
    history = merged(charges)
    if accountant == "rdp":
        return rdp_epsilon(history, delta, relation)
    return pld_epsilon(history, delta, relation, INTERVAL)


def check_target(epsilon: float, delta: float) -> None:
    """Refuse an epsilon or delta that cannot be a privacy target.

    Raises:
        ConfigError: names the value that is not allowed.
    """
    if not 0 < epsilon < math.inf:
        raise ConfigError.of("epsilon", epsilon, "finite and above 0")
    if not 0 < delta < 1:
        raise ConfigError.of("delta", delta, "0 < delta < 1")


def worst(
    histories: Mapping[str, Sequence[Charge]], *, delta: float, relation: Relation = "add-remove"
) -> tuple[str, float]:
    """Return the name and the PLD epsilon of the history that costs most.

    The result is ("none", 0) if there is no history.
    """
    names: dict[History, str] = {}
    for name, charges in histories.items():
        names.setdefault(merged(charges), name)
    found = ("none", 0.0)
    bounds = [
        (pld_epsilon(history, delta, relation, COARSE_INTERVAL), history)
        for history in _undominated(names)
    ]
    for bound, history in sorted(bounds, reverse=True):
        if found[0] != "none" and bound <= found[1]:
            break  # no later history can cost more, by its bound on the coarse grid
        spent = epsilon(history, delta=delta, relation=relation)
        if found[0] == "none" or spent > found[1]:
            found = (names[history], spent)
    return found


def within(
    charges: Iterable[Charge], target: float, *, delta: float, relation: Relation = "add-remove"
) -> bool:
    """Return True if `charges` cost at most `target`.

    If the coarse grid cannot show this, the fine grid decides.
    """
    history = merged(charges)
    # with this margin the answer is that of the fine grid
    coarse = pld_epsilon(history, delta, relation, COARSE_INTERVAL)
    return coarse <= 0.998 * target or epsilon(history, delta=delta, relation=relation) <= target


def calibrate(
    charges_at: Callable[[float], Sequence[Sequence[Charge]]],
    *,
    epsilon: float,
    delta: float,
    relation: Relation = "add-remove",
) -> float:
    """Find the smallest noise multiplier at which no history costs more than `epsilon` at `delta`.

    The search goes from 0.05 to 10,000. The result has a relative error of at most 1e-3 and is
    rounded up to four digits.

    Guarantee: with the returned noise multiplier, each history of `charges_at` costs at most
    `epsilon`. PLD at 1e-4 checks this.

    Args:
        charges_at: function from a noise multiplier to histories, one per partition, always in the
            same order.
        epsilon: target epsilon, above 0.
        delta: number in (0, 1).
        relation: how neighbouring data sets differ.

    Raises:
        ConfigError: if the target or delta is not allowed.
        BudgetError: if no noise multiplier is large enough, because charges with fixed noise
            already cost more.

    >>> noise = calibrate(lambda noise: [[Charge(0.01, noise, 1000)]], epsilon=3, delta=1e-5)
    >>> round(noise, 2)
    0.81
    """
    check_target(epsilon, delta)
    histories = [merged(history) for history in charges_at(1.0)]
    over = _heaviest(histories, delta) if histories else None
    noise = NOISE_RANGE[0]
    while over is not None:
        noise = max(noise, _solve(_at(charges_at, over), epsilon, delta, relation))
        over = _over(list(map(merged, charges_at(noise))), over, epsilon, delta, relation)
    return noise


def _heaviest(histories: Sequence[History], delta: float) -> int:
    """Index of the history that costs most, by a rough formula."""
    costs = [rough_epsilon(history, delta) for history in histories]
    return costs.index(max(costs))


def _at(
    charges_at: Callable[[float], Sequence[Sequence[Charge]]], index: int
) -> Callable[[float], History]:
    return lambda noise: merged(charges_at(noise)[index])


def _over(
    histories: Sequence[History], solved: int, target: float, delta: float, relation: Relation
) -> int | None:
    """Index of a history other than `solved` that costs more than `target`; None if none does."""
    others = [history for history in _undominated(histories) if history != histories[solved]]
    # the most expensive first
    for history in sorted(others, key=lambda own: -rough_epsilon(own, delta)):
        if not within(history, target, delta=delta, relation=relation):
            return histories.index(history)
    return None


def _undominated(histories: Iterable[History]) -> list[History]:
    """Return the histories that are not contained in another one, step by step."""
    distinct = list(dict.fromkeys(histories))
    steps = {own: {charge.kind: charge.steps for charge in own} for own in distinct}
    left: dict[History, None] = {}
    # a history that contains another one has more steps, so it comes first
    for own in sorted(distinct, key=lambda history: -sum(steps[history].values())):
        if not any(_contains(steps[other], own) for other in left):
            left[own] = None
    return [own for own in distinct if own in left]


def _contains(large: Mapping[tuple[float, float, Noise], int], small: History) -> bool:
    return all(charge.steps <= large.get(charge.kind, 0) for charge in small)


def _solve(
    history_at: Callable[[float], History], target: float, delta: float, relation: Relation
) -> float:
    """Find the smallest noise multiplier with which one history costs at most `target`.

    A rough formula gives the start, a coarse PLD grid finds the root, and the fine grid decides.
    """
    interval = COARSE_INTERVAL * max(1.0, target / 3)

    def excess(log_noise: float) -> float:
        spent = pld_epsilon(history_at(math.exp(log_noise)), delta, relation, interval)
        return _logarithm(spent / target)

    def rough_excess(log_noise: float) -> float:
        return _logarithm(rough_epsilon(history_at(math.exp(log_noise)), delta) / target)

    low, high = _bracket(rough_excess, 0.0, first=1.0)
    start = high if low == high else _root(rough_excess, low, high)
    low, high = _bracket(excess, start, first=0.02)
    if high > math.log(NOISE_RANGE[1]):
        raise BudgetError(
            f"no noise multiplier up to {NOISE_RANGE[1]:g} reaches the target epsilon, because "
            "the charges with fixed noise already cost more; raise epsilon, or remove these "
            "charges"
        )
    if low == high:
        return NOISE_RANGE[0]
    return _on_the_fine_grid(history_at, _root(excess, low, high), target, delta, relation)


def _on_the_fine_grid(
    history_at: Callable[[float], History],
    root: float,
    target: float,
    delta: float,
    relation: Relation,
) -> float:
    """Return the smallest four-digit noise multiplier on the fine grid, from the coarse root."""

    def excess(noise: float) -> float:
        spent = epsilon(history_at(noise), delta=delta, relation=relation)
        return _logarithm(spent / target)

    noise = _round_up(math.exp(root))
    before = excess(noise)
    slope = -1.0  # the slope is at least as steep if all charges depend on the noise
    found = math.inf if before > 0 else noise
    for _ in range(FINE_CALLS):
        if -FINE_TOLERANCE < before <= 0:
            break
        guess = _round_up(noise * math.exp(-(before + FINE_TOLERANCE / 10) / slope))
        if guess == noise:
            break
        after = excess(guess)
        slope = min((after - before) / math.log(guess / noise), -1e-2)
        noise = guess
        before = after
        if after <= 0:
            found = min(found, noise)
    while math.isinf(found):
        noise = _round_up(noise * math.exp(max(before, 2e-4)))
        before = excess(noise)
        found = noise if before <= 0 else math.inf
    return found


def _logarithm(ratio: float) -> float:
    return math.log(min(max(ratio, 1e-12), 1e12))


def rough_epsilon(history: History, delta: float) -> float:
    """Estimate epsilon from the Gaussian mechanism closest to a history (central limit); no bound.

    Source: Dong, Roth and Su 2022 (Gaussian differential privacy), theorem 3.6 and corollary 2.13.
    """
    square = sum(charge.steps * _mu_squared(charge) for charge in history)
    if square == 0 or math.isinf(square):
        return square
    mu = math.sqrt(square)

    def tail(x: float) -> float:
        return math.erfc(x / math.sqrt(2)) / 2

    def over(log_epsilon: float) -> float:
        own = math.exp(log_epsilon)
        beside = tail(own / mu + mu / 2)
        spent = tail(own / mu - mu / 2) - (math.exp(own) * beside if own < 700 else 0.0)
        return spent - delta

    low, high = (math.log(edge) for edge in ROUGH_RANGE)
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if over(middle) > 0 else (low, middle)
    return math.exp(high)


def _mu_squared(charge: Charge) -> float:
    """Compute the contribution of one step to mu^2 of Gaussian DP."""
    if charge.noise_multiplier == 0:
        return math.inf
    inverse = 1 / charge.noise_multiplier**2
    if charge.noise == "exponential":
        return inverse / 4  # the Gaussian with the same zero-concentrated privacy
    if charge.sampling_rate == 1:
        return inverse
    return charge.sampling_rate**2 * math.expm1(min(inverse, 600))


def _bracket(
    excess: Callable[[float], float], start: float, *, first: float
) -> tuple[float, float]:
    """Logarithms of two noise multipliers between which a decreasing function changes its sign.

    Both are the smallest allowed one if that is enough; both lie above the largest if that is not.

    Args:
        excess: logarithm of epsilon / target, as a function of the logarithm of the noise
            multiplier; its slope is -1 or steeper if all charges depend on the noise.
        start: logarithm of the noise multiplier at which the search starts.
        first: smallest first step of the search.
    """
    lowest, highest = (math.log(noise) for noise in NOISE_RANGE)
    here = min(max(start, lowest), highest)
    value = excess(here)
    step = max(first, 1.05 * abs(value))
    if value > 0:
        while value > 0:
            if here >= highest:
                return math.inf, math.inf
            low = here
            here = min(here + step, highest)
            value = excess(here)
            step *= 2
        return low, here
    while value <= 0:
        if here <= lowest:
            return lowest, lowest
        high = here
        here = max(here - step, lowest)
        value = excess(here)
        step *= 2
    return here, high


def _root(excess: Callable[[float], float], low: float, high: float) -> float:
    """Root of a decreasing function between `low` and `high`, with an error of at most 2e-3.

    The method is regula falsi in the Illinois variant.
    """
    at_low = excess(low)
    at_high = excess(high)
    middle = high
    for _ in range(50):
        middle = (low * at_high - high * at_low) / (at_high - at_low)
        at_middle = excess(middle)
        if abs(at_middle) < 2e-3 or high - low < 2e-4:
            break
        if at_middle > 0:
            low = middle
            at_low = at_middle
            at_high = at_high / 2
        else:
            high = middle
            at_high = at_middle
            at_low = at_low / 2
    return middle


def _round_up(noise: float) -> float:
    """Round a noise multiplier up to four significant digits."""
    unit = 10.0 ** (math.floor(math.log10(noise)) - 3)
    return float(f"{math.ceil(noise / unit - 1e-9) * unit:.4g}")
