"""PGD: several projected gradient steps from a random start (Madry et al. 2018)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.adversarial.balls import steepest_direction, uniform_in_ball
from perdure.adversarial.base import Attack, InputLosses, input_gradient
from perdure.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """Projected gradient ascent from a random point of the ball; the last iterate is returned.

        x' <- project(x' + step_size * direction(grad_x' loss)),  `steps` times

    The random start lies in the ball and may lie outside the bounds; every later iterate lies in
    both.

    Args:
        steps: number of gradient steps.
        step_size: length of one step; None for 2.5 * epsilon / steps, enough to cross the ball.
        random_start: start from a uniform random point of the ball, not from the record.
        restarts: number of starts; the one with the highest loss is kept for each record.
        samples: number of passes whose gradients are averaged in each step, for models that are
            random themselves (expectation over transformation).
        epsilon: radius of the ball; see `Attack`.
        norm: norm of the ball; see `Attack`.
        bounds: smallest and largest value of an input; see `Attack`.

    Source: Madry et al. 2018, "Towards deep learning models resistant to adversarial attacks",
    section 2.1; Athalye, Carlini, Wagner 2018, "Obfuscated gradients give a false sense of
    security", section 5.2, for `samples`.
    """

    steps: int = 10
    step_size: float | None = None
    random_start: bool = True
    restarts: int = 1
    samples: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "restarts", "samples"):
            if getattr(self, name) < 1:
                raise ConfigError.of(name, getattr(self, name), "1 or more")
        if self.restarts > 1 and not self.random_start:
            raise ConfigError.of("restarts", self.restarts, "1 without a random start")
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise ConfigError.of(
                "step_size", self.step_size, "a positive number, or None for 2.5 * epsilon / steps"
            )

    def perturb(
        self, losses: InputLosses, inputs: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Take `steps` gradient steps from each start; a random start needs `generator`."""
        origin = inputs.detach()
        found = self._climb(losses, origin, generator)
        if self.restarts == 1:
            return found
        with torch.no_grad():
            highest = losses(found)
        for _ in range(self.restarts - 1):
            tried = self._climb(losses, origin, generator)
            with torch.no_grad():
                values = losses(tried)
            better = values > highest
            highest = torch.where(better, values, highest)
            found = torch.where(better.view(-1, *[1] * (origin.ndim - 1)), tried, found)
        return found

    def _climb(
        self, losses: InputLosses, origin: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Return the last iterate from one start."""
        limits = self._limits(origin)
        length = self.step_size or 2.5 * self._radius(origin) / self.steps
        moved = self._start(origin, generator)
        for _ in range(self.steps):
            gradient = input_gradient(losses, moved)
            for _ in range(self.samples - 1):
                gradient = gradient + input_gradient(losses, moved)
            step = length * steepest_direction(gradient, self.norm)
            moved = self._feasible(origin, moved + step, limits)
        return moved

    def _start(self, origin: Tensor, generator: torch.Generator | None) -> Tensor:
        if not self.random_start:
            return origin
        if generator is None:
            raise ConfigError.of("generator", None, "a torch.Generator, or PGD(random_start=False)")
        return origin + self._radius(origin) * uniform_in_ball(origin, self.norm, generator)
