"""Cross entropy with a declared weight for each class, for imbalanced data.

    loss_i = w[y_i] / divisor * -log p_i[y_i]

Several labels per record have the weight w[c] for the loss of label c. The divisor is a declared
constant. The weighted mean of PyTorch divides by the weights of the batch instead, so that one
record changes the losses of all others; it has no bounded sensitivity.

Source: King and Zeng 2001, "Logistic regression in rare events data" (weights by class);
"balanced" is N / (K n_c) of scikit-learn's `compute_class_weight`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch.nn.functional as F
from torch import Tensor

from perdure.errors import ConfigError
from perdure.tasks.losses.base import (
    Loss,
    PerClass,
    check_per_class,
    declared,
    log_probability,
    refuse_per_class,
)


@dataclass(frozen=True, kw_only=True)
class ClassWeights(Loss):
    """Cross entropy of each record, times the declared weight of its class.

    Guarantee: weights are declared, or computed from released counts; the loss never counts private
    labels. Under privacy each record is clipped after the weight, so a weight above 1 has no effect
    on a record whose gradient exceeds the clip norm already.

    Args:
        weights: declared weight of each class, above 0. "balanced" counts the labels of this and
            all earlier experiences, and is refused under privacy.
        divisor: declared constant by which the weighted losses are divided.
    """

    name: ClassVar[str] = "class_weights"
    tasks: ClassVar[tuple[str, ...]] = ("single-label", "multi-label", "next-token")
    balances_classes: ClassVar[bool] = True

    weights: PerClass = "balanced"
    divisor: float = 1.0

    def __post_init__(self) -> None:
        check_per_class("weights", self.weights)
        if not (math.isfinite(self.divisor) and self.divisor > 0):
            raise ConfigError.of("divisor", self.divisor, "a number above 0")

    def losses(self, logits: Tensor, labels: Tensor, allowed: Tensor | None) -> Tensor:
        """Return (m,) cross entropy times the weight of each row's class."""
        weights = declared(self.weights, "weights", logits)
        return -weights.gather(0, labels) * log_probability(logits, labels) / self.divisor

    def label_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return (m, C) binary cross entropy times the weight of each label."""
        each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return each * declared(self.weights, "weights", logits) / self.divisor

    def refuse_classes(self, num_classes: int) -> None:
        """Refuse weights that are not one for each class."""
        refuse_per_class("weights", self.weights, num_classes)

    @property
    def counts_labels(self) -> bool:
        """True for weights = "balanced"."""
        return self.weights == "balanced"

    def with_counts(self, counts: Sequence[float]) -> Self:
        """Return the loss with the weight N / (K n_c) of each of the K classes that have records.

        Classes without records have the weight 1.
        """
        found = [float(count) for count in counts if count > 0]
        mean = sum(found) / max(1, len(found))
        return replace(self, weights=tuple(mean / count if count > 0 else 1.0 for count in counts))
