"""Opacus's samplers of per-record gradients, for layers without a rule of perdure's own.

Opacus is imported where it is used.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from perdure.errors import PrivacyError
from perdure.privacy.clipping.bookkeeping import (
    own_squared_norms,
    own_sums,
    refuse_not_finite,
    ruled_layers,
)
from perdure.privacy.clipping.clip import PASS_NUMBERS, Clip, layer_of
from perdure.privacy.clipping.rules.base import (
    LayerCall,
    PrecomputedRows,
    RecordGradients,
    sum_of,
)
from perdure.privacy.clipping.rules.registry import clipping_rules
from perdure.privacy.clipping.tape import (
    REHEARSALS,
    Tape,
    TapedCall,
    escapes,
    runs_as_built,
    taped,
    went_back,
)
from perdure.types import Params

INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

Gradients = Callable[[nn.Module, list[LayerCall]], RecordGradients]


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """A layer whose per-record gradients are known.

    Args:
        key: its name on the tape.
        module: the layer.
        names: its own parameter names to those in the model.
        gradients: from the layer and its calls to norms and weighted sums.
        records: dimension of its output that counts them.
    """

    key: str
    module: nn.Module
    names: Mapping[str, str]
    gradients: Gradients
    records: int = 0

    @property
    def group(self) -> str:
        """Name of the layer as clipping knows it."""
        return layer_of(next(iter(self.names.values())))


def grad_sample_sum(
    module: nn.Module,
    params: Params,
    losses: Callable[[], Tensor],
    records: int,
    clip: Clip,
    rehearse: Callable[[], int] | None = None,
) -> Params | None:
    """Sum over records of clip(gradient of the record's loss, C).

    By rules where there are any and else by Opacus.

    For DPLSTM, DPGRU, DPRNN, convolutions with padding in words, RMSNorm, InstanceNorm,
    SequenceBias and what was registered with `opacus.grad_sample.register_grad_sampler`. The layers
    are listened to here, not by Opacus's own hooks, which add up passes of part of the rows as if
    they were the same records.

    Guarantee: adding or removing one record changes the result by at most `clip.norm` in L2 norm,
    provided that row i of `losses()` depends on record i only and every differentiable pass of the
    module covers all rows in row order. Gradients and attributes of the parameters are left as they
    are.

    Args:
        module: the model, at its own parameters.
        params: those to differentiate.
        losses: runs the module and returns (n,) losses.
        records: n.
        clip: the bound C.
        rehearse: see `clipped_gradient_sum`.

    Returns:
        None, for the caller to go on record by record, where a parameter belongs to no such layer,
        to two layers, or to a layer that is only partly trained; where a layer does not run as its
        class does, or its input is written to afterwards; where a parameter is used outside its
        layer's own call; where a pass does not cover all rows; where rows would take too much
        memory; and where book-keeping has a rule for every layer, which is tried first.

    Raises:
        NotFiniteError: naming the rows whose norms are not finite.
    """
    if not records or ruled_layers(module, params) is not None:
        return None
    layers = sampled_layers(module, params)
    if layers is None or any(_too_large(layer, records) for layer in layers):
        return None
    modules = {layer.key: layer.module for layer in layers}
    with _packed_sequences(module) as packed, taped(modules) as tape:
        total = losses().sum()
    calls = _understood(layers, tape, records)
    if packed or not calls or escapes(total, calls, params):
        return None
    follows = partial(_understood, layers)
    if rehearse and not REHEARSALS.allow(module, modules, calls, rehearse, follows):
        return None
    flowed = went_back(total, calls)
    del tape, calls  # each input goes as soon as its layer is done
    with torch.no_grad():
        return _clipped(layers, flowed, params, records, clip)


def _understood(layers: Sequence[Layer], tape: Tape, records: int) -> list[TapedCall] | None:
    """Calls on the tape; None where one did not turn one row per record into one row per record."""
    of = {layer.key: layer for layer in layers}
    calls = []
    for call in tape:
        if call is None or not call.stands:
            return None
        layer = of[call.layer]
        if len(call.shape) < _output_dims(layer.module):
            return None
        ends = slice(layer.records, layer.records + 1)
        if call.shape[ends] != (records,) or call.entered.shape[ends] != (records,):
            return None
        calls.append(call)
    return calls


def _output_dims(part: nn.Module) -> int:
    """Least number of dimensions of an output with one row per record (see `ClippingRule`)."""
    if isinstance(part, nn.modules.conv._ConvNd):
        return part.weight.dim()
    if type(part) in INSTANCE_NORMS:
        return 3 + INSTANCE_NORMS.index(type(part))
    if isinstance(part, nn.RMSNorm):
        return len(part.normalized_shape) + 1
    rule = clipping_rules().get(type(part))
    return rule.output_dims(part) if rule else 2


def _clipped(
    layers: Sequence[Layer],
    flowed: dict[str, list[LayerCall]],
    params: Params,
    records: int,
    clip: Clip,
) -> Params:
    known = [
        (layer, layer.gradients(layer.module, _settled(layer, flowed.pop(layer.key))))
        for layer in layers
        if layer.key in flowed
    ]
    device = next(iter(params.values())).device
    nothing = torch.zeros(records, dtype=torch.float64, device=device)
    squares = dict.fromkeys(map(layer_of, params), nothing)
    for layer, gradients in known:
        norms = own_squared_norms(layer.module, gradients, records)
        squares[layer.group] = squares[layer.group] + norms
    refuse_not_finite(squares)
    factors = clip.factors(squares)
    sums = {
        layer.names[own]: value
        for layer, gradients in known
        for own, value in own_sums(layer.module, gradients, factors[layer.group]).items()
    }
    return {
        name: sums.get(name, torch.zeros_like(value)) for name, value in params.items()
    } | clip.count(squares)


def _settled(layer: Layer, calls: list[LayerCall]) -> list[LayerCall]:
    """Calls in the precision of the parameters, and in the order of memory of a new tensor.

    Calls that autocast left in half precision would be summed in it. Opacus unfolds images by
    strides that only a tensor without gaps has, and not one in `channels_last`.
    """
    dtype = next(layer.module.parameters()).dtype
    settled = []
    for call in calls:
        entered = call.entered.to(dtype) if call.entered.is_floating_point() else call.entered
        back = call.back.to(dtype).contiguous()
        settled.append(LayerCall(entered.contiguous(), back, back))
    return settled


def sampled_layers(module: nn.Module, params: Params) -> list[Layer] | None:
    """Layers that own the parameters.

    None where one is not known, is shared or is only partly trained.
    """
    if "opacus" not in sys.modules and not _hopeful(module):
        return None
    from opacus.layers.dp_multihead_attention import DPMultiheadAttention
    from opacus.layers.dp_rnn import DPRNNBase

    known = {param: name for name, param in module.named_parameters()}
    layers: list[Layer] = []
    for part in module.modules():
        if isinstance(part, DPMultiheadAttention) and not part.batch_first:
            return None  # its linear layers see (length, n, features)
        if isinstance(part, DPRNNBase):
            continue  # it only lends its parameters other names
        names = {
            own: known[param]
            for own, param in part.named_parameters(recurse=False, remove_duplicate=False)
        }
        if not params.keys() & set(names.values()):
            continue
        layer = _layer(str(len(layers)), part, names)
        if layer is None:
            return None
        layers.append(layer)
    owned = [name for layer in layers for name in layer.names.values()]
    return layers if sorted(owned) == sorted(params) else None


def _hopeful(module: nn.Module) -> bool:
    """Tell if it is worth importing Opacus.

    Every parameter belongs to a layer that may be known.
    """
    convolutions = nn.modules.conv._ConvNd
    norms = nn.modules.instancenorm._InstanceNorm
    owners = [
        part for part in module.modules() if any(True for _ in part.parameters(recurse=False))
    ]
    rules = clipping_rules()
    return all(
        type(part) in rules or isinstance(part, convolutions | norms | nn.RMSNorm)
        for part in owners
    )


def _layer(key: str, part: nn.Module, names: Mapping[str, str]) -> Layer | None:
    """Find the way to compute the gradients of one layer; None where it is not known."""
    from opacus.grad_sample import GradSampleModule
    from opacus.layers.dp_multihead_attention import SequenceBias
    from opacus.layers.dp_rnn import RNNLinear

    if not runs_as_built(part):
        return None
    named = partial(Layer, key=key, module=part, names=names)
    alone = nn.Sequential(part)
    if ruled_layers(alone, dict(alone.named_parameters())) is not None:
        return named(gradients=clipping_rules()[type(part)].gradients)
    if type(part) is RNNLinear:  # one call a time step
        return named(gradients=clipping_rules()[nn.Linear].gradients)
    if type(part) is SequenceBias:
        return named(gradients=_last_of_sequence, records=0 if part.batch_first else 1)
    if type(part) not in GradSampleModule.GRAD_SAMPLERS or not _sampled_rightly(part):
        return None
    return named(gradients=_by_sampler)


def _sampled_rightly(part: nn.Module) -> bool:
    """Tell if Opacus's sampler respects the settings of the layer.

    EmbeddingBag's adds a repeated word once.
    """
    if isinstance(part, nn.modules.conv._ConvNd):
        return part.padding_mode == "zeros"
    if isinstance(part, nn.modules.instancenorm._InstanceNorm):
        return part.running_mean is None and not part.track_running_stats
    return type(part) not in clipping_rules() and type(part) is not nn.EmbeddingBag


def _too_large(layer: Layer, records: int) -> bool:
    size = sum(param.numel() for param in layer.module.parameters())
    size *= getattr(layer.module, "groups", 1)  # Opacus forms the blocks off the diagonal too
    return layer.gradients is _by_sampler and records * size > PASS_NUMBERS


def _by_sampler(layer: nn.Module, calls: list[LayerCall]) -> RecordGradients:
    """Rows by Opacus, summed over the layer's calls.

    Raises:
        PrivacyError: where a sampler that somebody registered gives no row per record.
    """
    from opacus.grad_sample import GradSampleModule

    sampler = GradSampleModule.GRAD_SAMPLERS[type(layer)]
    own = dict(layer.named_parameters())
    parts = [sampler(layer, [call.entered], call.back) for call in calls]
    for name, param in own.items():
        for call, part in zip(calls, parts, strict=True):
            shape = tuple(part[param].shape) if param in part else None
            if shape != (len(call.left), *param.shape):
                raise PrivacyError(
                    f"the grad sampler of {type(layer).__name__} returns shape {shape} for {name} "
                    f"and {len(call.left)} records; return (n, *{tuple(param.shape)}), one row "
                    "per record"
                )
    return PrecomputedRows(
        {name: sum_of([part[param] for part in parts]) for name, param in own.items()}
    )


def _last_of_sequence(layer: nn.Module, calls: list[LayerCall]) -> RecordGradients:
    """Take the gradient of the element that SequenceBias adds at the end."""
    return PrecomputedRows(
        {
            "bias": sum_of(
                [call.back[:, -1] if layer.batch_first else call.back[-1] for call in calls]
            )
        }
    )


@contextmanager
def _packed_sequences(module: nn.Module) -> Iterator[list[str]]:
    """Names of recurrent layers that are given a packed sequence.

    It sorts the records by length.
    """
    from opacus.layers.dp_rnn import DPRNNBase

    packed: list[str] = []

    def hook(part: nn.Module, entered: tuple[Any, ...]) -> None:
        if not isinstance(entered[0], Tensor):
            packed.append(type(part).__name__)

    parts = [part for part in module.modules() if isinstance(part, DPRNNBase)]
    handles = [part.register_forward_pre_hook(hook) for part in parts]
    try:
        yield packed
    finally:
        for handle in handles:
            handle.remove()
