"""Base class of attacks, and helper functions for gradients on plain tensors.

An attack gets a function `inputs (n, ...) -> losses (n,)` and changes every row to increase its own
loss. Because row i of the gradient of the summed losses depends on row i only, the change of a
record does not depend on other records in the batch: with released weights, the sensitivity of a
private sum stays the same.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.utils.checked_fields import CheckedFields

InputLosses = Callable[[Tensor], Tensor]
"""Function from inputs (n, ...) to losses (n,), one per record; row i depends on input i only.
"""

Norm = Literal["linf", "l2"]
"""Norm that limits a perturbation."""


def input_gradient(losses: InputLosses, inputs: Tensor) -> Tensor:
    """Gradient (n, ...) of each record's loss with respect to that record.

    Parameters get no gradient.

    Raises:
        ConfigError: if inputs are not floating-point, or `losses` does not give one number per
            record.
    """
    if not inputs.is_floating_point():
        raise ConfigError.of(
            "inputs.dtype", inputs.dtype, "a floating-point type; attack the embeddings instead"
        )
    with torch.enable_grad():
        leaf = inputs.detach().requires_grad_()
        values = losses(leaf)
        if values.shape != leaf.shape[:1]:
            raise ConfigError.of(
                "losses(inputs).shape", tuple(values.shape), f"({len(leaf)},), one per record"
            )
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return gradient


def steepest_direction(gradient: Tensor, norm: Norm) -> Tensor:
    """Return, for each row, the step of norm 1 that increases the loss most to first order.

    It is the sign of the gradient (linf) or its unit vector (l2).

    For a row whose gradient is 0, the step is 0.
    """
    if norm == "linf":
        return gradient.sign()
    dims = tuple(range(1, gradient.ndim))
    # Divide by the largest entry first, because the squares of a small gradient underflow in
    # float32.
    largest = gradient.abs().amax(dims, keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
    scaled = gradient / largest
    length: Tensor = torch.linalg.vector_norm(scaled, dim=dims, keepdim=True)
    return scaled / length.clamp_min(1.0)


def project_l2(change: Tensor, epsilon: float) -> Tensor:
    """Shorten every row to an L2 norm of at most `epsilon`; shorter rows do not change."""
    length = torch.linalg.vector_norm(change, dim=tuple(range(1, change.ndim)), keepdim=True)
    return torch.where(length > epsilon, change * (epsilon / length), change)


def uniform_in_ball(like: Tensor, epsilon: float, norm: Norm, generator: torch.Generator) -> Tensor:
    """Draw one uniform point in a ball for each row of `like`.

    The points are drawn on the CPU and moved to the device of `like`.
    """
    if norm == "linf":
        draw = epsilon * (2 * torch.rand(like.shape, dtype=like.dtype, generator=generator) - 1)
    else:
        normal = torch.randn(like.shape, dtype=like.dtype, generator=generator)
        share = torch.rand(len(like), *[1] * (like.ndim - 1), dtype=like.dtype, generator=generator)
        # Volume grows with radius ** dimension, so the radius is this root of a uniform number.
        draw = epsilon * share ** (1 / like.shape[1:].numel()) * steepest_direction(normal, "l2")
    return draw.to(like.device)


@dataclass(frozen=True, kw_only=True)
class Attack(CheckedFields, ABC):
    """Base class of attacks, with the allowed change of an input and the bounds of inputs.

    Args:
        epsilon: radius of the ball around each record, in units of the inputs; 0 for no change.
        norm: "linf" (largest change of any entry) or "l2" (Euclidean length of a record's change).
        bounds: smallest and largest value of an input; None for inputs without bounds. An entry
            outside the bounds is never moved further out.

    Raises:
        ConfigError: if a value is not allowed.
    """

    epsilon: float
    norm: Norm = "linf"
    bounds: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < math.inf:
            raise ConfigError.of("epsilon", self.epsilon, "a finite number, 0 or more")
        if self.norm not in get_args(Norm):
            raise ConfigError.of("norm", self.norm, get_args(Norm))
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise ConfigError.of("bounds", self.bounds, "(low, high) with low < high, or None")

    @abstractmethod
    def perturb(
        self, losses: InputLosses, inputs: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return inputs (n, ...), each changed to increase its own loss.

        Guarantee: the result is within the ball and the bounds up to rounding, `inputs` and
        gradients of parameters do not change, and the change of a row depends only on that row and
        its own random numbers. The caller freezes the parameters, which saves a quarter of the
        time.

        Args:
            losses: function (n, ...) -> (n,), one loss per record, to be increased.
            inputs: (n, ...) floating-point inputs.
            generator: CPU generator for the random numbers of the attack.
        """

    def _limits(self, origin: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest allowed value of each entry of perturbed inputs.

        They follow from the bounds and from the linf ball, which also contains the L2 ball.
        """
        lower = origin - self.epsilon
        upper = origin + self.epsilon
        if self.bounds is not None:
            low, high = self.bounds
            lower = torch.maximum(lower, origin.clamp(max=low))
            upper = torch.minimum(upper, origin.clamp(min=high))
        return lower, upper

    def _feasible(self, origin: Tensor, moved: Tensor, limits: tuple[Tensor, Tensor]) -> Tensor:
        """Move `moved` back into the ball around `origin` and into the bounds."""
        if self.norm == "l2":
            moved = origin + project_l2(moved - origin, self.epsilon)
        # Clamping only moves entries towards the origin, so the result stays in the ball.
        return moved.clamp(*limits)
