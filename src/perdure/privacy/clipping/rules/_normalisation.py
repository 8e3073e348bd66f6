"""Scale and shift of normalisations, which are few numbers per record."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from perdure.privacy.clipping.rules.base import (
    ClippingRule,
    LayerCall,
    PrecomputedRows,
    record_slices,
    sum_of,
    with_others,
)
from perdure.types import Params


class NormalisationRule(ClippingRule):
    """Rows are the sums over positions of d * normalised (scale) and of d (shift)."""

    @abstractmethod
    def normalised(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Input before scale and shift."""

    @abstractmethod
    def positions(self, layer: nn.Module, dims: int) -> tuple[int, ...]:
        """Dimensions of an output of `dims` dimensions that share a scale and a shift."""

    def gradients(self, layer: nn.Module, calls: list[LayerCall]) -> PrecomputedRows:
        """See `ClippingRule`."""
        names = [name for name, _ in layer.named_parameters()]
        numbers = sum(call.back[0].numel() for call in calls)
        formed: list[Params] = []
        n = len(calls[0].back)
        for piece in record_slices(n, numbers):
            wide, others = with_others(piece, n)
            parts = [self._scale_and_shift(layer, call.of(wide)) for call in calls]
            scale, shift = map(sum_of, zip(*parts, strict=True))
            rows = {"weight": scale[others:], "bias": shift[others:]}
            formed.append({name: rows[name] for name in names})
        return PrecomputedRows({name: torch.cat([rows[name] for rows in formed]) for name in names})

    def _scale_and_shift(self, layer: nn.Module, call: LayerCall) -> tuple[Tensor, Tensor]:
        """Rows of one call."""
        x, back = call.flowed()
        over = self.positions(layer, back.dim())
        product = back * self.normalised(layer, x)
        return (product.sum(over), back.sum(over)) if over else (product, back)
