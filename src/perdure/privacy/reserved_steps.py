"""Blocks of steps that are charged before their noise is drawn, and the noise of a run."""

from dataclasses import dataclass

import torch

from perdure.errors import PrivacyError
from perdure.privacy.adaptive_clipping import Adaptive
from perdure.privacy.clipping.clip import WITHIN
from perdure.privacy.grid import Grid
from perdure.privacy.ledger.entries import Entry

VOTE = 0.5
"""Largest change of the count for adaptive clipping by one record."""
WITHIN_SHAPE = {WITHIN: torch.Size([])}


class ChangedSumError(PrivacyError):
    """A step was executed again with another sum than the one for which noise was drawn.

    The rest of its block was charged again, under a new entry. Sample the records of the step
    again, with the new entry, and repeat the request.
    """


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Noise multiplier and excluded partitions of every experience, fixed before a run begins.

    Args:
        noise: noise multiplier of a step in each experience; the last one is used for all later
            ones.
        excluded: partitions that are left out of all pools, by experience; empty if there are none.
    """

    noise: tuple[float, ...]
    excluded: tuple[frozenset[str], ...] = ()

    def noise_in(self, index: int) -> float:
        """Noise multiplier of a step in experience `index`."""
        return self.noise[min(index, len(self.noise) - 1)]

    def excluded_in(self, index: int) -> frozenset[str]:
        """Partitions that are left out of the pools in experience `index`."""
        if not self.excluded:
            return frozenset()
        return self.excluded[min(index, len(self.excluded) - 1)]


@dataclass(frozen=True, kw_only=True)
class ReservedSteps:
    """Block of steps that one ledger entry has charged.

    Args:
        entry: the ledger entry.
        steps: the steps of the block.
        expected: declared number of records in a step.
        slots: steps per epoch if each record has a fixed step in it; None for Poisson sampling.
        grid: grid on which the sums are counted.
        drawn: next step whose noise may be drawn; the noise of earlier steps was drawn.
    """

    entry: Entry
    steps: range
    expected: float
    slots: int | None
    grid: Grid
    drawn: int

    @property
    def paid_by(self) -> str:
        """Digest of the ledger entry that charged the block."""
        return self.entry.digest


@dataclass(frozen=True, kw_only=True)
class Votes:
    """Grid and noise of the count of unclipped records, which adaptive clipping releases.

    Args:
        grid: grid of the count.
        noise: standard deviation of the noise divided by the largest change by one record.
    """

    grid: Grid
    noise: float


def votes_of(adaptive: Adaptive | None, expected: float) -> Votes | None:
    """Return grid and noise of the count for adaptive clipping; None for another clipping.

    One record changes the count by one vote, 1/2.
    """
    if adaptive is None:
        return None
    noise = adaptive.count_noise * expected / VOTE
    return Votes(grid=Grid.of(1, noise), noise=noise)
