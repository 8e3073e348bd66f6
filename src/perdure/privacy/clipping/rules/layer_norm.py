"""Clipping rule of layer normalisation."""

import torch.nn.functional as F
from torch import Tensor, nn

from perdure.privacy.clipping.rules._normalisation import NormalisationRule


class LayerNormRule(NormalisationRule):
    """Clip the scale and shift of `nn.LayerNorm` on inputs (n, ..., *normalized_shape)."""

    layers = (nn.LayerNorm,)

    def normalised(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return the layer-normalised input, before scale and shift, in the shape of `x`."""
        assert isinstance(layer, nn.LayerNorm)
        return F.layer_norm(x, layer.normalized_shape, eps=layer.eps)

    def positions(self, layer: nn.Module, dims: int) -> tuple[int, ...]:
        """Return all dimensions between the records and the normalised dimensions."""
        assert isinstance(layer, nn.LayerNorm)
        return tuple(range(1, dims - len(layer.normalized_shape)))
