"""Random points of the ball: the floor that an attack with gradients must exceed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.adversarial.balls import uniform_in_ball
from perdure.adversarial.base import Attack, InputLosses


@dataclass(frozen=True, kw_only=True)
class RandomPoint(Attack):
    """The one of several uniform points of the ball that raises the record's loss most.

    Args:
        points: number of points per record.
    """

    points: int = 4

    def perturb(
        self, losses: InputLosses, inputs: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the best point of each record. See `Attack.perturb`."""
        generator = generator or torch.Generator().manual_seed(0)
        origin = inputs.detach()
        limits = self._limits(origin)
        best = origin
        for _ in range(self.points):
            change = uniform_in_ball(origin, self.norm, generator)
            moved = self._feasible(origin, origin + self._radius(origin) * change, limits)
            better = losses(moved) > losses(best)
            best = torch.where(better.view(-1, *[1] * (origin.ndim - 1)), moved, best)
        return best
