"""Generalised cross entropy, for labels of which some are wrong.

    loss_i = (1 - p_i[y_i]^q) / q

It is cross entropy for q near 0, and the mean absolute error, which wrong labels hurt least, for
q = 1.

Source: Zhang and Sabuncu 2018, "Generalized cross entropy loss for training deep neural networks
with noisy labels", equation 6.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.tasks.losses.base import Loss, log_probability


@dataclass(frozen=True, kw_only=True)
class GeneralisedCrossEntropy(Loss):
    """Loss between cross entropy and mean absolute error, for noisy labels.

    Args:
        q: above 0 and at most 1; larger values resist more wrong labels, and learn more slowly.
    """

    name: ClassVar[str] = "generalised_cross_entropy"
    resists_wrong_labels: ClassVar[bool] = True

    q: float = 0.7

    def __post_init__(self) -> None:
        if not 0 < self.q <= 1:
            raise ConfigError.of("q", self.q, "a number above 0 and at most 1")

    def losses(self, logits: Tensor, labels: Tensor, allowed: Tensor | None) -> Tensor:
        """Return (m,) losses, each at most 1 / q."""
        # p^q by exp and log_softmax: the power of a probability of 0 has no finite derivative
        return -torch.expm1(self.q * log_probability(logits, labels)) / self.q
