"""Exact statistics of a step, for runs without privacy and for raw diagnostics."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Diagnostics:
    """Exact statistics of one step, without noise.

    Args:
        rows: number of records.
        losses: (n,) losses of the records, or their mean ().
        clipped: share of records whose gradient was clipped; 0 without privacy.
    """

    rows: int
    losses: Tensor
    clipped: float = 0.0

    @property
    def loss(self) -> Tensor:
        """Mean loss of the records, a scalar."""
        return self.losses.mean()
