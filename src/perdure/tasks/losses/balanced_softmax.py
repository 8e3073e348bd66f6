"""Balanced softmax: outputs are shifted by the frequencies of classes, for imbalanced data.

    loss_i = -log softmax(outputs_i + tau * log counts)[y_i]

The model learns the outputs of balanced data, so predictions need no correction.

Source: Ren, Yu, Sheng, Ma, Zhao, Yi, Li 2020, "Balanced meta-softmax for long-tailed visual
recognition", equation 4 (tau = 1); logit adjustment of Menon, Jayasumana, Rawat, Jain, Veit, Kumar
2021, "Long-tail learning via logit adjustment", equation 10.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch.nn.functional as F
from torch import Tensor

from perdure.errors import ConfigError
from perdure.tasks.losses.base import Loss, PerClass, check_per_class, declared, refuse_per_class


@dataclass(frozen=True, kw_only=True)
class BalancedSoftmax(Loss):
    """Cross entropy of outputs that are shifted by the log of the class counts.

    Guarantee: counts are declared, or released by a query that was charged; the loss never counts
    private labels.

    Args:
        counts: declared number (or share) of records of each class, above 0. "balanced" counts the
            labels of this and all earlier experiences, and is refused under privacy.
        tau: strength of the shift, from 0; 0 is cross entropy.
    """

    name: ClassVar[str] = "balanced_softmax"
    balances_classes: ClassVar[bool] = True

    counts: PerClass = "balanced"
    tau: float = 1.0

    def __post_init__(self) -> None:
        check_per_class("counts", self.counts)
        if not (math.isfinite(self.tau) and self.tau >= 0):
            raise ConfigError.of("tau", self.tau, "a number from 0")

    def losses(self, logits: Tensor, labels: Tensor, allowed: Tensor | None) -> Tensor:
        """Return (m,) cross entropy of the shifted logits."""
        shift = self.tau * declared(self.counts, "counts", logits).log()
        return F.cross_entropy(logits + shift, labels, reduction="none")

    def refuse_classes(self, num_classes: int) -> None:
        """Refuse counts that are not one for each class."""
        refuse_per_class("counts", self.counts, num_classes)

    @property
    def counts_labels(self) -> bool:
        """True for counts = "balanced"."""
        return self.counts == "balanced"

    def with_counts(self, counts: Sequence[float]) -> Self:
        """Return the loss with these counts; a class without records counts as one."""
        return replace(self, counts=tuple(max(1.0, float(count)) for count in counts))
