"""Clipping rule of cosine heads, whose logits are s <a, w_c> with a and w_c of norm 1."""

from torch import nn

from perdure.models.cosine_head import CosineHead, directions, reciprocal_lengths
from perdure.privacy.clipping.rules.base import ClippingRule, FormedRows, LayerCall, joined
from perdure.types import Params


class CosineHeadRule(ClippingRule):
    """Clip `perdure.models.cosine_head.CosineHead`, from (n, ..., in) to (n, ..., out)."""

    layers = (CosineHead,)
    parameters = frozenset({"weight", "scale"})

    def gradients(self, layer: nn.Module, calls: list[LayerCall]) -> "CosineRows":
        """Return the per-record gradients of a cosine head over all calls of the layer."""
        assert isinstance(layer, CosineHead)
        return CosineRows(layer, calls)


class CosineRows(FormedRows):
    """Per-record gradients of a cosine head.

    With d the gradient at the output, the gradient of the unscaled w_c is s d_c (a - <a, w_c> w_c)
    divided by the length of w_c, and the gradient of s is sum_c d_c <a, w_c>. Both are summed over
    positions and calls.
    """

    def __init__(self, layer: CosineHead, calls: list[LayerCall]) -> None:
        self.call = joined(calls)
        self.layer = layer
        super().__init__(len(self.call.back), layer.weight.numel())

    def formed(self, piece: slice) -> Params:
        """Compute the gradients of some records, by parameter name."""
        entered, back = self.call.of(piece).flowed()
        a = directions(entered)
        w = directions(self.layer.weight)
        weighted_cosines = back * (a @ w.mT)
        rows = back.mT @ a - weighted_cosines.sum(1)[:, :, None] * w
        return {
            "weight": self.layer.scale * reciprocal_lengths(self.layer.weight) * rows,
            "scale": weighted_cosines.sum((1, 2))[:, None],
        }
