"""Focal loss, for classes of which some are rare or easy.

    loss_i = (1 - p_i[y_i])^gamma * -log p_i[y_i]

Several labels per record have one such loss for each label, with p the probability of its target 0
or 1, and with the weight alpha of targets 1 (1 - alpha of targets 0).

Source: Lin, Goyal, Girshick, He, Dollar 2017, "Focal loss for dense object detection", equations 4
and 5; for several labels it is `torchvision.ops.sigmoid_focal_loss`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.errors import ConfigError
from perdure.tasks.losses.base import Loss, log_probability

SMALLEST = torch.finfo(torch.float32).tiny
"""Least base of a power with an exponent below 1, which has no derivative at 0."""


@dataclass(frozen=True, kw_only=True)
class Focal(Loss):
    """Cross entropy with less weight on records that are predicted well.

    Args:
        gamma: exponent, from 0; 0 is cross entropy.
        alpha: weight of present labels, above 0 and below 1, for records with any number of labels;
            None for no weights. For one class per record use `ClassWeights`.
    """

    name: ClassVar[str] = "focal"
    tasks: ClassVar[tuple[str, ...]] = ("single-label", "multi-label", "next-token")
    balances_classes: ClassVar[bool] = True

    gamma: float = 2.0
    alpha: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise ConfigError.of("gamma", self.gamma, "a number from 0")
        if self.alpha is not None and not 0 < self.alpha < 1:
            raise ConfigError.of("alpha", self.alpha, "None, or a number above 0 and below 1")

    def refuse_task(self, name: str) -> None:
        """Refuse a task that cannot use the loss, and `alpha` for one class per record."""
        super().refuse_task(name)
        if self.alpha is not None and name != "multi-label":
            allowed = f"None for {name} records; use the loss class_weights for weights of classes"
            raise ConfigError.of("alpha", self.alpha, allowed)

    def losses(self, logits: Tensor, labels: Tensor, allowed: Tensor | None) -> Tensor:
        """Return (m,) cross entropy times the weight of each row."""
        log_p = log_probability(logits, labels)
        return self._weight(log_p) * -log_p

    def label_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return (m, C) binary cross entropy times the weight of each label."""
        entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        each = self._weight(-entropy) * entropy
        if self.alpha is None:
            return each
        return each * (self.alpha * targets + (1 - self.alpha) * (1 - targets))

    def _weight(self, log_p: Tensor) -> Tensor:
        return (-torch.expm1(log_p)).clamp(min=SMALLEST).pow(self.gamma)
