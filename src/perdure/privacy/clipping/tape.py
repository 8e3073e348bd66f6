"""Record the calls of layers in a forward pass, and the gradients at their outputs.

Book-keeping and the samplers of Opacus compute per-record gradients from the input of a layer and
the gradient at its output. Models may change tensors in place after a layer has returned them, and
hooks and replaced methods may change the result of a layer. The tape detects this; the gradients
are then computed record by record.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn.modules import module as torch_module

from perdure.privacy.clipping.rules.base import LayerCall
from perdure.types import Params
from perdure.utils.seeding import undisturbed

Layers = Mapping[str, nn.Module]

MOST_SEQUENCES = 64
"""Most sequences of calls that are remembered for one module; most modules have one or two."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TapedCall:
    """One differentiable call of a layer; its output is kept as an edge of the autograd graph.

    The output tensor itself is not enough, because an in-place operation gives it another edge.

    Args:
        layer: name of the layer.
        entered: the input, detached.
        version: number of in-place writes to the input before the call.
        edge: edge of the graph at the output, where its gradient is found.
        before: node of the graph below the layer; None if the graph ends at the layer.
        shape: shape of the output.
        foreign: True if the layer ran with other weights than its parameters.
    """

    layer: str
    entered: Tensor
    version: int
    edge: GradientEdge
    before: Node | None
    shape: torch.Size
    foreign: bool

    @property
    def stands(self) -> bool:
        """False if the layer ran with other weights, or if its input was changed after the call."""
        return not self.foreign and self.entered._version == self.version


Tape = list[TapedCall | None]
"""Calls in order; None for a call that did not turn one tensor into one other tensor."""


def runs_as_built(layer: nn.Module) -> bool:
    """Return True if a call of the layer runs only the methods of its class.

    False if a method was replaced on the object (`layer.forward = ...`), and for all layers if
    torch has forward hooks for all modules: these run before the hooks of the layer, and may change
    its output.
    """
    replaced = any(
        callable(value) and callable(getattr(type(layer), name, None))
        for name, value in vars(layer).items()
    )
    return not replaced and not torch_module._global_forward_hooks


@contextmanager
def taped(layers: Layers, params: Params | None = None) -> Iterator[Tape]:
    """Context manager that records every differentiable call of the layers.

    Args:
        layers: layers by name.
        params: parameters by name that the model runs with, if they are not its own.
    """
    tape: Tape = []
    handles = []
    for name, layer in layers.items():
        own = layer._parameters
        weights = own if params is None else {n: params.get(_joined(name, n)) for n in own}
        hook = partial(_record, tape, name, tuple(weights.values()))
        # before the layer's other hooks, which may change the output
        handles.append(layer.register_forward_hook(hook, prepend=True, with_kwargs=True))
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def _joined(layer: str, own: str) -> str:
    """Return the name that a layer's parameter has in the model."""
    return f"{layer}.{own}".removeprefix(".")


def _record(
    tape: Tape,
    name: str,
    weights: tuple[Tensor | None, ...],
    layer: nn.Module,
    args: tuple[Any, ...],
    named: dict[str, Any],
    left: Any,
) -> None:
    """Forward hook of `taped`, which adds a call of a layer to the tape."""
    if isinstance(left, Tensor) and not left.requires_grad:
        return
    inputs = (*args, *named.values())
    if len(inputs) != 1 or not (isinstance(inputs[0], Tensor) and isinstance(left, Tensor)):
        tape.append(None)
        return
    entered = inputs[0]
    own = layer._parameters.values()
    call = TapedCall(
        layer=name,
        entered=entered.detach(),
        version=entered._version,
        edge=get_gradient_edge(_written_to(left)),
        # a parameter that is passed unchanged has a node, but no function
        before=get_gradient_edge(entered).node if entered.requires_grad else None,
        shape=left.shape,
        foreign=any(now is not then for now, then in zip(own, weights, strict=True)),
    )
    tape.append(None if call.edge.node is call.before else call)


def _written_to(left: Tensor) -> Tensor:
    """Return the tensor whose edge in the graph changes if `left` is changed in place.

    For a view (such as the output of InstanceNorm, or of a linear layer on positions) it is the
    viewed tensor, if `left` shows all of it in the same order.
    """
    base = left._base
    if base is None or base.numel() != left.numel() or not base.requires_grad:
        return left
    return base if base.is_contiguous() and left.is_contiguous() else left


class Rehearsals:
    """Memory of the sequences of layer calls that were tested to have one row per record.

    A first axis may have the length of the batch by chance: if positions of a sequence are looked
    up once for all records, they are as many as the records of some batches. So a sequence of calls
    is trusted only after a pass with another number of records in which the first axes have this
    other length. A sequence that failed is never trusted.
    """

    def __init__(self) -> None:
        self._seen: WeakKeyDictionary[nn.Module, dict[tuple[str, ...], bool]] = WeakKeyDictionary()

    def allow(
        self,
        module: nn.Module,
        layers: Layers,
        calls: Sequence[TapedCall],
        rehearse: Callable[[], int],
        follows: Callable[[Tape, int], Sequence[TapedCall] | None],
    ) -> bool:
        """Return True if the calls of a module have one row per record for any number of records.

        Args:
            module: the model.
            layers: layers that were recorded.
            calls: calls of the pass that is tested.
            rehearse: function that runs the losses of another number of records, and returns it.
            follows: function from a tape and the number of records to its calls; None if one of
                them does not have one row per record.
        """
        known = self._seen.setdefault(module, {})
        order = tuple(call.layer for call in calls)
        if order not in known:
            again = self._followed(layers, rehearse, follows)
            known[order] = again is not None and tuple(c.layer for c in again) == order
            if len(known) > MOST_SEQUENCES:
                known.pop(next(iter(known)))
        return known[order]

    @staticmethod
    def _followed(
        layers: Layers,
        rehearse: Callable[[], int],
        follows: Callable[[Tape, int], Sequence[TapedCall] | None],
    ) -> Sequence[TapedCall] | None:
        try:
            with undisturbed(), taped(layers) as tape:
                records = rehearse()
        except Exception:  # of any model, which may not run with another number of records
            return None
        return follows(tape, records)


REHEARSALS = Rehearsals()
"""Tested sequences of calls of all modules of this process."""


def escapes(total: Tensor, calls: Sequence[TapedCall], params: Params) -> bool:
    """Return True if the losses depend on a parameter outside of the recorded calls.

    The tape would then miss a part of the gradient.
    """
    own = set(map(id, params.values()))
    jumps = {call.edge.node: call.before for call in calls}
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


def went_back(total: Tensor, calls: Sequence[TapedCall]) -> dict[str, list[LayerCall]]:
    """Run a backward pass; return the calls by layer, with the gradients at their outputs.

    Gradients of the weights are not computed.
    """
    return went_back_to(total, calls, ())[0]


def went_back_to(
    total: Tensor, calls: Sequence[TapedCall], places: Sequence[GradientEdge]
) -> tuple[dict[str, list[LayerCall]], list[Tensor | None]]:
    """Run a backward pass; return the calls by layer, and the gradients at other graph edges.

    One backward pass computes both. A gradient is None if the losses do not depend on the edge.
    """
    flowed: dict[str, list[LayerCall]] = {}
    edges = [*(call.edge for call in calls), *places]
    if not edges or not total.requires_grad:
        return flowed, [None] * len(places)
    backs = torch.autograd.grad(total, edges, allow_unused=True)
    for call, back in zip(calls, backs[: len(calls)], strict=True):
        if back is not None:
            own = back.reshape(call.shape)  # the gradient of a view has another shape
            flowed.setdefault(call.layer, []).append(LayerCall(call.entered, own, own))
    return flowed, list(backs[len(calls) :])
