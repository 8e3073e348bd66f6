"""Clipping rule of linear layers: the cheapest of three ways; calls are joined as positions."""

import torch
from torch import Tensor, nn

from perdure.privacy.clipping.norms import at_least, at_least_float32, squared_row_norms
from perdure.privacy.clipping.rules.base import (
    GHOST_COST,
    ClippingRule,
    FormedRows,
    LayerCall,
    RecordGradients,
    ghost_norms,
    joined,
    summed,
)
from perdure.types import Params


class LinearRule(ClippingRule):
    """Clip `nn.Linear`, from (n, ..., in) to (n, ..., out)."""

    layers = (nn.Linear,)

    def gradients(self, layer: nn.Module, calls: list[LayerCall]) -> RecordGradients:
        """Choose the cheapest way to the per-record gradients over all calls of a linear layer."""
        has_bias = layer.bias is not None
        if len(calls) == 1 and calls[0].back.dim() == 2:
            return LinearOuter(calls[0], has_bias)
        call = joined(calls)
        positions = call.back.shape[1]
        ins = call.entered.shape[2]
        outs = call.back.shape[2]
        ghost = GHOST_COST * positions * (ins + outs) < ins * outs
        return LinearGhost(call, has_bias) if ghost else LinearRows(call, has_bias)


class LinearOuter:
    """Gradients of a linear layer with one position: outer products d a^T, of norm |d| |a|."""

    def __init__(self, call: LayerCall, has_bias: bool) -> None:
        self.entered, self.back = call.flowed()
        self.has_bias = has_bias

    def squared_norms(self) -> Tensor:
        """Compute the (n,) squared norms of the records' gradients."""
        a, d = squared_row_norms(self.entered, self.back)
        return torch.addcmul(d, a, d) if self.has_bias else a * d

    def weighted(self, factors: Tensor) -> Params:
        """Sum the per-record gradients times factors (n,), by parameter name."""
        return summed(len(factors), 1, lambda piece: self._piece(piece, factors))

    def _piece(self, piece: slice, factors: Tensor) -> Params:
        """Compute the weighted sums over one slice of the records."""
        back = self.back[piece] * factors[piece].to(self.back.dtype)[:, None]
        sums = {"weight": back.mT @ self.entered[piece]}
        return sums | ({"bias": back.sum(0)} if self.has_bias else {})


class LinearRows(FormedRows):
    """Computed per-record gradients of a linear layer, for small layers or many positions."""

    def __init__(self, call: LayerCall, has_bias: bool) -> None:
        self.call = call
        self.has_bias = has_bias
        super().__init__(len(call.back), call.entered.shape[2] * call.back.shape[2])

    def formed(self, piece: slice) -> Params:
        """Compute the gradients of some records in weight and bias."""
        a, d = self.call.of(piece).flowed()
        return {"weight": d.mT @ a} | ({"bias": d.sum(1)} if self.has_bias else {})


class LinearGhost:
    """Ghost norms of a linear layer, without per-record gradients: few positions, large layer."""

    def __init__(self, call: LayerCall, has_bias: bool) -> None:
        self.call = call
        self.bias = at_least_float32(call.back).sum(1) if has_bias else None

    def squared_norms(self) -> Tensor:
        """Compute the (n,) squared norms of the records' gradients."""
        n, positions, outs = self.call.back.shape
        width = max(outs, self.call.entered.shape[2])
        norms = ghost_norms(self._grams, n, positions**2, width)
        return norms if self.bias is None else norms + squared_row_norms(self.bias)[0]

    def weighted(self, factors: Tensor) -> Params:
        """Sum the per-record gradients times factors (n,), by parameter name."""
        n, positions = self.call.back.shape[:2]
        return summed(n, positions, lambda piece: self._piece(piece, factors[piece]))

    def _piece(self, piece: slice, factors: Tensor) -> Params:
        """Compute the weighted sums over one slice of the records."""
        a, d = self.call.of(piece).flowed()
        factors = factors.to(d.dtype)
        sums = {"weight": (d * factors[:, None, None]).flatten(0, 1).mT @ a.flatten(0, 1)}
        return sums if self.bias is None else sums | {"bias": factors @ self.bias[piece]}

    def _grams(self, piece: slice | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return (m, T, T) inner products of the inputs, and of the gradients at the output."""
        a, d = (at_least(value, dtype) for value in self.call.of(piece).flowed())
        return a @ a.mT, d @ d.mT
