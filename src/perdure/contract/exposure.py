"""Exposure: the partitions that one experience uses, and how often."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Exposure:
    """Partitions that a step of one experience may draw from, and how often.

    A function of public facts.

    Args:
        scope: partition name to the probability that one of its records enters a step.
        rate: expected share of the pool in a step.
        pool_size: declared number of records in the pool.
        slots: steps of an epoch where every record has a fixed step in it; None for Poisson
            sampling.
    """

    scope: Mapping[str, float]
    rate: float
    pool_size: float
    slots: int | None = None

    @property
    def expected(self) -> float:
        """Declared number of records in a step."""
        return self.rate * self.pool_size

    def times(self, steps: int) -> int:
        """Return the largest number of `steps` steps that one record takes part in."""
        return steps if self.slots is None else -(-steps // self.slots)
