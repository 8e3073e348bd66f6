"""Clipped sums of per-record gradients by book-keeping.

One forward pass and one backward pass to the outputs of the layers are enough.

Bu, Wang, Zha and Karypis, Differentially Private Optimization on Large Model at Small Cost, ICML
2023 (book-keeping). The norms come from what entered each layer and what came back to its output
(`layer_rules`), and so do the clipped sums; the gradient of a weight is never formed for the batch
as a whole.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from perdure.models.cosine_head import CosineHead
from perdure.privacy.clipping.clip import Clip, layer_of, sum_of
from perdure.privacy.clipping.convolution_rules import conv_rule
from perdure.privacy.clipping.layer_rules import (
    CosineRows,
    EmbeddingRule,
    LayerCall,
    Rule,
    linear_rule,
    normalisation_rule,
)
from perdure.types import Params

Layers = Mapping[str, nn.Module]

RULES: Mapping[type[nn.Module], Callable[[nn.Module, list[LayerCall]], Rule]] = {
    nn.Linear: linear_rule,
    nn.Conv1d: conv_rule,
    nn.Conv2d: conv_rule,
    nn.Embedding: EmbeddingRule,
    nn.LayerNorm: normalisation_rule,
    nn.GroupNorm: normalisation_rule,
    CosineHead: CosineRows,
}
OWN = {"weight", "bias", "scale"}
"""Parameters that rules know of, by their names in a layer."""
LinearRule = linear_rule


@dataclass(frozen=True, eq=False)
class Call:
    """One differentiable call of a layer, as taped; what left it is kept as its place in the graph.

    Args:
        layer: its name.
        entered: the input, detached.
        version: how often that tensor had been written to by then.
        edge: the output's gradient.
        before: where the graph goes on below the layer; None at its end.
        shape: of the output.
        derived: whether its weights were computed from others, whose gradients no rule gives.
    """

    layer: str
    entered: Tensor
    version: int
    edge: GradientEdge
    before: Node | None
    shape: torch.Size
    derived: bool


def clipped_gradient_sum(
    module: nn.Module, params: Params, losses: Callable[[], Tensor], records: int, clip: Clip
) -> Params | None:
    """Sum over records of clip(gradient of the record's loss, C).

    By rules where there are any and else by Opacus.

    That is: for a parameter without a rule, shared, or used outside its layer's own call (as in a
    layer that runs with weights computed from the parameters); for a pass that does not
    cover all records; and where a norm is not finite. `clipping.clipped_sum` does without such
    conditions.

    Guarantee: adding or removing one record changes the result by at most `clip.norm` in L2 norm,
    provided that row i of `losses()` depends on record i only and every differentiable pass of the
    module covers all rows in row order. Under autocast or in half precision, norms, factors and
    sums are those of the numbers that flowed, in float32.

    Args:
        module: the model, at its own parameters.
        params: those to differentiate.
        losses: runs the module and returns (n,) losses.
        records: n.
        clip: the bound C.

    Returns:
        The sums, in the parameters' dtypes, but float32 for half precision: rounded before the
        noise, a sum of many records would move by more than C.
    """
    layers = ruled_layers(module, params)
    if layers is None or records == 0:
        return None
    with _taped(layers) as tape:
        total = losses().sum()
    if not all(_covers(layers[call.layer], call, records) for call in tape) or _escapes(
        total, tape, params
    ):
        return None
    uses = _went_back(total, tape)
    del tape
    device = total.device.type
    mixed = torch.is_autocast_enabled(device)
    with torch.no_grad(), torch.autocast(device, enabled=False) if mixed else nullcontext():
        rules = {
            name: RULES[type(layers[name])](layers[name], uses.pop(name)) for name in list(uses)
        }
        unruled = {
            name: torch.zeros(records, device=total.device) for name in layers if name not in rules
        }
        return _clipped(rules, unruled, params, clip)


def _clipped(
    rules: dict[str, Rule], squares: dict[str, Tensor], params: Params, clip: Clip
) -> Params | None:
    """Sums of all layers; `squares` has the norms in those without a rule."""
    squares |= {name: rule.squared_norms().float() for name, rule in rules.items()}
    if not math.isfinite(sum_of(list(squares.values())).sum()):
        return None  # a factor of 0 would not silence a row of NaN in a matrix product
    factors = clip.factors(squares)
    sums: Params = {}
    for name in list(rules):  # a layer's activations go as soon as its sum is there
        own = rules.pop(name).weighted(factors[name])
        sums |= {f"{name}.{key}".removeprefix("."): value for key, value in own.items()}
    return {
        name: sums[name] if name in sums else zeros(value) for name, value in params.items()
    } | clip.count(squares)


def zeros(value: Tensor) -> Tensor:
    """Nothing, in the shape of a parameter and the precision of sums."""
    return torch.zeros_like(
        value, dtype=torch.promote_types(value.dtype, torch.float32), requires_grad=False
    )


# --------------------------------------------------------------------------- which layers


def ruled_layers(module: nn.Module, params: Params) -> dict[str, nn.Module] | None:
    """Layers that own the parameters, by name.

    None where one has no rule or is only partly trained.
    """
    layers = {name: module.get_submodule(name) for name in dict.fromkeys(map(layer_of, params))}
    if not all(_ruled(layer) for layer in layers.values()):
        return None
    own = {
        f"{name}.{key}": value
        for name, layer in layers.items()
        for key, value in layer._parameters.items()
    }
    owned = {name.removeprefix("."): id(value) for name, value in own.items() if value is not None}
    return layers if owned == {name: id(value) for name, value in params.items()} else None


def _ruled(layer: nn.Module) -> bool:
    """Whether a rule covers the layer and its settings."""
    if type(layer) not in RULES or not layer._parameters.keys() <= OWN:
        return False
    if isinstance(layer, nn.Embedding):
        return layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse
    return not isinstance(layer, nn.Conv1d | nn.Conv2d) or (
        layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    )


# --------------------------------------------------------------------------- what they did


@contextmanager
def _taped(layers: Layers) -> Iterator[list[Call]]:
    """Record every differentiable call of the layers.

    What is given names calls that are not understood.
    """
    tape: list[Call] = []

    def listen(name: str) -> Callable[..., None]:
        def hook(
            layer: nn.Module, args: tuple[Tensor, ...], named: dict[str, Any], left: Tensor
        ) -> None:
            if left.requires_grad:
                entered: Tensor = args[0] if args else named["input"]
                derived = any(
                    value is not None and value.grad_fn for value in layer._parameters.values()
                )
                place = (get_gradient_edge(left), entered.grad_fn, left.shape, derived)
                tape.append(Call(name, entered.detach(), entered._version, *place))

        return hook

    handles = [
        layer.register_forward_hook(listen(n), prepend=True, with_kwargs=True)
        for n, layer in layers.items()
    ]
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def _covers(layer: nn.Module, call: Call, records: int) -> bool:
    """Whether the call gave one row a record and its input is still what it was."""
    unbatched = isinstance(layer, nn.Conv1d | nn.Conv2d) and len(call.shape) < layer.weight.dim()
    whole = len(call.shape) > 1 and call.shape[0] == records and not unbatched
    return whole and call.entered._version == call.version and not call.derived


def _escapes(total: Tensor, tape: list[Call], params: Params) -> bool:
    """Whether the losses depend on a parameter past the taped calls.

    The tape would then miss a part.
    """
    own = {id(value) for value in params.values()}
    jumps = {call.edge.node: call.before for call in tape}
    todo: list[Node | None] = [total.grad_fn]
    seen: set[Node | None] = {None}
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in own:
            return True
        todo += [jumps[node]] if node in jumps else [after for after, _ in node.next_functions]
    return False


def _went_back(total: Tensor, tape: list[Call]) -> dict[str, list[LayerCall]]:
    """Uses of the layers that the losses depend on; the weights' gradients are not computed."""
    if not (tape and total.requires_grad):
        return {}
    backs = torch.autograd.grad(total, [call.edge for call in tape], allow_unused=True)
    uses: dict[str, list[LayerCall]] = {}
    for call, back in zip(tape, backs, strict=True):
        if back is not None:
            uses.setdefault(call.layer, []).append(LayerCall(call.entered, back, back))
    return uses
