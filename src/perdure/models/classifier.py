"""Base class of the models: a body for features, and a head over all classes."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from perdure.errors import ConfigError
from perdure.models.cosine_head import CosineHead

Head = Literal["linear", "cosine"]
HEADS: dict[Head, Callable[[int, int], nn.Linear | CosineHead]] = {
    "linear": nn.Linear,
    "cosine": CosineHead,
}


class Classifier(nn.Module):
    """Classifier with a body for features and a head over all classes: head(features(x)).

    Args:
        body: module from inputs (n, ...) to features (n, feature_size).
        feature_size: length of one feature vector.
        num_classes: full width of the head, public and fixed in advance.
        head: `linear` or `cosine` (see `perdure.models.cosine_head.CosineHead`).

    Raises:
        ConfigError: if the head is not known.
    """

    def __init__(
        self, body: nn.Module, feature_size: int, num_classes: int, head: Head = "linear"
    ) -> None:
        super().__init__()
        self.body = body
        self.feature_size = feature_size
        self.num_classes = num_classes
        if head not in HEADS:
            raise ConfigError.of("head", head, HEADS)
        self.head = HEADS[head](feature_size, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Feature vectors (n, feature_size) of inputs (n, ...): all but the head."""
        features: Tensor = self.body(x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, num_classes) of inputs (n, ...)."""
        logits: Tensor = self.head(self.features(x))
        return logits
