"""Symmetric cross entropy, for labels of which some are wrong.

    loss_i = alpha * -log p_i[y_i] + beta * -A * (1 - p_i[y_i])

The second term is the reverse cross entropy - sum over c of p_i[c] log t_i[c], where t_i is 1 for
the label and 0 for other classes, and log 0 is the constant A.

Source: Wang, Ma, Chen, Luo, Yi, Bailey 2019, "Symmetric cross entropy for robust learning with
noisy labels", equations 5 to 7.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.tasks.losses.base import Loss, log_probability


@dataclass(frozen=True, kw_only=True)
class SymmetricCrossEntropy(Loss):
    """Cross entropy together with the reverse cross entropy, for noisy labels.

    Args:
        alpha: weight of the cross entropy, which learns fast.
        beta: weight of the reverse cross entropy, which wrong labels hurt little.
        log_zero: the number A that replaces log 0, below 0.
    """

    name: ClassVar[str] = "symmetric_cross_entropy"
    resists_wrong_labels: ClassVar[bool] = True

    alpha: float = 0.1
    beta: float = 1.0
    log_zero: float = -4.0

    def __post_init__(self) -> None:
        for field in ("alpha", "beta"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError.of(field, value, "a number from 0")
        if not (math.isfinite(self.log_zero) and self.log_zero < 0):
            raise ConfigError.of("log_zero", self.log_zero, "a number below 0")

    def losses(self, logits: Tensor, labels: Tensor, allowed: Tensor | None) -> Tensor:
        """Return (m,) weighted sum of both cross entropies."""
        log_p = log_probability(logits, labels)
        reverse = self.log_zero * torch.expm1(log_p)
        return self.beta * reverse - self.alpha * log_p
