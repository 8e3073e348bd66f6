"""RS-FGSM: one gradient step from a random start, for fast adversarial training."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.adversarial.balls import steepest_direction, uniform_in_ball
from perdure.adversarial.base import Attack, InputLosses, input_gradient
from perdure.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RSFGSM(Attack):
    """One step from a uniform random point of the ball, as in fast adversarial training.

        x' = clip(x + u + stride * epsilon * sign(grad_{x + u} loss)),  u uniform in the ball

    The start is not cut at the bounds: with a start that is, many pixels of an image start at
    their old value, and training collapses to models that only this attack cannot fool.

    Args:
        stride: length of the step as a multiple of epsilon.
        epsilon: radius of the ball; see `Attack`.
        norm: norm of the ball; see `Attack`.
        bounds: smallest and largest value of an input; see `Attack`.

    Source: Wong, Rice, Kolter 2020, "Fast is better than free", algorithm 3.
    """

    stride: float = 1.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.stride < math.inf:
            raise ConfigError.of("stride", self.stride, "a positive number")

    def perturb(
        self, losses: InputLosses, inputs: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Take one step from a random point; it needs `generator`."""
        if generator is None:
            raise ConfigError.of("generator", None, "a torch.Generator, for the random start")
        origin = inputs.detach()
        radius = self._radius(origin)
        start = origin + radius * uniform_in_ball(origin, self.norm, generator)
        direction = steepest_direction(input_gradient(losses, start), self.norm)
        moved = start + self.stride * radius * direction
        return self._feasible(origin, moved, self._limits(origin))
