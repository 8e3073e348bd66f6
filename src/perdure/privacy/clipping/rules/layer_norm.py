"""Layer normalisation."""

import torch.nn.functional as F
from torch import Tensor, nn

from perdure.privacy.clipping.rules._normalisation import NormalisationRule


class LayerNormRule(NormalisationRule):
    """`nn.LayerNorm` on (n, ..., *normalized_shape)."""

    layers = (nn.LayerNorm,)

    def normalised(self, layer: nn.Module, x: Tensor) -> Tensor:
        """See `NormalisationRule`."""
        assert isinstance(layer, nn.LayerNorm)
        return F.layer_norm(x, layer.normalized_shape, eps=layer.eps)

    def positions(self, layer: nn.Module, dims: int) -> tuple[int, ...]:
        """All dimensions between the records and the normalised ones."""
        assert isinstance(layer, nn.LayerNorm)
        return tuple(range(1, dims - len(layer.normalized_shape)))
