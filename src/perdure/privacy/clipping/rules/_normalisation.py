"""Base class of the clipping rules of normalisation layers, which train a scale and a shift."""

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
    """Clip the gradients of scale and shift, with d the gradient at the output of the layer.

    The gradient of the scale is the sum over positions of d * normalised input; the gradient of the
    shift is the sum of d.
    """

    @abstractmethod
    def normalised(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return the input after normalisation, before scale and shift, in the shape of `x`."""

    @abstractmethod
    def positions(self, layer: nn.Module, dims: int) -> tuple[int, ...]:
        """Return the dimensions of an output that share a scale and a shift.

        `dims` is the number of dimensions of the output.
        """

    def gradients(self, layer: nn.Module, calls: list[LayerCall]) -> PrecomputedRows:
        """Compute the per-record gradients of scale and shift over all calls of the layer."""
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
        """Compute the per-record gradients of scale and shift for one call of the layer."""
        x, back = call.flowed()
        over = self.positions(layer, back.dim())
        product = back * self.normalised(layer, x)
        return (product.sum(over), back.sum(over)) if over else (product, back)
