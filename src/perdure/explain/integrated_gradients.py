"""Integrated gradients, by captum (Sundararajan, Taly, Yan 2017)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.explain._gradients import GradientExplainer, Network, by_pieces
from perdure.explain.base import Question


@dataclass(frozen=True, kw_only=True)
class IntegratedGradients(GradientExplainer):
    """Integral of the gradient on the line from each background row to the instance.

        phi_j = mean_b (x_j - b_j) int_0^1 d f(b + t (x - b)) / d x_j  dt

    The integral is a Gauss-Legendre sum; the values add up to f(x) less the mean of f over the
    background, up to its error (`additivity_gap`).

    Guarantee: as for `KernelSHAP`.

    Args:
        steps: points of the sum; n instances need n * steps * b forward and backward rows for b
            background rows.
        chunk: largest number of rows in one pass, if the rows of one instance fit in; None for a
            size that suits the caches.

    Raises:
        ConfigError: if a value is not allowed.

    Source: Sundararajan, Taly, Yan 2017, "Axiomatic attribution for deep networks", section 3.
    """

    steps: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ConfigError.of("steps", self.steps, "1 or more points")

    def _values(self, captum: Any, asked: Question, network: Network, target: Tensor) -> Tensor:
        method = captum.IntegratedGradients(network)
        absent = asked.absent
        parts = []
        for piece in by_pieces(asked, self.steps):
            rows = asked.inputs[piece]
            total = torch.zeros_like(rows)
            for row in torch.split(absent, 1):
                total += method.attribute(rows, row, target=target[piece], n_steps=self.steps)
            parts.append(total / len(absent))
        return torch.cat(parts)
