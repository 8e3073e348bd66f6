"""PGD: several projected gradient steps from a random start (Madry et al. 2018)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.adversarial.base import (
    Attack,
    InputLosses,
    input_gradient,
    steepest_direction,
    uniform_in_ball,
)
from perdure.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Projected gradient ascent from a random point of the ball; the last iterate is returned.

        x' <- project(x' + step_size * direction(grad_x' loss)),  `steps` times

    Args:
        steps: number of gradient steps.
        step_size: length of one step; None for 2.5 * epsilon / steps, enough to cross the ball.
        random_start: start from a uniform random point of the ball, not from the record.
        epsilon: radius of the ball; see `Attack`.
        norm: norm of the ball; see `Attack`.
        bounds: smallest and largest value of an input; see `Attack`.

    Source: Madry et al. 2018, "Towards deep learning models resistant to adversarial attacks",
    section 2.1.
    """

    steps: int = 10
    step_size: float | None = None
    random_start: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ConfigError.of("steps", self.steps, "1 or more")
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise ConfigError.of(
                "step_size", self.step_size, "a positive number, or None for 2.5 * epsilon / steps"
            )

    def perturb(
        self, losses: InputLosses, inputs: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Take `steps` gradient steps; a random start needs `generator`."""
        origin = inputs.detach()
        limits = self._limits(origin)
        length = 2.5 * self.epsilon / self.steps if self.step_size is None else self.step_size
        moved = self._feasible(origin, self._start(origin, generator), limits)
        for _ in range(self.steps):
            step = length * steepest_direction(input_gradient(losses, moved), self.norm)
            moved = self._feasible(origin, moved + step, limits)
        return moved

    def _start(self, origin: Tensor, generator: torch.Generator | None) -> Tensor:
        if not self.random_start:
            return origin
        if generator is None:
            raise ConfigError.of("generator", None, "a torch.Generator, or PGD(random_start=False)")
        return origin + uniform_in_ball(origin, self.epsilon, self.norm, generator)
