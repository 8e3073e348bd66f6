"""Record the calls of layers in a forward pass, and the gradients that come back to them.

Book-keeping and the samplers of Opacus read per-record gradients off what entered a layer and what
came back to its output. Models write into tensors after a layer has returned them, and hooks and
replaced methods change what a layer computes; a tape says where its calls are not the layer's own
any more, and the gradients are then formed record by record.
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
"""Sequences of calls that are kept of a module; calls of most modules have one or two."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TapedCall:
    """One differentiable call of a layer; its output is kept as a place in the graph.

    The tensor itself would not do: an operation in place gives it another place.

    Args:
        layer: its name.
        entered: the input, detached.
        version: how often that tensor had been written to by then.
        edge: the output's gradient.
        before: where the graph goes on below the layer; None at its end.
        shape: of the output.
        foreign: whether the layer ran with other weights than its parameters.
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
        """False where the layer ran with other weights, or its input was written to afterwards."""
        return not self.foreign and self.entered._version == self.version


Tape = list[TapedCall | None]
"""Calls in order; None for one that did not turn one tensor into another."""


def runs_as_built(layer: nn.Module) -> bool:
    """Return whether a call of the layer runs the methods of its class, and nothing after them.

    False for a method replaced on the object (`layer.forward = ...`), and wherever torch has
    forward hooks for all modules: they run before any hook of the layer's own, and may change its
    output.
    """
    replaced = any(
        callable(value) and callable(getattr(type(layer), name, None))
        for name, value in vars(layer).items()
    )
    return not replaced and not torch_module._global_forward_hooks


@contextmanager
def taped(layers: Layers, params: Params | None = None) -> Iterator[Tape]:
    """Record every differentiable call of the layers.

    Args:
        layers: by name.
        params: what the model runs with, by name, where that is not its own parameters.
    """
    tape: Tape = []
    handles = []
    for name, layer in layers.items():
        own = layer._parameters
        weights = own if params is None else {n: params.get(_joined(name, n)) for n in own}
        hook = partial(_record, tape, name, tuple(weights.values()))
        # first of the layer's hooks: the others may change the output
        handles.append(layer.register_forward_hook(hook, prepend=True, with_kwargs=True))
    try:
        yield tape
    finally:
        for handle in handles:
            handle.remove()


def _joined(layer: str, own: str) -> str:
    """Name in the model of a layer's own parameter."""
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
    """Put a call on the tape; a forward hook."""
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
        # a parameter that enters as it is has no function, but a place
        before=get_gradient_edge(entered).node if entered.requires_grad else None,
        shape=left.shape,
        foreign=any(now is not then for now, then in zip(own, weights, strict=True)),
    )
    tape.append(None if call.edge.node is call.before else call)


def _written_to(left: Tensor) -> Tensor:
    """The tensor whose place in the graph an operation in place on `left` goes through.

    For a view (the output of InstanceNorm, and of a linear layer on positions) it is the tensor
    that is viewed, where `left` is all of it in the same order.
    """
    base = left._base
    if base is None or base.numel() != left.numel() or not base.requires_grad:
        return left
    return base if base.is_contiguous() and left.is_contiguous() else left


class Rehearsals:
    """Layers that a module was seen to call with one row per record, by sequence of calls.

    A first axis that is as long as the batch may be so by chance: positions of a sequence, looked
    up once for all records, are as many as records in some batches. So a sequence of calls is
    trusted after a pass of another number of records in which the first axes followed it, and one
    that was caught is never trusted.
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
        """Return whether the calls of a module have one row per record, whatever their number.

        Args:
            module: the model.
            layers: that were taped.
            calls: of the pass in question.
            rehearse: runs the losses of another number of records, and returns that number.
            follows: from a tape and the number of records to its calls; None where one of them has
                no row per record.
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
        except Exception:  # of any model: it does not run with another number of records
            return None
        return follows(tape, records)


REHEARSALS = Rehearsals()
"""Of the modules of this process."""


def escapes(total: Tensor, calls: Sequence[TapedCall], params: Params) -> bool:
    """Return whether the losses depend on a parameter past the taped calls.

    The tape would then miss a part.
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
    """Calls that the losses depend on, by layer; the weights' gradients are not computed."""
    return went_back_to(total, calls, ())[0]


def went_back_to(
    total: Tensor, calls: Sequence[TapedCall], places: Sequence[GradientEdge]
) -> tuple[dict[str, list[LayerCall]], list[Tensor | None]]:
    """Calls that the losses depend on, by layer, and the gradients at more places in the graph.

    One backward pass; a gradient is None where the losses do not depend on the place.
    """
    flowed: dict[str, list[LayerCall]] = {}
    edges = [*(call.edge for call in calls), *places]
    if not edges or not total.requires_grad:
        return flowed, [None] * len(places)
    backs = torch.autograd.grad(total, edges, allow_unused=True)
    for call, back in zip(calls, backs[: len(calls)], strict=True):
        if back is not None:
            own = back.reshape(call.shape)  # the back of what was viewed has another shape
            flowed.setdefault(call.layer, []).append(LayerCall(call.entered, own, own))
    return flowed, list(backs[len(calls) :])
