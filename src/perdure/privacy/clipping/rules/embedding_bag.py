"""Bags of embeddings: every word of a record gets the same gradient, once for each time."""

import torch
from torch import nn

from perdure.privacy.clipping.rules.base import ClippingRule, LayerCall
from perdure.privacy.clipping.rules.embedding import EmbeddingGhost


class EmbeddingBagRule(ClippingRule):
    """`nn.EmbeddingBag` of bags of one length, from words (n, length) to (n, features)."""

    layers = (nn.EmbeddingBag,)

    def covers(self, layer: nn.Module) -> bool:
        """Return whether the layer sums or averages, and neither renormalises nor counts words.

        The largest entry of every feature comes from one word or another, which no rule follows.
        """
        assert isinstance(layer, nn.EmbeddingBag)
        plain = layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse
        return plain and layer.mode in ("sum", "mean") and not layer.include_last_offset

    def gradients(self, layer: nn.Module, calls: list[LayerCall]) -> EmbeddingGhost:
        """See `ClippingRule`; the bag is an embedding whose positions all get the same gradient."""
        assert isinstance(layer, nn.EmbeddingBag)
        return EmbeddingGhost(layer, [_spread(layer, call) for call in calls])


def _spread(layer: nn.EmbeddingBag, call: LayerCall) -> LayerCall:
    """Give every word of a bag the gradient (n, length, features) that reaches it."""
    words = call.entered
    counted = torch.ones_like(words, dtype=torch.bool)
    if layer.padding_idx is not None:
        counted = words != layer.padding_idx
    shares = counted.to(call.back.dtype)
    if layer.mode == "mean":
        shares = shares / shares.sum(1, keepdim=True).clamp(min=1.0)
    back = call.back[:, None, :] * shares[:, :, None]
    return LayerCall(words, back, back)
