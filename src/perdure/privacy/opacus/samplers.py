"""Per-record gradients by Opacus's grad samplers, for layers without a clipping rule of perdure.

Opacus is imported only when a function needs it.
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
    """A layer for which there is a way to compute per-record gradients.

    Args:
        key: name of the layer on the tape.
        module: the layer.
        names: names of its parameters in the layer to their names in the model.
        gradients: function from the layer and its calls to norms and weighted sums.
        records: dimension of its output that has one entry per record.
    """

    key: str
    module: nn.Module
    names: Mapping[str, str]
    gradients: Gradients
    records: int = 0

    @property
    def group(self) -> str:
        """Name of the layer in the model, under which clipping groups its parameters."""
        return layer_of(next(iter(self.names.values())))


def grad_sample_sum(
    module: nn.Module,
    params: Params,
    losses: Callable[[], Tensor],
    records: int,
    clip: Clip,
    rehearse: Callable[[], int] | None = None,
) -> Params | None:
    """Sum over records of clip(gradient of the record's loss, C), also with samplers of Opacus.

    Layers with a clipping rule use it; the other layers use Opacus.

    This covers DPLSTM, DPGRU, DPRNN, convolutions with padding given as a word, RMSNorm,
    InstanceNorm, SequenceBias and layers registered with
    `opacus.grad_sample.register_grad_sampler`. Own hooks record the calls, because the hooks of
    Opacus would add passes over different rows as if they had the same records.

    Guarantee: adding or removing one record changes the result by at most `clip.norm` in L2 norm,
    if row i of `losses()` depends on record i only and every differentiable pass of the module
    covers all rows in row order. Gradients and attributes of the parameters do not change.

    Args:
        module: the model, with its own parameters.
        params: parameters to differentiate, by name.
        losses: function that runs the module and returns (n,) losses.
        records: number of records, n.
        clip: the bound C.
        rehearse: function that runs the losses with another number of records and returns this
            number, or None (see `clipped_gradient_sum`).

    Returns:
        The sums by parameter name. None, so that the caller computes record by record, if a
        parameter belongs to no such layer, to two layers, or to a layer that is trained only in
        part; if a layer does not run the forward of its class, or its input is changed afterwards;
        if a parameter is used outside the call of its layer; if a pass does not cover all rows; if
        the rows need too much memory; or if all layers have rules, so that book-keeping comes
        first.

    Raises:
        NotFiniteError: names the rows whose norms are not finite.
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
    del tape, calls  # free each input once its layer is finished
    with torch.no_grad():
        return _clipped(layers, flowed, params, records, clip)


def _understood(layers: Sequence[Layer], tape: Tape, records: int) -> list[TapedCall] | None:
    """Recorded calls of the layers; None if one of them did not keep one row per record."""
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
    """Fewest dimensions of an output with one row per record (see `ClippingRule`)."""
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
    """Return the calls in the precision of the parameters, with tensors in contiguous memory.

    Calls that autocast left in half precision would be summed in half precision. Opacus unfolds
    images by strides that `channels_last` tensors do not have.
    """
    dtype = next(layer.module.parameters()).dtype
    settled = []
    for call in calls:
        entered = call.entered.to(dtype) if call.entered.is_floating_point() else call.entered
        back = call.back.to(dtype).contiguous()
        settled.append(LayerCall(entered.contiguous(), back, back))
    return settled


def sampled_layers(module: nn.Module, params: Params) -> list[Layer] | None:
    """Layers that own the parameters, each with a way to compute per-record gradients.

    None if a layer is not known, is shared, or is trained only in part.
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
            continue  # it only gives its parameters other names
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
    """Return True if Opacus is worth importing.

    This is so if every parameter belongs to a layer that Opacus may support.
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
    """Find the way to compute the gradients of one layer; None if there is none."""
    from opacus.grad_sample import GradSampleModule
    from opacus.layers.dp_multihead_attention import SequenceBias
    from opacus.layers.dp_rnn import RNNLinear

    if not runs_as_built(part):
        return None
    named = partial(Layer, key=key, module=part, names=names)
    alone = nn.Sequential(part)
    if ruled_layers(alone, dict(alone.named_parameters())) is not None:
        return named(gradients=clipping_rules()[type(part)].gradients)
    if type(part) is RNNLinear:  # one call per time step
        return named(gradients=clipping_rules()[nn.Linear].gradients)
    if type(part) is SequenceBias:
        return named(gradients=_last_of_sequence, records=0 if part.batch_first else 1)
    if type(part) not in GradSampleModule.GRAD_SAMPLERS or not _sampled_rightly(part):
        return None
    return named(gradients=_by_sampler)


def _sampled_rightly(part: nn.Module) -> bool:
    """Return True if Opacus's sampler respects the settings of the layer.

    The sampler for EmbeddingBag adds a repeated word only once.
    """
    if isinstance(part, nn.modules.conv._ConvNd):
        return part.padding_mode == "zeros"
    if isinstance(part, nn.modules.instancenorm._InstanceNorm):
        return part.running_mean is None and not part.track_running_stats
    return type(part) not in clipping_rules() and type(part) is not nn.EmbeddingBag


def _too_large(layer: Layer, records: int) -> bool:
    size = sum(param.numel() for param in layer.module.parameters())
    size *= getattr(layer.module, "groups", 1)  # Opacus also computes the blocks off the diagonal
    return layer.gradients is _by_sampler and records * size > PASS_NUMBERS


def _by_sampler(layer: nn.Module, calls: list[LayerCall]) -> RecordGradients:
    """Compute per-record gradients with Opacus, summed over the calls of the layer.

    Raises:
        PrivacyError: if a registered sampler does not return one row per record.
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
    """Compute the gradient of the element that SequenceBias appends to a sequence."""
    return PrecomputedRows(
        {
            "bias": sum_of(
                [call.back[:, -1] if layer.batch_first else call.back[-1] for call in calls]
            )
        }
    )


@contextmanager
def _packed_sequences(module: nn.Module) -> Iterator[list[str]]:
    """Context manager that collects the names of recurrent layers with packed sequences as input.

    A packed sequence sorts the records by length.
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
