"""Clipping rule of embeddings; gradients add up if a record contains a word several times."""

import torch
from torch import Tensor, nn

from perdure.privacy.clipping.norms import at_least, at_least_float32
from perdure.privacy.clipping.rules.base import (
    SUMMED_RECORDS,
    ClippingRule,
    LayerCall,
    ghost_norms,
    record_slices,
)
from perdure.types import Params


class EmbeddingRule(ClippingRule):
    """Clip `nn.Embedding`, from words (n, ...) to (n, ..., features)."""

    layers = (nn.Embedding,)

    def covers(self, layer: nn.Module) -> bool:
        """Return True if the layer has no `max_norm`, no `scale_grad_by_freq` and is not sparse.

        The first two would make the gradient of one record depend on other records.
        """
        assert isinstance(layer, nn.Embedding)
        return layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse

    def gradients(self, layer: nn.Module, calls: list[LayerCall]) -> "EmbeddingGhost":
        """Return the per-record gradients of an embedding over all calls of the layer."""
        assert isinstance(layer, nn.Embedding)
        return EmbeddingGhost(layer, calls)


class EmbeddingGhost:
    """Ghost norms of an embedding: |g|^2 is the sum of d_t . d_s over t, s with the same word."""

    def __init__(self, layer: nn.Embedding | nn.EmbeddingBag, calls: list[LayerCall]) -> None:
        self.shape = layer.weight.shape
        n = len(calls[0].back)
        width = layer.embedding_dim
        self.words = torch.cat([call.entered.reshape(n, -1) for call in calls], 1)
        back = torch.cat([at_least_float32(call.back).reshape(n, -1, width) for call in calls], 1)
        padding = layer.padding_idx
        self.back = back if padding is None else back * (self.words != padding)[:, :, None]

    def squared_norms(self) -> Tensor:
        """Compute the (n,) squared norms of the records' gradients."""
        n, positions = self.words.shape
        return ghost_norms(self._grams, n, positions**2, self.shape[1])

    def weighted(self, factors: Tensor) -> Params:
        """Sum the per-record gradients times factors (n,), by parameter name.

        The sum is in float64: a word of many records or positions is added one by one, and in
        float32 1,024 records that contain one word 512 times moved the sum by 1.2 % more than C.
        """
        total = self.back.new_zeros(self.shape, dtype=torch.float64)
        for piece in record_slices(len(self.back), self.back[0].numel()):
            back = self.back[piece].double() * factors[piece].double()[:, None, None]
            total.index_add_(0, self.words[piece].flatten(), back.flatten(0, 1))
        return {"weight": total if len(factors) > SUMMED_RECORDS else total.to(self.back.dtype)}

    def _grams(self, piece: slice | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        words = self.words[piece]
        back = at_least(self.back[piece], dtype)
        return (words[:, :, None] == words[:, None, :]).to(back.dtype), back @ back.mT
