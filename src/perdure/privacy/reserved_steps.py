"""Steps that the ledger was charged for before the first of them is drawn, and their schedule."""

from dataclasses import dataclass

import torch

from perdure.errors import PrivacyError
from perdure.privacy.adaptive_clipping import Adaptive
from perdure.privacy.clipping.clip import WITHIN
from perdure.privacy.grid import Grid
from perdure.privacy.ledger.entries import Entry

VOTE = 0.5
"""Largest change of the count beside an adaptive clip norm by one record."""
WITHIN_SHAPE = {WITHIN: torch.Size([])}


class ChangedSumError(PrivacyError):
    """A step that is executed again has another sum than noise was drawn for.

    The rest of its block was charged again, under a new entry. Draw the records of the step anew,
    by the coins of that entry, and ask again.
    """


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Settings that are fixed before the first draw, experience by experience.

    Args:
        noise: noise multiplier of a step; the last one holds for all that follow.
        excluded: partitions that are out of every pool; empty where none ever is.
    """

    noise: tuple[float, ...]
    excluded: tuple[frozenset[str], ...] = ()

    def noise_in(self, index: int) -> float:
        """Noise multiplier of a step in experience `index`."""
        return self.noise[min(index, len(self.noise) - 1)]

    def excluded_in(self, index: int) -> frozenset[str]:
        """Partitions out of the pools in experience `index`."""
        if not self.excluded:
            return frozenset()
        return self.excluded[min(index, len(self.excluded) - 1)]


@dataclass(frozen=True, kw_only=True)
class ReservedSteps:
    """Steps that a ledger entry pays for.

    Args:
        entry: in the ledger.
        steps: which.
        expected: declared number of records in one of them.
        slots: steps per epoch where the order is fixed.
        grid: that their sums are counted on.
        drawn: the step that is drawn next.
    """

    entry: Entry
    steps: range
    expected: float
    slots: int | None
    grid: Grid
    drawn: int

    @property
    def paid_by(self) -> str:
        """Digest of the entry."""
        return self.entry.digest


@dataclass(frozen=True, kw_only=True)
class Votes:
    """Noise of the count beside an adaptive clip norm.

    Args:
        grid: of the count.
        noise: standard deviation over what one record moves it by.
    """

    grid: Grid
    noise: float


def votes_of(adaptive: Adaptive | None, expected: float) -> Votes | None:
    """Grid and noise of the count beside a gradient; one record moves it by one vote, 1/2."""
    if adaptive is None:
        return None
    noise = adaptive.count_noise * expected / VOTE
    return Votes(grid=Grid.of(1, noise), noise=noise)
