"""Private selection: the best of a random number of trainings, for less than the cost of all.

A mechanism is run K times, independently and from one distribution, and only its best output is
released. K is random and stays secret. If one run is (a, r(a))-Renyi DP, the release is

    r'(a) = r(a) + log(E[K]) / (a - 1) + (1 + shape) min over b of ((1 - 1/b) r(b) + log(1/g) / b)

for a truncated negative binomial K with this shape (1: geometric, 0: logarithmic) and parameter g;
for a Poisson K, r'(a) = r(a) + E[K] d(a) + log(E[K]) / (a - 1), where one run is
(log(1 + 1/(a - 1)), d(a))-DP.

Source: Papernot and Steinke, Hyperparameter tuning with Renyi differential privacy, ICLR 2022,
theorems 2 and 6; the accountant is dp-accounting's.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, localcontext
from itertools import count
from typing import Literal

from perdure.errors import ConfigError, PrivacyError
from perdure.privacy.accounting.accountants import (
    DELTA_SHARE,
    quiet_absl,
    rdp_event,
    with_sampler,
)
from perdure.privacy.accounting.charges import History
from perdure.privacy.noise.key import NoiseKey

Repeats = Literal["geometric", "logarithmic", "poisson"]
SHAPES: dict[str, float] = {"geometric": 1.0, "logarithmic": 0.0, "poisson": math.inf}
"""Distributions of the number of runs, and their shape in the notation of dp-accounting."""
WORD = 53
"""Random bits of one uniform number of a key; a number of runs takes two of them."""
DIGITS = 60
"""Decimal digits of the distribution of the number of runs."""
DRAW_ERROR = 2.0**-80
"""Largest distance in total variation between the drawn number of runs and its distribution."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Distribution of the number of runs of which the best one is released.

    Args:
        mean: mean number of runs, above 1.
        repeats: `geometric`, `logarithmic` or `poisson`; with `poisson` there may be no run at all.

    Raises:
        ConfigError: if the mean or the distribution is not allowed.
    """

    mean: int
    repeats: Repeats = "geometric"

    def __post_init__(self) -> None:
        if self.repeats not in SHAPES:
            raise ConfigError.of("repeats", self.repeats, SHAPES)
        if not 1 < self.mean <= 10_000:
            raise ConfigError.of("mean number of runs", self.mean, "a number from 2 to 10000")

    def number(self, key: NoiseKey) -> int:
        """Return the number of runs that a key gives, always the same one.

        The distribution function is inverted with 60 digits at a uniform number of 106 bits.
        """
        high, low = key.uniform(2, purpose="number of runs", entry="", step=0).tolist()
        drawn = (int(high * 2**WORD) << WORD) + int(low * 2**WORD)
        with localcontext() as context:
            context.prec = DIGITS
            rest = Decimal(drawn) / Decimal(4**WORD)
            for number, mass in self._masses():
                rest -= mass
                # masses below the resolution of the number end the sum
                if rest < 0 or (number > self.mean and mass < Decimal(2) ** -120):
                    break
        return number

    def _masses(self) -> Iterator[tuple[int, Decimal]]:
        """Yield every number of runs with its probability, in order."""
        if self.repeats == "poisson":
            mass = (-Decimal(self.mean)).exp()
            for number in count():
                yield number, mass
                mass *= Decimal(self.mean) / (number + 1)
        elif self.repeats == "geometric":
            mass = 1 / Decimal(self.mean)
            for number in count(1):
                yield number, mass
                mass *= 1 - 1 / Decimal(self.mean)
        else:
            goes_on = 1 - Decimal(self._stops())
            scale = -1 / (1 - goes_on).ln()
            for number in count(1):
                yield number, scale * goes_on**number / number

    def _stops(self) -> float:
        """Return the parameter g of the logarithmic distribution with this mean, or a bit more.

        A larger g has a smaller mean and a smaller bound.
        """
        from scipy.optimize import brentq

        def surplus(g: float) -> float:
            return (1 / g - 1) / -math.log(g) - self.mean

        found = float(brentq(surplus, 1e-12, 1 - 1e-9, xtol=1e-16, rtol=1e-14))
        return min(found * (1 + 1e-9), 1 - 1e-12)


def selection_epsilon(history: History, delta: float, selection: Selection) -> float:
    """Return the epsilon of releasing the best of a random number of runs, for add/remove.

    Guarantee: holds if all runs are independent and from one distribution, each charges at most
    `history`, and neither the number of runs nor the output of another run is released.

    Args:
        history: merged charges of one record in one run, or a bound on them.
        delta: delta at which epsilon is stated, above 0 and below 1.
        selection: distribution of the number of runs.

    Raises:
        PrivacyError: if a charge has no Renyi bound in the accountant.
    """
    import dp_accounting
    from dp_accounting.dp_event import RepeatAndSelectDpEvent
    from dp_accounting.rdp import RdpAccountant

    if not history or any(charge.noise_multiplier == 0 for charge in history):
        return math.inf if history else 0.0
    refused = sorted({charge.noise for charge in history if charge.noise == "exponential"})
    if refused:
        raise PrivacyError(
            f"private selection has no bound for charges of kind {', '.join(refused)}; use a "
            "strategy without private selections of its own, or charge every trial"
        )
    one_run = dp_accounting.ComposedDpEvent(
        [
            dp_accounting.SelfComposedDpEvent(
                rdp_event(charge, "add-remove", dp_accounting), charge.steps
            )
            for charge in history
        ]
    )
    accountant = RdpAccountant()
    with quiet_absl():
        accountant.compose(
            RepeatAndSelectDpEvent(one_run, float(selection.mean), SHAPES[selection.repeats])
        )
        found = with_sampler(
            lambda each: float(accountant.get_epsilon(each * (1 - DELTA_SHARE))), history, delta
        )
    if math.isinf(found):
        return found
    # the drawn number of runs is not exactly of its distribution
    missed = DRAW_ERROR * (1 + math.exp(min(found, 700)))
    return found if missed <= delta * DELTA_SHARE / 4 else math.inf
