"""Cross entropy with label smoothing.

    loss_i = (1 - s) * -log p_i[y_i] + s / K * sum over the K allowed classes c of -log p_i[c]

p = softmax of the outputs over the allowed classes. For several labels per record, targets 0 and 1
become s / 2 and 1 - s / 2.

Source: Szegedy, Vanhoucke, Ioffe, Shlens, Wojna 2016, "Rethinking the Inception architecture for
computer vision", section 7; with all classes allowed it is `label_smoothing` of
`torch.nn.functional.cross_entropy`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.errors import ConfigError
from perdure.tasks.losses.base import Loss


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Loss):
    """Cross entropy with label smoothing over the allowed classes.

    Args:
        label_smoothing: share of a target that is spread over the classes; 0 for none.
    """

    name: ClassVar[str] = "cross_entropy"
    tasks: ClassVar[tuple[str, ...]] = ("single-label", "multi-label", "next-token")

    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            allowed = "a number from 0 to below 1"
            raise ConfigError.of("label_smoothing", self.label_smoothing, allowed)

    def losses(self, logits: Tensor, labels: Tensor, allowed: Tensor | None) -> Tensor:
        """Return (m,) cross entropy with the smoothed targets."""
        log_p = torch.log_softmax(logits, dim=1)
        own = -log_p.gather(1, labels[:, None]).squeeze(1)
        if allowed is None:
            spread = -log_p.mean(1)
        else:
            spread = -torch.where(allowed, log_p, 0.0).sum(1) / allowed.sum(-1)
        return (1 - self.label_smoothing) * own + self.label_smoothing * spread

    def label_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return (m, C) binary cross entropy with the smoothed targets."""
        smoothed = targets * (1 - self.label_smoothing) + self.label_smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, smoothed, reduction="none")
