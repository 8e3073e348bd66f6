"""Group normalisation."""

import torch.nn.functional as F
from torch import Tensor, nn

from perdure.privacy.clipping.rules._normalisation import NormalisationRule


class GroupNormRule(NormalisationRule):
    """`nn.GroupNorm` on (n, channels, ...)."""

    layers = (nn.GroupNorm,)

    def normalised(self, layer: nn.Module, x: Tensor) -> Tensor:
        """See `NormalisationRule`."""
        assert isinstance(layer, nn.GroupNorm)
        return F.group_norm(x, layer.num_groups, eps=layer.eps)

    def positions(self, layer: nn.Module, dims: int) -> tuple[int, ...]:
        """All dimensions behind the channels."""
        return tuple(range(2, dims))
