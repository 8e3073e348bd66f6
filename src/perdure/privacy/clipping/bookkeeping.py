"""Clipped sums of per-record gradients by book-keeping, with one forward and one backward pass.

The backward pass goes to the outputs of the layers only.

Bu, Wang, Zha and Karypis, Differentially Private Optimization on Large Model at Small Cost, ICML
2023 (book-keeping). Norms and clipped sums come from the inputs of each layer and the gradients at
its outputs (see `rules`); the gradient of a weight is never formed for the batch as a whole.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from perdure.errors import PrivacyError
from perdure.privacy.clipping.broadcasts import (
    BroadcastRows,
    bare_parameters,
    parameter_uses,
    rows_by_module,
)
from perdure.privacy.clipping.clip import Clip, NotFiniteError, layer_of
from perdure.privacy.clipping.norms import LONGEST
from perdure.privacy.clipping.rules.base import (
    ClippingRule,
    LayerCall,
    RecordGradients,
    sum_of,
)
from perdure.privacy.clipping.rules.registry import clipping_rules
from perdure.privacy.clipping.tape import (
    REHEARSALS,
    Layers,
    Tape,
    TapedCall,
    escapes,
    runs_as_built,
    taped,
    went_back_to,
)
from perdure.types import Params


def clipped_gradient_sum(
    module: nn.Module,
    params: Params,
    losses: Callable[[], Tensor],
    records: int,
    clip: Clip,
    rehearse: Callable[[], int] | None = None,
) -> Params | None:
    """Sum over records of clip(gradient of the record's loss, C), by the rules of the layers.

    Guarantee: adding or removing one record changes the result by at most `clip.norm` in L2 norm,
    if row i of `losses()` depends on record i only, if every differentiable pass of the module
    covers all rows in row order, and if the rules keep the guarantee of `ClippingRule`. Under
    autocast or in half precision, sums are computed in float32 from the half-precision inputs and
    gradients of the layers.

    Args:
        module: the model, with its own parameters.
        params: parameters to differentiate, by name.
        losses: function that runs the module and returns (n,) losses.
        records: number of records, n.
        clip: the bound C.
        rehearse: function that runs the losses with another number of records and returns this
            number. With one number alone, an axis of positions can have the same length as the
            batch by chance, and would be taken for the axis of records (see `Rehearsals`). None if
            every pass of the module is known to cover all rows in row order.

    Returns:
        The sums by parameter name, in float32 or wider. (In half precision, rounding before the
        noise could change a sum of many records by more than C.) None if the sum cannot be computed
        this way, and the caller must use another way: if a parameter has no rule, is shared, or is
        used outside the call of its own layer (as in a layer that runs with weights computed from
        the parameters), or if a pass does not cover all records, with this or another number of
        records.

    Raises:
        NotFiniteError: names the rows whose norms are NaN, infinite or too long. Leave these rows
            out and call again; another way would round the other rows differently.
        PrivacyError: if a rule returns a tensor of the wrong shape.
    """
    parts = layers_and_bare(module, params)
    if parts is None or records == 0:
        return None
    layers, bare = parts
    with taped(layers) as tape:
        total = losses().sum()
    calls = _understood(layers, tape, records)
    ruled = {name: value for name, value in params.items() if name not in bare}
    if calls is None or escapes(total, calls, ruled):
        return None
    follows = partial(_understood, layers)
    if rehearse and not REHEARSALS.allow(module, layers, calls, rehearse, follows):
        return None
    uses = parameter_uses(total, calls, bare, records) if bare else []
    if uses is None:
        return None
    flowed, backs = went_back_to(total, calls, [use.out for use in uses])
    broadcasts = rows_by_module(uses, backs)
    del tape, calls, uses, backs  # free each input once its layer is finished
    device = total.device.type
    mixed = torch.is_autocast_enabled(device)
    with torch.no_grad(), torch.autocast(device, enabled=False) if mixed else nullcontext():
        return _clipped(layers, flowed, broadcasts, params, records, clip)


def _clipped(
    layers: Layers,
    calls: dict[str, list[LayerCall]],
    broadcasts: dict[str, BroadcastRows],
    params: Params,
    records: int,
    clip: Clip,
) -> Params:
    """Compute the clipped sums of all layers with a rule, and of the parameters outside of them."""
    rules = clipping_rules()
    device = next(iter(params.values())).device
    nothing = torch.zeros(records, dtype=torch.float64, device=device)
    squares = dict.fromkeys(map(layer_of, params), nothing)
    for name, rows in broadcasts.items():
        squares[name] = rows.squared_norms().double()
    known: dict[str, RecordGradients] = {}
    for name in list(calls):
        layer = layers[name]
        known[name] = rules[type(layer)].gradients(layer, calls.pop(name))
        squares[name] = own_squared_norms(layer, known[name], records)
    refuse_not_finite(squares)
    factors = clip.factors(squares)
    sums: Params = {}
    for name, rows in broadcasts.items():
        sums |= rows.weighted(factors[name])
    for name in list(known):  # free the activations of a layer once its sum is computed
        for own, value in own_sums(layers[name], known.pop(name), factors[name]).items():
            sums[f"{name}.{own}".removeprefix(".")] = value
    total: Params = {}
    for name, value in params.items():
        if name not in sums:
            wide = torch.promote_types(value.dtype, torch.float32)
            sums[name] = torch.zeros_like(value, dtype=wide, requires_grad=False)
        total[name] = sums[name]
    return total | clip.count(squares)


def refuse_not_finite(squares: Mapping[str, Tensor]) -> None:
    """Refuse rows whose norms are infinite, NaN or longer than `LONGEST`.

    A factor of 0 would not be enough: in a matrix product, 0 times NaN is NaN.

    Args:
        squares: layer to (n,) squared norms.

    Raises:
        NotFiniteError: names the rows.
    """
    inside = sum_of(list(squares.values())) <= LONGEST**2
    if not bool(inside.all()):
        raise NotFiniteError(~inside)


def own_squared_norms(layer: nn.Module, gradients: RecordGradients, records: int) -> Tensor:
    """Return (n,) squared norms of the records' gradients in one layer, in float64.

    Raises:
        PrivacyError: if the clipping rule of the layer returns another shape.
    """
    squares = gradients.squared_norms()
    if squares.shape != (records,):
        raise PrivacyError(
            f"the clipping rule of {type(layer).__name__} returns squared norms of shape "
            f"{tuple(squares.shape)} for {records} records; return shape (n,), one norm per record"
        )
    return squares.double()


def own_sums(layer: nn.Module, gradients: RecordGradients, factors: Tensor) -> Params:
    """Compute the weighted sums of the per-record gradients of one layer, by parameter name.

    Raises:
        PrivacyError: if the clipping rule of the layer returns other names or shapes.
    """
    wide = torch.promote_types(next(layer.parameters()).dtype, torch.float32)
    sums = gradients.weighted(factors.to(wide))
    for name, param in layer._parameters.items():
        given = tuple(sums[name].shape) if name in sums else None
        if param is not None and given != tuple(param.shape):
            raise PrivacyError(
                f"the clipping rule of {type(layer).__name__} returns a sum of shape {given} for "
                f"{name}; return {tuple(param.shape)}, the shape of the parameter"
            )
    return sums


# --------------------------------------------------------------------------- which layers


def ruled_layers(module: nn.Module, params: Params) -> dict[str, nn.Module] | None:
    """Layers that own the parameters, by name, if all of them can be clipped by a rule.

    None if a layer has no rule, overrides the forward of its class, or is trained only in part.
    """
    parts = layers_and_bare(module, params)
    return parts[0] if parts and not parts[1] else None


def layers_and_bare(
    module: nn.Module, params: Params
) -> tuple[dict[str, nn.Module], Params] | None:
    """Layers that own the parameters, by name, and the parameters of modules without a rule.

    None if a layer with a rule overrides the forward of its class or is trained only in part, or if
    a module without a rule does more with its parameters than broadcast them.
    """
    rules = clipping_rules()
    layers: dict[str, nn.Module] = {}
    bare: Params = {}
    numbers = sum(value.numel() for value in params.values())
    for name in dict.fromkeys(map(layer_of, params)):
        layer = module.get_submodule(name)
        own = {n: value for n, value in params.items() if layer_of(n) == name}
        rule = rules.get(type(layer))
        if rule is None:
            bare |= own
            if not bare_parameters(layer, bare, numbers):
                return None
        elif _goes_by(rule, name, layer, own):
            layers[name] = layer
        else:
            return None
    return layers, bare


def _goes_by(rule: ClippingRule, name: str, layer: nn.Module, own: Params) -> bool:
    """Return True if a layer can be clipped by a rule.

    Args:
        rule: the clipping rule.
        name: name of the layer in the model.
        layer: the layer.
        own: trained parameters of the layer, by their names in the model.
    """
    if not layer._parameters.keys() <= rule.parameters:
        return False
    # calls of a child module with parameters would be inside the layer's own call
    parted = any(True for part in layer.children() for _ in part.parameters())
    if parted or not rule.covers(layer) or not runs_as_built(layer):
        return False
    held = {n: value for n, value in layer._parameters.items() if value is not None}
    trained = (own.get(f"{name}.{n}".removeprefix(".")) is value for n, value in held.items())
    return len(held) == len(own) and all(trained)


# --------------------------------------------------------------------------- what they did


def _understood(layers: Layers, tape: Tape, records: int) -> list[TapedCall] | None:
    """Return the recorded calls of the layers if each one keeps one row per record.

    None if the input or output of a call does not have one row per record, or if its input was
    changed afterwards.
    """
    rules = clipping_rules()
    calls = []
    for call in tape:
        if call is None or not call.stands:
            return None
        layer = layers[call.layer]
        if len(call.shape) < rules[type(layer)].output_dims(layer):
            return None
        if call.shape[0] != records or call.entered.shape[:1] != (records,):
            return None
        calls.append(call)
    return calls
