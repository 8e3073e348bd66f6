"""Per-record gradients of parameters outside of all layers with a rule, such as class tokens.

A model may add a parameter to the row of every record, concatenate the two, or multiply them. With
out_i = x_i + q for every record i, and q a view of the parameter, the gradient of record i's loss
with respect to q is the gradient at out_i, summed over the axes that q is broadcast over. The same
backward pass gives the gradients at `out` and those of the layers.

The graph of autograd shows if a parameter is used only in this way. Every path from the losses to
the parameter must end in views of the parameter (which read no record) below one of

- `x + q` and `x * q`, where q has no axis of records and x has one row per record;
- `q.expand(n, ...)` and `q.repeat(n, 1, ...)`, if their result is used only in one of the former or
  in `torch.cat` along another axis than the records', with an x that has one row per record.

A tensor has one row per record if it is the output of a layer with a rule (a condition of
book-keeping), or is computed from such a tensor by operations of a short list that do not change
the first axis. A first axis of the length of the batch alone proves nothing. In all other cases,
gradients are computed record by record.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from perdure.privacy.clipping.clip import layer_of
from perdure.privacy.clipping.norms import at_least_float32
from perdure.privacy.clipping.rules.base import FormedRows
from perdure.privacy.clipping.tape import TapedCall
from perdure.types import Params

MOST_SHARE = 0.5
"""Largest share of a model's numbers in parameters without a rule. Usually they are few; a model
above this share is clipped record by record at once, without a first attempt.
"""

VIEWS = frozenset(
    {
        "AliasBackward0",
        "CloneBackward0",
        "PermuteBackward0",
        "ReshapeAliasBackward0",
        "SelectBackward0",
        "SliceBackward0",
        "SqueezeBackward0",
        "SqueezeBackward1",
        "TBackward0",
        "TransposeBackward0",
        "UnsafeViewBackward0",
        "UnsqueezeBackward0",
        "ViewBackward0",
    }
)
"""Operations on one tensor that only change its shape or layout."""

RESHAPES = frozenset({"ReshapeAliasBackward0", "UnsafeViewBackward0", "ViewBackward0"})
"""Views that keep the order of the numbers: if the first axis keeps its length, rows are kept."""

ELEMENTWISE = frozenset(
    {
        "AliasBackward0",
        "CloneBackward0",
        "GeluBackward0",
        "LeakyReluBackward0",
        "NativeDropoutBackward0",
        "ReluBackward0",
        "SigmoidBackward0",
        "SiluBackward0",
        "TanhBackward0",
        "ToCopyBackward0",
    }
)
"""Operations that change each number of one tensor by itself."""

WITH_BROADCAST = frozenset({"AddBackward0", "MulBackward0"})
COPIES = frozenset({"ExpandBackward0", "RepeatBackward0"})


@dataclass(frozen=True, kw_only=True, eq=False)
class Use:
    """One place where a parameter, or a view q of it, is broadcast over the rows of all records.

    Args:
        name: name of the parameter in the model.
        param: the parameter.
        viewed: edge of the autograd graph at q, a view of the parameter.
        shape: shape of q.
        out: edge of the graph at the tensor with one row per record, whose gradient is needed.
        factor: tensor that q is multiplied with, one row per record; None if q is added or copied.
    """

    name: str
    param: Tensor
    viewed: GradientEdge
    shape: torch.Size
    out: GradientEdge
    factor: Tensor | None = None


def bare_parameters(layer: nn.Module, own: Params, total: int) -> bool:
    """Return True if the parameters of a module without a rule may be clipped as broadcasts.

    Args:
        layer: the module.
        own: trained parameters of the module.
        total: number of values in all trained parameters of the model.
    """
    containers = (nn.ParameterList, nn.ParameterDict)
    library = type(layer).__module__.partition(".")[0]
    if library in ("torch", "opacus") and type(layer) not in containers:
        return False  # such layers multiply inputs with their parameters
    full = all(value.dtype in (torch.float32, torch.float64) for value in own.values())
    return full and sum(value.numel() for value in own.values()) <= MOST_SHARE * total


def parameter_uses(
    total: Tensor, calls: Sequence[TapedCall], params: Params, records: int
) -> list[Use] | None:
    """Find every use of the parameters that the losses depend on.

    Args:
        total: sum of the losses.
        calls: calls of layers with a rule, whose outputs have one row per record.
        params: parameters by name in the model; none belongs to a layer with a rule.
        records: number of records in the batch.

    Returns:
        The uses; None if a parameter is also used in a way that this module does not support.
    """
    graph = Graph(total, calls, records)
    uses: list[Use] = []
    for name, param in params.items():
        for node in graph.leaves(param):
            found = graph.uses(name, param, node)
            if found is None:
                return None
            uses += found
    return uses


class Graph:
    """Graph of autograd from the losses down, without the operations inside layers with a rule.

    Args:
        total: sum of the losses.
        calls: calls of layers with a rule, whose outputs have one row per record.
        records: number of records in the batch.
    """

    def __init__(self, total: Tensor, calls: Sequence[TapedCall], records: int) -> None:
        self.records = records
        self.jumps = {call.edge.node: call for call in calls}
        self.above: dict[Node, list[Node]] = {}
        self.known: dict[Node, bool] = {}
        todo = [total.grad_fn]
        while todo:
            node = todo.pop()
            for below in () if node is None else self._below(node):
                if below not in self.above:
                    todo.append(below)
                self.above.setdefault(below, []).append(node)  # type: ignore[arg-type]

    def _below(self, node: Node) -> Iterable[Node]:
        """Return the nodes that a node passes gradients to, each once."""
        if node in self.jumps:
            before = self.jumps[node].before
            return () if before is None else (before,)
        return dict.fromkeys(below for below, _ in node.next_functions if below is not None)

    def leaves(self, param: Tensor) -> list[Node]:
        """Return the leaf nodes of a parameter in the graph."""
        return [node for node in self.above if getattr(node, "variable", None) is param]

    def uses(self, name: str, param: Tensor, node: Node) -> list[Use] | None:
        """Uses of a node's output, a view of a parameter; None if there is any other use."""
        found: list[Use] = []
        for user in self.above[node]:
            some = self._of(name, param, node, user)
            if some is None:
                return None
            found += some
        return found

    def _of(self, name: str, param: Tensor, node: Node, user: Node) -> list[Use] | None:
        """Uses of a view of a parameter by one operation; None for an unsupported operation."""
        if user in self.jumps or not _single(node) or not _single(user):
            return None
        kind = user.name()
        if kind in VIEWS:
            return self.uses(name, param, user)
        place = [below for below, _ in user.next_functions].index(node)
        shape = _shape(node)
        if kind in WITH_BROADCAST:
            fits = self._broadcast(user, place) and _rowless(shape, _shape(user))
        else:
            fits = kind in COPIES and self._copied(user, shape)
        if not fits:
            return None
        factor = None
        if kind == "MulBackward0":
            saved: Any = user
            factor = (saved._saved_other if place == 0 else saved._saved_self).detach()
        viewed = GradientEdge(node, 0)
        out = GradientEdge(user, 0)
        return [Use(name=name, param=param, viewed=viewed, shape=shape, out=out, factor=factor)]

    def _broadcast(self, node: Node, place: int) -> bool:
        """Return True if an operand is broadcast to another one, which has one row per record."""
        functions = node.next_functions
        if len(functions) != 2 or len(_shape(node)) < 2:
            return False
        saved: Any = node
        if node.name() == "AddBackward0" and place == 1 and saved._saved_alpha != 1:
            return False
        other, number = functions[1 - place]
        return self._has_rows(other, number) and _same_axes(other, node)

    def _copied(self, node: Node, shape: torch.Size) -> bool:
        """Return True if a tensor without records is copied once per record.

        The copies must then be used together with one row per record.
        """
        out = _shape(node)
        if out[:1] != (self.records,) or not _rowless(shape, out):
            return False
        padded = (1,) * (len(out) - len(shape)) + tuple(shape)
        if node.name() == "RepeatBackward0" and padded[1:] != tuple(out[1:]):
            return False  # copied along another axis, too
        return all(self._meets_rows(user, node) for user in self.above[node])

    def _meets_rows(self, user: Node, node: Node) -> bool:
        """Return True if an operation aligns the rows of a copied parameter with the records."""
        if user in self.jumps or not _single(user):
            return False
        if user.name() in RESHAPES and _shape(user)[0] == self.records:
            return all(self._meets_rows(after, user) for after in self.above[user])
        functions = user.next_functions
        places = [place for place, (below, _) in enumerate(functions) if below is node]
        if user.name() == "CatBackward0":
            others = [other for place, other in enumerate(functions) if place not in places]
            return _axis(user, "_saved_dim") > 0 and any(self._has_rows(*other) for other in others)
        fits = user.name() in WITH_BROADCAST and len(places) == 1 and _same_axes(node, user)
        return fits and self._broadcast(user, places[0])

    def _has_rows(self, node: Node | None, number: int) -> bool:
        """Return True if the output of a node has one row per record."""
        if node is None or number != 0 or not _single(node):
            return False
        if node not in self.known:
            rows = _shape(node)[:1] == (self.records,)
            self.known[node] = rows and (node in self.jumps or self._keeps_rows(node))
        return self.known[node]

    def _keeps_rows(self, node: Node) -> bool:
        """Return True if an operation has rows of records as input and keeps the first axis."""
        kind = node.name()
        functions = node.next_functions
        if kind == "CatBackward0":
            return _axis(node, "_saved_dim") > 0 and any(self._has_rows(*f) for f in functions)
        if kind in WITH_BROADCAST:
            return any(
                self._has_rows(below, number) and _same_axes(below, node)
                for below, number in functions
            )
        call = self.jumps.get(functions[0][0]) if len(functions) == 1 else None  # type: ignore[arg-type]
        if kind in RESHAPES and call is not None and call.shape == _shape(node):
            return True  # a layer computed on flattened rows, and this reshapes its output
        alone = len(functions) == 1 and self._has_rows(*functions[0])
        return alone and _first_axis_stays(node, _shape(functions[0][0]))


def _first_axis_stays(node: Node, entered: torch.Size) -> bool:
    """Return True if an operation on one tensor keeps the rows of its first axis."""
    kind = node.name()
    if kind in ELEMENTWISE:
        return True
    if kind in RESHAPES:
        return entered[0] == _shape(node)[0]
    if kind == "TransposeBackward0":
        return _axis(node, "_saved_dim0") > 0 and _axis(node, "_saved_dim1") > 0
    if kind == "PermuteBackward0":
        saved: Any = node
        return saved._saved_dims[0] % 2**64 in (0, 2**64 - len(entered))
    return kind in ("SliceBackward0", "UnsqueezeBackward0") and _axis(node, "_saved_dim") > 0


def _axis(node: Node, name: str) -> int:
    """Axis that an operation was given, counted from the first; -1 if it is not known."""
    axis = getattr(node, name, None)
    if not isinstance(axis, int):
        return -1
    signed = axis - 2**64 if axis >= 2**63 else axis  # torch gives a negative axis unsigned
    return signed if signed >= 0 else signed + len(_shape(node))


def _single(node: Node) -> bool:
    """Return True if a node has exactly one output tensor."""
    return len(_metadata(node)) == 1


def _shape(node: Node | None) -> torch.Size:
    """Shape of the output tensor of a node."""
    assert node is not None
    return torch.Size(_metadata(node)[0].shape)


def _metadata(node: Node) -> Sequence[Any]:
    found: Any = node
    metadata: Sequence[Any] = found._input_metadata
    return metadata


def _same_axes(operand: Node | None, result: Node) -> bool:
    """Return True if an operand has as many axes as the result, and as many rows."""
    own = _shape(operand)
    out = _shape(result)
    return len(own) == len(out) and own[0] == out[0]


def _rowless(shape: torch.Size, out: torch.Size) -> bool:
    """Return True if a tensor has no axis of records in a result, or one of length 1."""
    return len(shape) < len(out) or shape[0] == 1


class BroadcastRows(FormedRows):
    """Per-record gradients of the parameters of one module, over all uses of each parameter.

    Args:
        uses: each use with the gradient (n, ...) at its `out`.
    """

    def __init__(self, uses: Sequence[tuple[Use, Tensor]]) -> None:
        self.uses = uses
        self.shapes = {use.name: use.param.shape for use, _ in uses}
        super().__init__(len(uses[0][1]), sum(map(math.prod, self.shapes.values())))

    def finished(self, sums: Params) -> Params:
        """Give the sums the shapes of the parameters."""
        return {name: value.view(self.shapes[name]) for name, value in sums.items()}

    def formed(self, piece: slice) -> Params:
        """Compute the gradients of some records, by the parameters' names in the model."""
        rows: Params = {}
        for use, back in self.uses:
            own = _row(use, back, piece)
            own = own if own.dim() > 1 else own[:, None]  # the parameter is a single number
            rows[use.name] = rows[use.name] + own if use.name in rows else own
        return rows


def _row(use: Use, back: Tensor, piece: slice) -> Tensor:
    """(m, ...) gradients of some records with respect to a parameter, for one of its uses."""
    rows = at_least_float32(back[piece])
    if use.factor is not None:
        rows = rows * use.factor[piece].to(rows.dtype)
    ahead = max(1, back.dim() - len(use.shape))
    inner = use.shape[ahead - back.dim() :] if back.dim() > ahead else use.shape[:0]
    narrow = [ahead + i for i, length in enumerate(inner) if length == 1]
    over = [*range(1, ahead), *narrow]
    rows = (rows.sum(over) if over else rows).reshape(len(rows), *use.shape)
    if hasattr(use.viewed.node, "variable"):
        return rows
    (own,) = torch.autograd.grad(
        [use.viewed],
        [use.param],
        grad_outputs=[rows.to(use.param.dtype)],
        is_grads_batched=True,
        retain_graph=True,
    )
    return own


def rows_by_module(uses: Sequence[Use], backs: Sequence[Tensor | None]) -> dict[str, BroadcastRows]:
    """Group the uses of parameters by the name of the module that owns each parameter.

    Args:
        uses: uses of the parameters.
        backs: gradient at the `out` of each use; None if the losses do not depend on it.
    """
    found: dict[str, list[tuple[Use, Tensor]]] = {}
    for use, back in zip(uses, backs, strict=True):
        if back is not None:
            found.setdefault(layer_of(use.name), []).append((use, back))
    return {owner: BroadcastRows(own) for owner, own in found.items()}
