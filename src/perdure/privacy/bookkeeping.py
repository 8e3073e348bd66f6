"""Clipped sums of per-record gradients without forming them: one forward, one backward to layer outputs.

Bu, Wang, Zha and Karypis, Differentially Private Optimization on Large Model at Small Cost, ICML 2023 (book-keeping).
For a linear layer the gradient of record i is d_i a_i^T, with a_i what entered and d_i what came back to its output; so
its norm is |a_i| |d_i| and the clipped sum is one matrix product, D^T diag(c) A. Layers with a sequence or positions
(T of them) sum over T; small layers form their own rows, which are few.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight

from perdure.privacy.clipping import Clip, layer_of, sum_of
from perdure.records import Params

ROWS_AT_ONCE = 128
"""Records whose convolution gradients are formed at a time: they stay in the processor's cache."""

KEPT_NUMBERS = 2**24
"""Numbers (64 MiB) of one convolution's per-record gradients that are kept instead of computed again."""


@dataclass
class Use:
    """One call of a layer: what entered it, what left it, and the loss's gradient there."""

    entered: Tensor
    left: Tensor
    back: Tensor = field(default_factory=lambda: torch.empty(0))


def clipped_gradient_sum(
    module: nn.Module, params: Params, losses: Callable[[], Tensor], records: int, clip: Clip
) -> Params | None:
    """Sum over records of clip(gradient of the record's loss, C); None without a rule or where a norm is not finite.

    Guarantee: adding or removing one record changes the result by at most `clip.norm` in L2 norm, provided that row i
    of `losses()` depends on record i only and every differentiable pass of the module covers all rows in row order.

    Args:
        module: the model, at its own parameters. params: those to differentiate.
        losses: runs the module and returns (n,) losses. records: n.
        clip: the bound C.
    """
    layers = ruled_layers(module, params)
    if layers is None or records == 0:
        return None
    with _taped(layers) as tape:
        total = losses().sum()
    uses = [(name, use) for name, calls in tape.items() for use in calls]
    if any(len(use.left) != records for _, use in uses):
        return None
    backs = torch.autograd.grad(total, [use.left for _, use in uses], allow_unused=True, materialize_grads=True)
    for (_, use), back in zip(uses, backs, strict=True):
        use.back = back
    with torch.no_grad():
        return _clipped(layers, tape, params, records, clip)


def _clipped(
    layers: Mapping[str, nn.Module], tape: Mapping[str, list[Use]], params: Params, records: int, clip: Clip
) -> Params | None:
    rules = {name: RULES[type(layer)](layer, tape[name]) for name, layer in layers.items() if tape[name]}
    squares = {name: torch.zeros(records, device=next(iter(params.values())).device) for name in layers}
    squares |= {name: rule.squared_norms() for name, rule in rules.items()}
    if not bool(torch.isfinite(sum_of(list(squares.values()))).all()):
        return None  # a factor of 0 would not silence a row of NaN in a matrix product
    factors = clip.factors(squares)
    sums = {f"{n}.{own}": value for n, rule in rules.items() for own, value in rule.weighted(factors[n]).items()}
    return {name: sums.get(name, torch.zeros_like(value)) for name, value in params.items()} | clip.count(squares)


def ruled_layers(module: nn.Module, params: Params) -> dict[str, nn.Module] | None:
    """Layers that own the parameters, by name; None where one has no rule, is shared or is only partly trained."""
    owners = {layer_of(name) for name in params}
    layers = {name: layer for name, layer in module.named_modules(remove_duplicate=False) if name in owners}
    owned = {f"{n}.{own}" for n, layer in layers.items() for own, _ in layer.named_parameters(recurse=False)}
    shared = len(list(module.parameters())) != len(list(module.named_parameters(remove_duplicate=False)))
    ruled = all(type(layer) in RULES and _covered(layer) for layer in layers.values())
    return layers if ruled and not shared and owned == set(params) else None


def _covered(layer: nn.Module) -> bool:
    """Whether the settings of a ruled layer are covered too."""
    if isinstance(layer, nn.Embedding):
        return layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse
    return not isinstance(layer, nn.Conv1d | nn.Conv2d) or (
        layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    )


@contextmanager
def _taped(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Use]]]:
    """Record every differentiable call of the layers; a teacher, which runs without gradients, is not recorded."""
    tape: dict[str, list[Use]] = {name: [] for name in layers}

    def listen(calls: list[Use]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, entered: tuple[Tensor, ...], left: Tensor) -> None:
            if left.requires_grad:
                calls.append(Use(entered[0].detach(), left))

        return hook

    handles = [layer.register_forward_hook(listen(tape[name])) for name, layer in layers.items()]
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


# --------------------------------------------------------------------------- rules, one a kind of layer


class Rule(Protocol):
    """Norms and weighted sums of the per-record gradients of one layer, over all its uses."""

    def squared_norms(self) -> Tensor:
        """(n,) squared L2 norm of each record's gradient in this layer, in float32."""

    def weighted(self, factors: Tensor) -> Params:
        """Sum over records of factor times gradient, by the layer's own parameter names."""


class LinearRule:
    """Outer products: |d a^T|^2 = |d|^2 |a|^2 for one use without positions, else sums over positions and uses."""

    def __init__(self, layer: nn.Module, uses: list[Use]) -> None:
        self.has_bias = layer.bias is not None
        self.entered = joined([_positions(use.entered) for use in uses])
        self.back = joined([_positions(use.back) for use in uses])

    def squared_norms(self) -> Tensor:
        """See `Rule`."""
        a, d = self.entered.float(), self.back.float()
        bias = d.sum(1).square().sum(1) if self.has_bias else 0.0
        if a.shape[1] == 1:
            norms: Tensor = torch.linalg.vector_norm(a, dim=(1, 2)) * torch.linalg.vector_norm(d, dim=(1, 2))
            return norms.square() + bias
        positions, entries = a.shape[1] ** 2, a.shape[2] * d.shape[2]
        if positions <= entries:
            return ((a @ a.mT) * (d @ d.mT)).sum((1, 2)) + bias
        return torch.cat([_outer(*piece).square().sum((1, 2)) for piece in _pieces(a, d)]) + bias

    def weighted(self, factors: Tensor) -> Params:
        """See `Rule`."""
        back = self.back * factors.to(self.back.dtype)[:, None, None]
        sums = {"weight": back.flatten(0, 1).mT @ self.entered.flatten(0, 1)}
        return sums | ({"bias": back.sum((0, 1))} if self.has_bias else {})


class ConvRule:
    """Positions are the places of the kernel; a row is (channels out, places) (places, channels in x kernel)."""

    def __init__(self, layer: nn.Module, uses: list[Use]) -> None:
        assert isinstance(layer, nn.Conv1d | nn.Conv2d)
        self.layer, self.uses, self.has_bias = layer, uses, layer.bias is not None
        self.kept: list[tuple[Tensor, Tensor]] = []

    def squared_norms(self) -> Tensor:
        """See `Rule`; the rows are kept for `weighted` where they are few."""
        n = len(self.uses[0].left)
        keep = n * self.layer.weight.numel() <= KEPT_NUMBERS
        squared = []
        for start in range(0, n, ROWS_AT_ONCE):
            weight, bias = self._rows(slice(start, start + ROWS_AT_ONCE))
            squared.append(weight.square().sum((1, 2)) + (bias.square().sum(1) if self.has_bias else 0.0))
            self.kept += [(weight, bias)] if keep else []
        return torch.cat(squared)

    def weighted(self, factors: Tensor) -> Params:
        """See `Rule`."""
        weight, bias = self._of_kept(factors) if self.kept else self._once_more(factors)
        dtype = self.layer.weight.dtype
        return {"weight": weight.to(dtype)} | ({"bias": bias.to(dtype)} if self.has_bias else {})

    def _rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(n, out, in x kernel) and (n, out): gradients of some records, summed over the layer's uses."""
        parts = [self._gradients(use, rows) for use in self.uses]
        return sum_of([weight for weight, _ in parts]), sum_of([bias for _, bias in parts])

    def _gradients(self, use: Use, rows: slice) -> tuple[Tensor, Tensor]:
        back = use.back[rows].float().flatten(2)
        return back @ self._patches(use.entered[rows].float()).mT, back.sum(2)

    def _of_kept(self, factors: Tensor) -> tuple[Tensor, Tensor]:
        pieces = list(zip(factors.split(ROWS_AT_ONCE), self.kept, strict=True))  # type: ignore[no-untyped-call]
        weight = sum_of([torch.tensordot(f, weight, dims=1) for f, (weight, _) in pieces])
        return weight.view_as(self.layer.weight), sum_of([f @ bias for f, (_, bias) in pieces])

    def _once_more(self, factors: Tensor) -> tuple[Tensor, Tensor]:
        """The same sums by an ordinary backward pass of the scaled gradients."""
        shape = factors.shape + (1,) * (self.uses[0].back.dim() - 1)
        scaled = [use.back * factors.to(use.back.dtype).view(shape) for use in self.uses]
        over = (0, *range(2, scaled[0].dim()))
        weights = [self._weight_gradient(use.entered, back) for use, back in zip(self.uses, scaled, strict=True)]
        return sum_of(weights), sum_of([back.sum(over) for back in scaled])

    def _patches(self, x: Tensor) -> Tensor:
        """(n, channels in x kernel, places)."""
        layer = self.layer
        if isinstance(layer, nn.Conv2d):
            return F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
        (kernel,), (dilation,), (stride,) = layer.kernel_size, layer.dilation, layer.stride
        return F.unfold(x.unsqueeze(2), (1, kernel), (1, dilation), (0, int(layer.padding[0])), (1, stride))

    def _weight_gradient(self, entered: Tensor, back: Tensor) -> Tensor:
        layer = self.layer
        gradient = conv2d_weight if isinstance(layer, nn.Conv2d) else conv1d_weight
        answer: Tensor = gradient(  # type: ignore[no-untyped-call]
            entered, layer.weight.shape, back, layer.stride, layer.padding, layer.dilation
        )
        return answer


class RowsRule:
    """Layers whose per-record gradients are small enough to form: scale and shift of a normalisation."""

    def __init__(self, layer: nn.Module, uses: list[Use]) -> None:
        parts = [_scale_and_shift(layer, use) for use in uses]
        self.rows = {"weight": sum_of([scale for scale, _ in parts])}
        if "bias" in dict(layer.named_parameters()):
            self.rows["bias"] = sum_of([shift for _, shift in parts])

    def squared_norms(self) -> Tensor:
        """See `Rule`."""
        return sum_of([row.float().flatten(1).square().sum(1) for row in self.rows.values()])

    def weighted(self, factors: Tensor) -> Params:
        """See `Rule`."""
        return {n: torch.tensordot(factors.to(row.dtype), row, dims=1) for n, row in self.rows.items()}


class EmbeddingRule:
    """A record's gradient adds up where it uses a word more than once: |g|^2 = sum over equal words of d_t . d_s."""

    def __init__(self, layer: nn.Module, uses: list[Use]) -> None:
        assert isinstance(layer, nn.Embedding)
        self.layer = layer
        self.words = torch.cat([use.entered.flatten(1) for use in uses], 1)
        back = torch.cat([use.back.flatten(1, -2) if use.back.dim() > 2 else use.back[:, None] for use in uses], 1)
        if layer.padding_idx is not None:
            back = back * (self.words != layer.padding_idx)[:, :, None]
        self.back = back

    def squared_norms(self) -> Tensor:
        """See `Rule`."""
        same = (self.words[:, :, None] == self.words[:, None, :]).float()
        return (same * (self.back.float() @ self.back.float().mT)).sum((1, 2))

    def weighted(self, factors: Tensor) -> Params:
        """See `Rule`."""
        back = (self.back * factors.to(self.back.dtype)[:, None, None]).flatten(0, 1)
        return {"weight": torch.zeros_like(self.layer.weight).index_add(0, self.words.flatten(), back)}


RULES: Mapping[type[nn.Module], Callable[[nn.Module, list[Use]], Rule]] = {
    nn.Linear: LinearRule, nn.Conv1d: ConvRule, nn.Conv2d: ConvRule, nn.Embedding: EmbeddingRule,
    nn.LayerNorm: RowsRule, nn.GroupNorm: RowsRule,
}  # fmt: skip


def joined(parts: list[Tensor]) -> Tensor:
    """The uses' positions (n, positions, k) side by side."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _positions(x: Tensor) -> Tensor:
    """(n, ..., k) as (n, positions, k)."""
    return x.flatten(1, -2) if x.dim() > 2 else x[:, None]


def _outer(a: Tensor, d: Tensor) -> Tensor:
    """(n, out, in): each record's gradient of a linear layer, summed over positions."""
    return d.mT @ a


def _pieces(a: Tensor, d: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(a), ROWS_AT_ONCE):
        yield a[start : start + ROWS_AT_ONCE], d[start : start + ROWS_AT_ONCE]


def _scale_and_shift(layer: nn.Module, use: Use) -> tuple[Tensor, Tensor]:
    """(n, ...) gradients of scale and shift of one record: sums over positions of d * normalised and of d."""
    if isinstance(layer, nn.GroupNorm):
        normal = F.group_norm(use.entered, layer.num_groups, eps=layer.eps)
        over = tuple(range(2, use.back.dim()))
    else:
        assert isinstance(layer, nn.LayerNorm)
        normal = F.layer_norm(use.entered, layer.normalized_shape, eps=layer.eps)
        over = tuple(range(1, use.back.dim() - len(layer.normalized_shape)))
    product = use.back * normal
    return (product.sum(over), use.back.sum(over)) if over else (product, use.back)
