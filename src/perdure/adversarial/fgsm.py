"""FGSM: one gradient step that increases each record's own loss (Goodfellow et al. 2015)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.adversarial.balls import steepest_direction
from perdure.adversarial.base import Attack, InputLosses, input_gradient


@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """Fast gradient (sign) method: one step of length epsilon.

        x' = clip(x + epsilon * sign(grad_x loss))            linf
        x' = clip(x + epsilon * grad_x loss / |grad_x loss|)  l2

    The fields are those of `Attack`.

    >>> import torch
    >>> FGSM(epsilon=0.25).perturb(lambda x: 3 * x[:, 0] - x[:, 1], torch.full((1, 2), 0.5))
    tensor([[0.7500, 0.2500]])

    Source: Goodfellow, Shlens, Szegedy 2015, "Explaining and harnessing adversarial examples",
    section 4.
    """

    def perturb(
        self, losses: InputLosses, inputs: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Take one step along the gradient; deterministic, so `generator` is not used."""
        origin = inputs.detach()
        direction = steepest_direction(input_gradient(losses, origin), self.norm)
        moved = origin + self._radius(origin) * direction
        return self._feasible(origin, moved, self._limits(origin))
