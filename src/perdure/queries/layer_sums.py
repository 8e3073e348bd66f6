"""Sums over records of squared or absolute gradients, layer by layer.

The gradient of a linear layer is sum_t d_t a_t^T over the positions t of a record, with a_t the
input and d_t the gradient at the output; a convolution is a linear layer on patches. With one
position, the square is the outer product of d^2 and a^2, and no row is formed. With several, rows
are formed, as many at a time as the processor's cache holds. For all other parameters, every record
gets its own view of the parameter, so that one backward pass gives all their rows.

All terms share one forward pass. Each term takes one backward pass, without the gradients of the
layers' weights.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.contract.forward import Forward
from perdure.data.records import Batch, batch_of_one
from perdure.privacy.clipping.rules.base import record_slices
from perdure.privacy.clipping.tape import TapedCall, escapes, runs_as_built, taped
from perdure.queries.per_record import CHUNK
from perdure.types import Params
from perdure.utils.chunking import blank_row, chunks

Terms = Callable[[Forward, Batch], tuple[Tensor, Tensor]]
"""Function from (forward, batch) to losses (n, k) and weights (n, k); weights have no gradient."""

MatrixLayer = nn.Linear | nn.Conv1d | nn.Conv2d
"""Layer whose weight, as a matrix, is multiplied with its input at every position."""

PASS_NUMBERS = 2**25
"""Most numbers (128 MiB) that are kept for the records of one pass."""

TERMS_AT_ONCE = 10
"""Most terms whose gradients are kept together, so that all share the patches of the input."""


# --------------------------------------------------------------------------- hooks


class LayerTap:
    """Forward hooks that add a shift to the output of each call of a layer and keep its input.

    Shifts are zeros: the gradient with respect to a call's shift is the gradient at its output.
    Calls are numbered: the first of layer `body.1` is `body.1/0`.

    Attributes:
        calls: layer and shape of the output, in the order of the calls in the pass. A call whose
            shape differs from its shift's gets no shift, so compare shapes before you use a
            gradient.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, torch.Size]] = []
        self._shifts: Params = {}
        self._inputs: Params = {}

    def start_pass(self, shifts: Params) -> Params:
        """Begin a new pass with these shifts (name of a call to tensor); drop recorded inputs.

        Returns:
            An empty mapping from call to input, which the hooks fill during the pass.
        """
        self.calls = []
        self._shifts = shifts
        self._inputs = {}
        return self._inputs

    def hook(self, name: str) -> Callable[..., Tensor]:
        """Build the forward hook of the layer `name`."""

        def listen(
            _: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
        ) -> Tensor:
            call = f"{name}/{[other for other, _ in self.calls].count(name)}"
            self.calls.append((name, output.shape))
            (self._inputs[call],) = (*args, *named.values())
            shift = self._shifts.get(call)
            if shift is None or shift.shape != output.shape:
                return output
            return output + shift.to(output.dtype)

        return listen


@contextmanager
def tapped(layers: Mapping[str, nn.Module]) -> Iterator[LayerTap]:
    """Context manager that attaches the hooks of a `LayerTap` to the layers, and removes them."""
    tap = LayerTap()
    # before the layer's other hooks, which may change the output
    handles = [
        layer.register_forward_hook(tap.hook(name), prepend=True, with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield tap
    finally:
        for handle in handles:
            handle.remove()


# --------------------------------------------------------------------------- sums


def sum_by_layers(
    terms: Terms,
    size_of: Callable[[Tensor], Tensor],
    module: nn.Module,
    params: Params,
    tensors: Mapping[str, Tensor],
) -> Params | None:
    """Sum over records of sum_k w_k size(d l_k / d theta), without privacy.

    Every record is in a batch of one, under `torch.func.vmap`.

    Args:
        terms: function that computes losses and weights of every record.
        size_of: square or absolute value of each number, so that size(x y) = size(x) size(y).
        module: the model.
        params: all parameters of the model, by name.
        tensors: the records, name to (n, ...).

    Returns:
        The sums by parameter name. None if there are no records, no linear or convolution layers,
        or an `nn.MultiheadAttention`, or if the losses depend on a layer's weight outside of its
        own calls.
    """
    passes = _Passes.of(terms, size_of, module, params, tensors)
    if passes is None or not len(tensors["labels"]):
        return None
    total = {name: torch.zeros_like(value, requires_grad=False) for name, value in params.items()}
    for piece in chunks(tensors, passes.records_at_once):
        if not passes.add(piece, total):
            return None
    return total


@dataclass(frozen=True, kw_only=True)
class _Passes:
    """Forward and backward passes over parts of the records.

    Args:
        terms: function that computes losses and weights of every record.
        size_of: square or absolute value of each number.
        module: the model.
        params: all parameters of the model, by name.
        layers: layers with hooks, by name.
        outputs: call to the shape of its output for one record, in the order of the calls.
    """

    terms: Terms
    size_of: Callable[[Tensor], Tensor]
    module: nn.Module
    params: Params
    layers: Mapping[str, MatrixLayer]
    outputs: Mapping[str, torch.Size]

    @classmethod
    def of(
        cls,
        terms: Terms,
        size_of: Callable[[Tensor], Tensor],
        module: nn.Module,
        params: Params,
        tensors: Mapping[str, Tensor],
    ) -> "_Passes | None":
        """Make the passes after a run of one blank record, which finds the calls of layers.

        The result is None if these calls do not give the whole gradient of the model.
        """
        # torch's attention uses a path without gradients, because vmap hides them from its check
        if any(isinstance(part, nn.MultiheadAttention) for part in module.modules()):
            return None
        layers = matrix_layers(module, params)
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        with torch.enable_grad(), taped(layers, leaves) as tape:
            losses, _ = terms(Forward(module, leaves), Batch.from_tensors(blank_row(tensors)))
            total = losses.sum()
        calls = [call for call in tape if call is not None and call.stands]
        tapped_leaves = {name: leaves[name] for name in _parameter_names(layers)}
        whole = len(calls) == len(tape) and not escapes(total, calls, tapped_leaves)
        if not (calls and whole and total.requires_grad):
            return None
        return cls(
            terms=terms,
            size_of=size_of,
            module=module,
            params=params,
            layers=layers,
            outputs=_numbered(calls),
        )

    @property
    def others(self) -> Params:
        """Parameters that belong to none of the layers with hooks."""
        known = _parameter_names(self.layers)
        return {name: value for name, value in self.params.items() if name not in known}

    @property
    def records_at_once(self) -> int:
        """Number of records of one pass, limited by the memory for outputs and gradients."""
        numbers = 2 * sum(value.numel() for value in self.others.values())
        for shape in self.outputs.values():
            # in addition to the gradients, autograd keeps tensors of the layer and of later layers
            numbers += prod(shape) * (TERMS_AT_ONCE + 4)
        return min(CHUNK, max(1, PASS_NUMBERS // max(1, numbers)))

    def add(self, tensors: Mapping[str, Tensor], total: Params) -> bool:
        """Add the sums over some records to `total`; return False if other layers were called."""
        n = len(tensors["labels"])
        with torch.enable_grad(), tapped(self.layers) as tap:
            # expanded views, so that nothing is stored n times
            zero = next(iter(self.params.values())).new_zeros(()).requires_grad_()
            shifts = {call: zero.expand(n, *shape) for call, shape in self.outputs.items()}
            own = {
                name: value.detach().requires_grad_().expand(n, *value.shape)
                for name, value in self.others.items()
            }

            def alone(
                shifts: Params, own: Params, tensors: Params
            ) -> tuple[Tensor, Tensor, Params]:
                entered = tap.start_pass(shifts)
                forward = Forward(self.module, {**self.params, **own})
                losses, weights = self.terms(forward, batch_of_one(tensors))
                return losses[0], weights[0].detach(), entered

            losses, weights, entered = torch.func.vmap(alone)(shifts, own, dict(tensors))
            of_terms = losses.sum(0).unbind()
        if tap.calls != [(_layer(call), shape) for call, shape in self.outputs.items()]:
            return False
        entered = {call: value.detach() for call, value in entered.items()}
        points = [*shifts.values(), *own.values()]
        for start in range(0, len(of_terms), TERMS_AT_ONCE):
            some = slice(start, start + TERMS_AT_ONCE)
            backs: list[Params] = []
            for loss, weight in zip(of_terms[some], weights[:, some].unbind(1), strict=True):
                found = torch.autograd.grad(
                    loss, points, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                backs.append(dict(zip(shifts, found[: len(shifts)], strict=True)))
                for name, rows in zip(own, found[len(shifts) :], strict=True):
                    _add(total, name, weight @ self.size_of(rows.flatten(1)))
            for name in dict.fromkeys(map(_layer, self.outputs)):
                self._add_layer(name, entered, backs, weights[:, some], total)
        return True

    def _add_layer(
        self, name: str, entered: Params, backs: list[Params], weights: Tensor, total: Params
    ) -> None:
        """Add the contribution of one layer to the sums, for some of the terms.

        Args:
            name: name of the layer.
            entered: call to the input of the layer in this call, (n, ...).
            backs: for every term, call to the gradient at the layer's output, (n, ...).
            weights: (n, terms) weights of the terms.
            total: sums by parameter name, which are added to.
        """
        layer = self.layers[name]
        calls = [call for call in self.outputs if _layer(call) == name]
        terms = len(backs)
        places = sum(prod(self.outputs[call]) for call in calls) // len(layer.weight)
        numbers = terms * layer.weight.numel() + places * fan_in(layer)
        one_place = places == 1
        for piece in [slice(None)] if one_place else record_slices(len(weights), numbers):
            own = weights[piece]
            a = _joined([places_of_input(layer, entered[c][piece]) for c in calls])
            d = _joined([_places_of_terms(layer, [at[c][piece] for at in backs]) for c in calls])
            if one_place:
                left = torch.einsum("mt,mgto->gom", own, self.size_of(d[..., 0]))
                _add(total, f"{name}.weight", left @ self.size_of(a[..., 0]).transpose(0, 1))
            else:
                rows = d.flatten(2, 3) @ a.mT
                shape = (*rows.shape[:2], terms, -1, rows.shape[3])
                sizes = self.size_of(rows).view(shape)
                _add(total, f"{name}.weight", torch.einsum("mt,mgtok->gok", own, sizes))
            if layer.bias is not None:
                sizes = self.size_of(d.sum(4))
                _add(total, f"{name}.bias", torch.einsum("mt,mgto->go", own, sizes))


# --------------------------------------------------------------------------- layers


def matrix_layers(module: nn.Module, params: Params) -> dict[str, MatrixLayer]:
    """Linear and convolution layers with a weight among the parameters, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)
        and type(layer) in (nn.Linear, nn.Conv1d, nn.Conv2d)
        and _is_plain(layer)
        and runs_as_built(layer)
        and all(f"{name}.{own}".removeprefix(".") in params for own, _ in layer.named_parameters())
    }


def _is_plain(layer: MatrixLayer) -> bool:
    """Return True if a layer has only weight and bias, and pads with a number of zeros."""
    names = {name for name, _ in layer.named_parameters()}
    zeros = isinstance(layer, nn.Linear) or (
        layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    )
    return zeros and names in ({"weight"}, {"weight", "bias"})


def fan_in(layer: MatrixLayer) -> int:
    """Number of input values that one output position depends on, over all groups."""
    return (
        layer.in_features
        if isinstance(layer, nn.Linear)
        else (layer.in_channels * prod(layer.kernel_size))
    )


def places_of_input(layer: MatrixLayer, entered: Tensor) -> Tensor:
    """Return (n, groups, fan in of a group, places) input of a layer as the factor of its weight.

    Places are the positions in the output, such as pixels or tokens.

    Args:
        layer: the layer.
        entered: (n, ...) input of the layer for every record.
    """
    n = len(entered)
    if isinstance(layer, nn.Linear):
        return entered.reshape(n, 1, -1, layer.in_features).mT
    images = entered.reshape(-1, *entered.shape[1 - layer.weight.dim() :])
    flat = images if isinstance(layer, nn.Conv2d) else images.unsqueeze(2)
    settings = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    sides = [(low, *map(int, own))[-2:] for low, own in zip((1, 1, 0, 1), settings, strict=True)]
    return _by_group(F.unfold(flat, *sides), n, layer.groups)


def places_of_output(layer: MatrixLayer, back: Tensor) -> Tensor:
    """Return (n, groups, outputs of a group, places) gradient at the layer's output.

    Args:
        layer: the layer.
        back: (n, ...) gradient at the layer's output, in the shape of the output.
    """
    if isinstance(layer, nn.Linear):
        return back.reshape(len(back), 1, -1, layer.out_features).mT
    images = back.reshape(-1, *back.shape[1 - layer.weight.dim() :])
    return _by_group(images.flatten(2), len(back), layer.groups)


def _places_of_terms(layer: MatrixLayer, backs: list[Tensor]) -> Tensor:
    """(n, groups, terms, outputs of a group, places) gradients at the output for several terms."""
    together = torch.stack(backs, 1)
    places = places_of_output(layer, together.flatten(0, 1))
    return places.view(*together.shape[:2], *places.shape[1:]).transpose(1, 2)


def _joined(calls: list[Tensor]) -> Tensor:
    """Concatenate the positions of several calls along the last axis."""
    return calls[0] if len(calls) == 1 else torch.cat(calls, -1)


def _by_group(values: Tensor, n: int, groups: int) -> Tensor:
    """Reshape (n x images, channels, places) to (n, groups, channels, images x places).

    The third axis has the channels of a group.
    """
    images = len(values) // n
    split = values.reshape(n, images, groups, -1, values.shape[-1])
    return split.permute(0, 2, 3, 1, 4).flatten(3)


def _parameter_names(layers: Mapping[str, nn.Module]) -> set[str]:
    """Names of the layers' parameters in the model."""
    return {
        f"{name}.{own}".removeprefix(".")
        for name, layer in layers.items()
        for own, _ in layer.named_parameters()
    }


def _numbered(calls: list[TapedCall]) -> dict[str, torch.Size]:
    """Shape of the output of every call, by the names that `LayerTap` gives to calls."""
    names = [call.layer for call in calls]
    return {f"{name}/{names[:i].count(name)}": calls[i].shape for i, name in enumerate(names)}


def _layer(call: str) -> str:
    """Return the name of the layer from the name of one of its calls."""
    return call.rpartition("/")[0]


def _add(total: Params, name: str, value: Tensor) -> None:
    """Add a value to the sum of a parameter, reshaped to the parameter's shape."""
    own = total[name.removeprefix(".")]
    own += value.reshape(own.shape)
