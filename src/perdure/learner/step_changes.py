"""Changes of a step that read no record: penalties, noise, and gradients at moved parameters."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perdure.errors import ConfigError
from perdure.types import Params
from perdure.utils.checked_fields import CheckedFields
from perdure.utils.modules import untouched
from perdure.utils.seeding import generator_from

ANNEALING = 0.55
"""Exponent with which the variance of gradient noise falls."""


@dataclass(frozen=True, kw_only=True)
class SAM(CheckedFields):
    """Sharpness-aware minimisation: the gradient at the worst parameters nearby.

        gradient at  parameters + rho * g / |g|

    Without privacy g is the gradient of the same batch, so a step takes two passes. Under privacy g
    is the released gradient of the step before, as in DP-SAT: a step stays one release.

    Guarantee: under privacy the ascent uses an earlier release only, so it costs no privacy.

    Args:
        rho: distance (L2 norm over all trained parameters) of the worst parameters, above 0.

    Source: Foret et al., ICLR 2021; under privacy Park et al., ICML 2023 (DP-SAT).
    """

    rho: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.rho < math.inf:
            raise ConfigError.of("rho", self.rho, "a number above 0")


class MovedGradients:
    """Gradients at parameters that are moved for the time of their computation.

    Args:
        sharpness: move towards higher loss; None for none.
        weight_noise: standard deviation of the noise on the parameters.
    """

    def __init__(self, sharpness: SAM | None, weight_noise: float) -> None:
        self._sharpness = sharpness
        self._weight_noise = weight_noise
        self.last: Params = {}
        """Released gradient of the step before, by which the next step moves under privacy."""

    def gradient(
        self,
        ask: Callable[[], Params],
        params: Params,
        model: nn.Module,
        *,
        seed: int,
        private: bool,
    ) -> Params:
        """Return the gradient of a step.

        Args:
            ask: function that returns the gradient at the present parameters.
            params: trained parameters; they have their own values again at the end.
            model: model of the parameters.
            seed: seed of the noise on the parameters.
            private: True if `ask` is a release.
        """
        noise = normal_like(params, self._weight_noise, seed) if self._weight_noise else {}
        with moved(params, noise):
            if self._sharpness is None:
                return ask()
            # in the order of the parameters, which a checkpoint does not keep
            ascent = {name: self.last[name] for name in params if self.last} if private else ask()
            with moved(params, scaled(ascent, self._sharpness.rho)):
                if private:
                    found = ask()
                    self.last = {name: value.clone() for name, value in found.items()}
                    return found
                # running statistics count the pass at the parameters themselves only
                with untouched(model):
                    return ask()


@contextmanager
def moved(params: Params, by: Mapping[str, Tensor]) -> Iterator[None]:
    """Context manager that adds offsets to parameters; they get back the same bits at the end."""
    before = {name: params[name].detach().clone() for name in by}
    with torch.no_grad():
        for name, offset in by.items():
            params[name].add_(offset)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                params[name].copy_(value)


def scaled(gradient: Params, length: float) -> Params:
    """Return the gradient with the L2 norm `length`, over all names; zeros stay zeros."""
    if not gradient:
        return {}
    norms = torch._foreach_norm(list(gradient.values()))
    whole = torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]))
    factor = length / whole.clamp(min=torch.finfo(torch.float32).tiny)
    return {name: value * factor for name, value in gradient.items()}


def normal_like(params: Params, deviation: float, seed: int) -> Params:
    """Return normal noise in the shapes of the parameters, drawn on the CPU."""
    rng = generator_from(seed)
    return {
        name: (torch.randn(value.shape, generator=rng) * deviation).to(value)
        for name, value in params.items()
    }


@torch.no_grad()
def add_weight_penalties(gradient: Params, params: Params, *, l1: float, l2: float) -> None:
    """Add the (sub)gradient of  l1 * |w|_1 + l2 / 2 * |w|_2^2  to a gradient, in place."""
    into = [gradient[name] for name in params]
    values = [value.detach() for value in params.values()]
    if l2:
        torch._foreach_add_(into, values, alpha=l2)
    if l1:
        torch._foreach_add_(into, torch._foreach_sign(values), alpha=l1)


@torch.no_grad()
def with_gradient_noise(gradient: Params, scale: float, step: int, seed: int) -> Params:
    """Return the gradient with normal noise of the variance  scale / (1 + step)^0.55.

    Args:
        gradient: gradient of the step.
        scale: variance in the first step of an experience.
        step: number of the step in its experience.
        seed: seed of the noise.

    Source: Neelakantan et al. 2015, Adding gradient noise improves learning for very deep networks.
    """
    noise = normal_like(gradient, math.sqrt(scale / (1 + step) ** ANNEALING), seed)
    return {name: value + noise[name] for name, value in gradient.items()}
