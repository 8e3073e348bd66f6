"""Charges: the privacy cost of the mechanisms that used one record."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from perdure.errors import ConfigError

Relation = Literal["add-remove", "replace-one"]
Noise = Literal["gaussian", "grid-gaussian", "discrete-gaussian", "exponential"]
SAMPLED: frozenset[str] = frozenset({"gaussian", "grid-gaussian"})
"""Kinds of noise that may be added to a Poisson sample."""
History = tuple["Charge", ...]
"""Charges of one record, merged by `merged`."""


@dataclass(frozen=True, order=True)
class Charge:
    """Privacy cost of some steps of one mechanism for one record.

    Args:
        sampling_rate: probability in (0, 1] that the record is in a step (Poisson); 1.0 means no
            sampling.
        noise_multiplier: standard deviation of the noise divided by the sensitivity; 0 for no
            noise. For `exponential` it is 1 / epsilon of one selection.
        steps: number of steps.
        noise: `gaussian`: the Gaussian mechanism of the textbook. `grid-gaussian`: the mechanism of
            `perdure.privacy.grid`, including the extra cost of rounding, slack and the sampler.
            `discrete-gaussian`: integer noise on a count that one record changes by 1.
            `exponential`: one selection by the exponential mechanism. The last two are never
            sampled.

    Raises:
        ConfigError: if a value is outside its range.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int
    noise: Noise = "gaussian"

    def __post_init__(self) -> None:
        if not 0 < self.sampling_rate <= 1:
            raise ConfigError.of("sampling_rate", self.sampling_rate, "0 < rate <= 1")
        if not 0 <= self.noise_multiplier < math.inf:
            raise ConfigError.of("noise_multiplier", self.noise_multiplier, "finite and at least 0")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 0:
            raise ConfigError.of("steps", self.steps, "integers from 0")
        if self.noise not in get_args(Noise):
            raise ConfigError.of("noise", self.noise, get_args(Noise))
        if self.noise not in SAMPLED and self.sampling_rate != 1:
            raise ConfigError.of(
                "sampling_rate", self.sampling_rate, f"1.0 for {self.noise}, which is not sampled"
            )

    @property
    def kind(self) -> tuple[float, float, Noise]:
        """Sampling rate, noise multiplier and kind of noise, without the number of steps."""
        return float(self.sampling_rate), float(self.noise_multiplier), self.noise


def covers(stronger: Iterable[Charge], weaker: Iterable[Charge]) -> bool:
    """Return True if every step of `weaker` has its own step of `stronger` that reveals as much.

    A step reveals at least as much as another if its rate is at least as high and its noise at most
    as strong (joint convexity and data processing). Then `stronger` costs at least as much as
    `weaker`, also when both are composed with the same further charges. The matching is greedy, so
    False proves nothing.
    """
    left = {charge.kind: charge.steps for charge in merged(stronger)}
    for charge in sorted(weaker, key=lambda each: (-each.sampling_rate, each.noise_multiplier)):
        needed = charge.steps
        # use the weakest sufficient step first, so that stronger ones remain for others
        for kind in sorted(left, key=lambda each: (each[0], -each[1])):
            rate, noise_multiplier, noise = kind
            enough = rate >= charge.sampling_rate and noise_multiplier <= charge.noise_multiplier
            if enough and noise == charge.noise:
                taken = min(needed, left[kind])
                left[kind] -= taken
                needed -= taken
        if needed:
            return False
    return True


def bounding(histories: Iterable[Iterable[Charge]]) -> History:
    """Return one history that costs at least as much as each given one, also after composition.

    If one of them covers all others, it is returned. If not, the result has each mechanism as often
    as the history that has it most often: epsilon alone does not show which one costs most after
    more charges are added.
    """
    each = sorted({merged(history) for history in histories})
    for candidate in each:
        if all(covers(candidate, other) for other in each):
            return candidate
    most: dict[tuple[float, float, Noise], int] = {}
    for charge in (charge for history in each for charge in history):
        most[charge.kind] = max(charge.steps, most.get(charge.kind, 0))
    return merged(Charge(rate, sigma, n, noise) for (rate, sigma, noise), n in most.items())


def merged(charges: Iterable[Charge]) -> History:
    """Add up the steps of equal mechanisms and sort the result; composition ignores the order."""
    steps: dict[tuple[float, float, Noise], int] = {}
    for charge in charges:
        steps[charge.kind] = steps.get(charge.kind, 0) + charge.steps
    return tuple(
        sorted(Charge(rate, sigma, n, noise) for (rate, sigma, noise), n in steps.items() if n)
    )
