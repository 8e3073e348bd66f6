"""Gradient SHAP (expected gradients), by captum (Erion et al. 2021)."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.explain._gradients import GradientExplainer, Network
from perdure.explain.base import Question


@dataclass(frozen=True, kw_only=True)
class GradientSHAP(GradientExplainer):
    """Mean of the gradient at random points between random background rows and the instance.

        phi_j = mean over draws of (x_j - b_j) d f(b + t (x - b)) / d x_j,
                b from the background, t uniform in [0, 1]

    The values estimate Shapley values for models that are nearly linear between background and
    instance. All instances and outputs use the same draws.

    Guarantee: as for `KernelSHAP`.

    Args:
        samples: draws per instance.
        noise: standard deviation of Gaussian noise on the instance in each draw, in units of the
            inputs.
        chunk: largest number of rows in one pass; None for a size that suits the caches.

    Raises:
        ConfigError: if a value is not allowed.

    Source: Erion et al. 2021, "Improving performance of deep learning models with axiomatic
    attribution priors and expected gradients"; Lundberg and Lee 2017.
    """

    samples: int = 200
    noise: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise ConfigError.of("samples", self.samples, "1 or more draws")
        if not 0 <= self.noise < math.inf:
            raise ConfigError.of("noise", self.noise, "0, or a positive number")

    def _values(self, captum: Any, asked: Question, network: Network, target: Tensor) -> Tensor:
        method = captum.GradientShap(network)
        torch_draws = torch.get_rng_state()
        numpy_draws = np.random.get_state()
        parts = []
        for row, goal in zip(torch.split(asked.inputs, 1), torch.split(target, 1), strict=True):
            torch.set_rng_state(torch_draws)
            np.random.set_state(numpy_draws)
            parts.append(
                method.attribute(
                    row,
                    asked.absent,
                    target=goal,
                    n_samples=self.samples,
                    stdevs=self.noise,
                )
            )
        return torch.cat(parts)
