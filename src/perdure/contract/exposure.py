"""Exposure: the partitions that one experience uses, and how often it uses each record."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Exposure:
    """Partitions that a step of an experience may draw from, with their probabilities.

    All values follow from public facts.

    Args:
        scope: partition name to the probability that one of its records enters a step.
        rate: expected share of the pool in a step.
        pool_size: declared number of records in the pool.
        slots: number of steps in an epoch, if each record takes part in exactly one step per epoch,
            always the same one; None for Poisson sampling.
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
        """Return the largest number of steps, out of `steps`, in which one record takes part."""
        return steps if self.slots is None else -(-steps // self.slots)
