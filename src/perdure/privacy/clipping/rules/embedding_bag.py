"""Clipping rule of embedding bags: each word of a record gets the gradient of its bag."""

import torch
from torch import nn

from perdure.privacy.clipping.rules.base import ClippingRule, LayerCall
from perdure.privacy.clipping.rules.embedding import EmbeddingGhost


class EmbeddingBagRule(ClippingRule):
    """Clip `nn.EmbeddingBag` with bags of equal length, from words (n, length) to (n, features)."""

    layers = (nn.EmbeddingBag,)

    def covers(self, layer: nn.Module) -> bool:
        """Return True if the layer sums or averages its words, and keeps records independent.

        With the mode `max`, each feature comes from another word, and no rule covers this.
        """
        assert isinstance(layer, nn.EmbeddingBag)
        plain = layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse
        return plain and layer.mode in ("sum", "mean") and not layer.include_last_offset

    def gradients(self, layer: nn.Module, calls: list[LayerCall]) -> EmbeddingGhost:
        """Return per-record gradients as those of an embedding.

        All words of a bag have the same gradient.
        """
        assert isinstance(layer, nn.EmbeddingBag)
        return EmbeddingGhost(layer, [_spread(layer, call) for call in calls])


def _spread(layer: nn.EmbeddingBag, call: LayerCall) -> LayerCall:
    """Return the embedding call that gives each word its gradient (n, length, features)."""
    words = call.entered
    counted = torch.ones_like(words, dtype=torch.bool)
    if layer.padding_idx is not None:
        counted = words != layer.padding_idx
    shares = counted.to(call.back.dtype)
    if layer.mode == "mean":
        shares = shares / shares.sum(1, keepdim=True).clamp(min=1.0)
    back = call.back[:, None, :] * shares[:, :, None]
    return LayerCall(words, back, back)
