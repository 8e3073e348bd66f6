"""Clipping rule of group normalisation."""

import torch.nn.functional as F
from torch import Tensor, nn

from perdure.privacy.clipping.rules._normalisation import NormalisationRule


class GroupNormRule(NormalisationRule):
    """Clip the scale and shift of `nn.GroupNorm` on inputs (n, channels, ...)."""

    layers = (nn.GroupNorm,)

    def normalised(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return the group-normalised input, before scale and shift, in the shape of `x`."""
        assert isinstance(layer, nn.GroupNorm)
        return F.group_norm(x, layer.num_groups, eps=layer.eps)

    def positions(self, layer: nn.Module, dims: int) -> tuple[int, ...]:
        """Return all dimensions after the channels, which share a scale and a shift."""
        return tuple(range(2, dims))
