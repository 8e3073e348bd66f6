"""Base class of attacks, and the gradient of losses with respect to inputs.

An attack gets a function `inputs (n, ...) -> losses (n,)` and changes every row to increase its own
loss. Because row i of the gradient of the summed losses depends on row i only, the change of a
record does not depend on other records in the batch: with released weights, the sensitivity of a
private sum stays the same.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from perdure.adversarial.balls import Norm, project
from perdure.adversarial.bounds import Bounds, PerFeature, numbers_of, of_entries, refuse_bounds
from perdure.adversarial.objectives import Objective, losses_of
from perdure.errors import ConfigError
from perdure.utils.checked_fields import CheckedFields

InputLosses = Callable[[Tensor], Tensor]
"""Function from inputs (n, ...) to losses (n,), one per record; row i depends on input i only.
"""

Logits = Callable[[Tensor], Tensor]
"""Differentiable function from inputs (n, ...) to logits (n, classes)."""

Limits = tuple[Tensor, Tensor]
"""Smallest and largest allowed value of each entry of perturbed inputs."""


def input_gradient(losses: InputLosses, inputs: Tensor) -> Tensor:
    """Gradient (n, ...) of each record's loss with respect to that record.

    Entries that are NaN or infinite, as of a distance of 0, become 0: a step along them would leave
    the ball. Parameters get no gradient.

    Raises:
        ConfigError: if inputs are not floating-point, or `losses` does not give one number per
            record.
    """
    return raw_gradient(losses, inputs).nan_to_num(0.0, 0.0, 0.0)


def raw_gradient(losses: InputLosses, inputs: Tensor) -> Tensor:
    """Gradient (n, ...) as `input_gradient`, with entries that are NaN or infinite as they are.

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


@dataclass(frozen=True, kw_only=True)
class Attack(CheckedFields, ABC):
    """Base class of attacks, with the allowed change of an input and the bounds of inputs.

    Args:
        epsilon: radius of the ball around each record, in units of the inputs; 0 for no change.
            With norm "linf" it may be a list with one radius per feature.
        norm: "linf" (largest change of any entry), "l2" (Euclidean length of a record's change) or
            "l1" (sum of the absolute changes of a record's entries).
        bounds: smallest and largest value of an input, each for all features or as a list with one
            number per feature; None for inputs without bounds. An entry outside the bounds is never
            moved further out.

    Raises:
        ConfigError: if a value is not allowed.
    """

    epsilon: PerFeature
    norm: Norm = "linf"
    bounds: Bounds = (0.0, 1.0)

    OWN_LOSSES: ClassVar[bool] = False
    """True for an attack that works on logits alone, for evaluations only."""

    def __post_init__(self) -> None:
        radii = numbers_of(self.epsilon)
        if not radii or not all(0 <= radius < math.inf for radius in radii):
            allowed = "a finite number, 0 or more, or a list with one such number per feature"
            raise ConfigError.of("epsilon", self.epsilon, allowed)
        if self.norm not in get_args(Norm):
            raise ConfigError.of("norm", self.norm, get_args(Norm))
        if isinstance(self.epsilon, Sequence) and self.norm != "linf":
            raise ConfigError.of("epsilon", self.epsilon, f'one number for norm "{self.norm}"')
        refuse_bounds(self.bounds)

    @abstractmethod
    def perturb(
        self, losses: InputLosses, inputs: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return inputs (n, ...), each changed to increase its own loss.

        Guarantee: the result is within the ball and the bounds up to rounding, `inputs` and
        gradients of parameters do not change, and the change of a row depends only on that row and
        its own random numbers. The caller freezes the parameters, which saves a quarter of the
        time, and puts the model into evaluation mode.

        Args:
            losses: function (n, ...) -> (n,), one loss per record, to be increased.
            inputs: (n, ...) floating-point inputs.
            generator: CPU generator for the random numbers of the attack.
        """

    def against(
        self,
        predict: Logits,
        inputs: Tensor,
        labels: Tensor,
        *,
        objectives: Sequence[Objective],
        generator: torch.Generator | None,
    ) -> Tensor:
        """Return inputs (n, ...), each changed so that a model errs, if one objective can do it.

        The objectives are tried one after another, each on the records that no earlier one has
        brought to an error.

        Args:
            predict: function from inputs to logits (n, classes).
            inputs: (n, ...) floating-point inputs.
            labels: (n,) int64 labels.
            objectives: names of the losses to raise.
            generator: CPU generator for the random numbers of the attack.
        """
        moved = inputs.clone()
        left = torch.arange(len(inputs), device=inputs.device)
        for objective in objectives:
            if not len(left):
                break
            own = labels[left]
            tried = self.perturb(
                lambda rows, name=objective, own=own: losses_of(name, predict(rows), own),  # type: ignore[misc]
                inputs[left],
                generator=generator,
            )
            moved[left] = tried
            with torch.no_grad():
                left = left[predict(tried).argmax(1) == own]
        return moved

    def refuse_shape(self, inputs: Tensor) -> None:
        """Refuse a list of epsilons or bounds that does not fit inputs (n, ...).

        Raises:
            ConfigError: if a list does not have one number per feature.
        """
        of_entries("epsilon", self.epsilon, inputs)
        for bound in self.bounds or ():
            of_entries("bounds", bound, inputs)

    def outside(self, inputs: Tensor) -> int:
        """Return the number of entries of inputs (n, ...) that are outside the bounds."""
        if self.bounds is None:
            return 0
        low, high = (of_entries("bounds", bound, inputs) for bound in self.bounds)
        return int(((inputs < low) | (inputs > high)).sum())

    def _radius(self, origin: Tensor) -> float | Tensor:
        """Return epsilon, as a tensor of the shape of one record if it differs by feature."""
        return of_entries("epsilon", self.epsilon, origin)

    def _limits(self, origin: Tensor) -> Limits | None:
        """Return the smallest and the largest allowed value of each entry of perturbed inputs.

        They follow from the bounds and, for norm "linf", from the ball; None without limits.
        """
        if self.norm == "linf":
            radius = self._radius(origin)
            lower = origin - radius
            upper = origin + radius
        if self.bounds is None:
            return (lower, upper) if self.norm == "linf" else None
        low, high = (of_entries("bounds", bound, origin) for bound in self.bounds)
        # an entry outside the bounds may stay where it is
        lowest = origin.clamp(max=low)
        highest = origin.clamp(min=high)
        if self.norm != "linf":
            return lowest, highest
        return torch.maximum(lower, lowest), torch.minimum(upper, highest)

    def _feasible(self, origin: Tensor, moved: Tensor, limits: Limits | None) -> Tensor:
        """Move `moved` back into the bounds and into the ball around `origin`.

        The order matters: a point that is projected first, and cut at the bounds then, lies deep
        inside the ball, and the attack is too weak. A projection keeps a point inside the bounds.
        """
        if limits is not None:
            moved = moved.clamp(*limits)
        if self.norm == "linf":
            return moved
        assert isinstance(self.epsilon, int | float)
        moved = origin + project(moved - origin, self.epsilon, self.norm)
        return moved if limits is None else moved.clamp(*limits)  # rounding of the sum
