"""Charges: what one record was exposed to."""

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
"""What one record was exposed to, merged by `merged`."""


@dataclass(frozen=True, order=True)
class Charge:
    """Some steps of one mechanism, as seen by one record.

    Args:
        sampling_rate: probability in (0, 1] that the record is in a step (Poisson); 1.0 means no
            sampling.
        noise_multiplier: standard deviation of the noise divided by the sensitivity; 0 means none.
            Of `exponential`: 1 / epsilon of one selection.
        steps: how often.
        noise: `gaussian`, that of the textbook; `grid-gaussian`, that of `perdure.privacy.grid`,
            with what rounding, slack and sampler cost; `discrete-gaussian`, integer noise on one
            count that the record moves by 1; `exponential`, one selection by the exponential
            mechanism. The last two are not sampled.

    Raises:
        ConfigError: for a value outside these ranges.
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
        """All but how often."""
        return float(self.sampling_rate), float(self.noise_multiplier), self.noise


def merged(charges: Iterable[Charge]) -> History:
    """Add up the steps of equal mechanisms and sort: composition does not depend on the order."""
    steps: dict[tuple[float, float, Noise], int] = {}
    for charge in charges:
        steps[charge.kind] = steps.get(charge.kind, 0) + charge.steps
    return tuple(
        sorted(Charge(rate, sigma, n, noise) for (rate, sigma, noise), n in steps.items() if n)
    )
