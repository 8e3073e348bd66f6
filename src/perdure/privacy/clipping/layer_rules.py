"""Norms and clipped sums of per-record gradients, one rule a kind of layer.

With a_t what entered a layer at position t and d_t what came back to its output, a record's
gradient of the weight is sum_t d_t a_t^T. There are three ways to its norm and to the clipped sum:

- one position: |a| |d|, and D^T diag(c) A, one matrix product (Goodfellow 2015, "Efficient
  per-example gradient computations");
- ghost, for few positions of a large layer: |sum_t d_t a_t^T|^2 = sum_ts (a_t . a_s)(d_t . d_s),
  and the weighted sum over records and positions (Li, Tramer, Liang and Hashimoto 2022, section 4;
  Bu, Mao and Xu 2022 for convolutions);
- rows, for the others: the gradients themselves, a cacheful at a time, and a matrix-vector product
  with them.

Whatever flowed, norms and sums are taken in float32, or in float64 where it was that. Numbers of
half precision are used as they flowed; but a sum rounded to half precision would move by more than
the clip norm.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.models.cosine_head import CosineHead, directions, reciprocal_lengths
from perdure.privacy.clipping.clip import sum_of
from perdure.types import Params

ROWS_AT_ONCE = 64
"""Largest number of records whose gradients are formed at a time."""

NUMBERS_AT_ONCE = 2**20
"""Numbers (4 MiB) that are formed at a time: they stay in the processor's cache."""

KEPT_NUMBERS = 2**24
"""Numbers (64 MiB) of one layer's per-record gradients that are kept instead of formed again."""

GHOST_COST = 2
"""Time of one multiplication of a ghost norm in those of forming a row; measured."""

SLACK = 2.0**-22
"""Share of (sum_t |a_t| |d_t|)^2 that a ghost norm's square is rounded up by, four times float32's
precision.

Where a record's positions cancel, rounding hides what is left of them, and too small a norm would
not bound it.
"""


@dataclass(eq=False)
class LayerCall:
    """One call of a layer: what entered it, what left it, and the loss's gradient there.

    (n, ...) each.
    """

    entered: Tensor
    left: Tensor
    back: Tensor = field(default_factory=lambda: torch.empty(0))

    def flowed(self) -> tuple[Tensor, Tensor]:
        """The numbers that flowed in and back.

        Under autocast the layer saw its input in its output's precision.
        """
        return at_least_float32(self.entered.to(self.back.dtype)), at_least_float32(self.back)

    def of(self, piece: slice) -> "LayerCall":
        """The use by some of the records."""
        return LayerCall(self.entered[piece], self.left, self.back[piece])


class Rule(Protocol):
    """Norms and weighted sums of the per-record gradients of one layer, over all its uses."""

    def squared_norms(self) -> Tensor:
        """(n,) squared L2 norm of each record's gradient in this layer, in float32 or wider."""

    def weighted(self, factors: Tensor) -> Params:
        """Sum over records of factor times gradient, by the layer's own parameter names.

        It is in float32 or wider.
        """


def at_least_float32(x: Tensor) -> Tensor:
    """Float32, or float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def squared_lengths(rows: Tensor) -> Tensor:
    """(n,) squared L2 norms of (n, ...), in two stages.

    Over millions of numbers one stage loses three digits.
    """
    inner = torch.linalg.vector_norm(rows.flatten(2), dim=2) if rows.dim() > 2 else rows
    squares: Tensor = torch.linalg.vector_norm(inner, dim=1).square()
    return squares


def record_slices(n: int, numbers: int) -> list[slice]:
    """Slices of n records, `numbers` numbers each.

    About equally long, so that few lengths occur.
    """
    most = min(ROWS_AT_ONCE, max(1, NUMBERS_AT_ONCE // max(1, numbers)))
    rows = -(-n // -(-n // most))
    return [slice(start, start + rows) for start in range(0, n, rows)]


# --------------------------------------------------------------------------- rows


class RowsRule:
    """Rows that are there, name to (n, ...)."""

    def __init__(self, rows: Params) -> None:
        self.rows = rows

    def squared_norms(self) -> Tensor:
        """See `Rule`."""
        return sum_of([squared_lengths(at_least_float32(row)) for row in self.rows.values()])

    def weighted(self, factors: Tensor) -> Params:
        """See `Rule`."""
        wider = {name: at_least_float32(row) for name, row in self.rows.items()}
        return {n: (factors.to(r.dtype) @ r.flatten(1)).view(r.shape[1:]) for n, r in wider.items()}


class FormedRule(ABC):
    """Rows formed a piece at a time: what is summed is, number by number, what was measured.

    Args:
        n: records.
        numbers: in one record's row.
    """

    def __init__(self, n: int, numbers: int) -> None:
        self.n = n
        self.numbers = numbers
        self.kept: list[RowsRule] = []

    @abstractmethod
    def formed(self, piece: slice) -> Params:
        """Rows of a piece of the records."""

    def finished(self, sums: Params) -> Params:
        """Sums of rows in the shapes of the parameters."""
        return sums

    def squared_norms(self) -> Tensor:
        """See `Rule`; the rows are kept for `weighted` where they are few."""
        squares = []
        for piece in record_slices(self.n, self.numbers):
            rule = RowsRule(self.formed(piece))
            squares.append(rule.squared_norms())
            self.kept += [rule] if self.n * self.numbers <= KEPT_NUMBERS else []
        return torch.cat(squares)

    def weighted(self, factors: Tensor) -> Params:
        """See `Rule`."""
        sums: Params = {}
        for i, piece in enumerate(record_slices(self.n, self.numbers)):
            rule = self.kept[i] if self.kept else RowsRule(self.formed(piece))
            part = rule.weighted(factors[piece])
            sums = {name: sums[name].add_(value) for name, value in part.items()} if sums else part
        return self.finished(sums)


def ghost_norms(grams: Callable[[slice], tuple[Tensor, Tensor]], n: int, numbers: int) -> Tensor:
    """(n,) sum_ts (a_t . a_s)(d_t . d_s), rounded up.

    Args:
        grams: from a piece of the records to the inner products of their a and of their d, each (m,
            T, T).
        n: records.
        numbers: formed for one of them.
    """
    squares = []
    for piece in record_slices(n, numbers):
        entered, back = grams(piece)
        lengths = entered.diagonal(dim1=1, dim2=2) * back.diagonal(dim1=1, dim2=2)
        slack = SLACK * lengths.clamp(min=0.0).sqrt().sum(1).square()
        squares.append((entered.mul_(back).sum((1, 2)) + slack).clamp(min=0.0))
    return torch.cat(squares)


# --------------------------------------------------------------------------- linear layers


def linear_rule(layer: nn.Module, uses: list[LayerCall]) -> Rule:
    """(n, ..., in) to (n, ..., out), the cheapest way; several uses are positions side by side."""
    has_bias = layer.bias is not None
    if len(uses) == 1 and uses[0].back.dim() == 2:
        return LinearOuter(uses[0], has_bias)
    use = _joined(uses)
    positions = use.back.shape[1]
    ins = use.entered.shape[2]
    outs = use.back.shape[2]
    ghost = GHOST_COST * positions * (ins + outs) < ins * outs
    return LinearGhost(use, has_bias) if ghost else LinearRows(use, has_bias)


def _joined(uses: list[LayerCall]) -> LayerCall:
    """All uses' positions, (n, positions, k)."""
    entered = [use.entered.to(use.back.dtype) for use in uses]
    parts = [
        [x.flatten(1, -2) if x.dim() > 2 else x[:, None] for x in xs]
        for xs in (entered, [u.back for u in uses])
    ]
    whole = [part[0] if len(part) == 1 else torch.cat(part, 1) for part in parts]
    return LayerCall(whole[0], whole[1], whole[1])


class LinearOuter:
    """One position: the gradient is the outer product d a^T."""

    def __init__(self, use: LayerCall, has_bias: bool) -> None:
        self.entered, self.back = use.flowed()
        self.has_bias = has_bias

    def squared_norms(self) -> Tensor:
        """See `Rule`."""
        a = squared_lengths(self.entered)
        d = squared_lengths(self.back)
        return torch.addcmul(d, a, d) if self.has_bias else a * d

    def weighted(self, factors: Tensor) -> Params:
        """See `Rule`."""
        back = self.back * factors.to(self.back.dtype)[:, None]
        return {"weight": back.mT @ self.entered} | ({"bias": back.sum(0)} if self.has_bias else {})


class LinearRows(FormedRule):
    """Small layers, or many positions."""

    def __init__(self, use: LayerCall, has_bias: bool) -> None:
        self.use = use
        self.has_bias = has_bias
        super().__init__(len(use.back), use.entered.shape[2] * use.back.shape[2])

    def formed(self, piece: slice) -> Params:
        """See `FormedRule`."""
        a, d = self.use.of(piece).flowed()
        return {"weight": d.mT @ a} | ({"bias": d.sum(1)} if self.has_bias else {})


class LinearGhost:
    """Few positions of a large layer."""

    def __init__(self, use: LayerCall, has_bias: bool) -> None:
        self.use = use
        self.bias = at_least_float32(use.back).sum(1) if has_bias else None

    def squared_norms(self) -> Tensor:
        """See `Rule`."""
        n, positions = self.use.back.shape[:2]
        norms = ghost_norms(self._grams, n, positions**2)
        return norms if self.bias is None else norms + squared_lengths(self.bias)

    def weighted(self, factors: Tensor) -> Params:
        """See `Rule`."""
        a, d = self.use.flowed()
        factors = factors.to(d.dtype)
        sums = {"weight": (d * factors[:, None, None]).flatten(0, 1).mT @ a.flatten(0, 1)}
        return sums if self.bias is None else sums | {"bias": factors @ self.bias}

    def _grams(self, piece: slice) -> tuple[Tensor, Tensor]:
        a, d = self.use.of(piece).flowed()
        return a @ a.mT, d @ d.mT


# --------------------------------------------------------------------------- cosine heads


class CosineRows(FormedRule):
    """Rows of a head that looks at angles: logits s <a, w_c>, with a and w_c of norm 1.

    With d what came back, a record's gradient of w_c before it was scaled to norm 1 is s d_c (a -
    <a, w_c> w_c) over its length, and that of s is sum_c d_c <a, w_c>; both add up over positions
    and uses.
    """

    def __init__(self, layer: nn.Module, uses: list[LayerCall]) -> None:
        assert isinstance(layer, CosineHead)
        self.use = _joined(uses)
        self.layer = layer
        super().__init__(len(self.use.back), layer.weight.numel())

    def formed(self, piece: slice) -> Params:
        """See `FormedRule`."""
        entered, back = self.use.of(piece).flowed()
        a = directions(entered)
        w = directions(self.layer.weight)
        angles = back * (a @ w.mT)
        rows = back.mT @ a - angles.sum(1)[:, :, None] * w
        return {
            "weight": self.layer.scale * reciprocal_lengths(self.layer.weight) * rows,
            "scale": angles.sum((1, 2))[:, None],
        }


# -------------------------------------------------------------------- embeddings and normalisations


class EmbeddingRule:
    """A record's gradient adds up where it uses a word more than once.

    |g|^2 = sum over equal words of d_t . d_s.
    """

    def __init__(self, layer: nn.Module, uses: list[LayerCall]) -> None:
        assert isinstance(layer, nn.Embedding)
        self.shape = layer.weight.shape
        n = len(uses[0].back)
        self.words = torch.cat([use.entered.reshape(n, -1) for use in uses], 1)
        back = torch.cat(
            [at_least_float32(use.back).reshape(n, -1, layer.embedding_dim) for use in uses], 1
        )
        padding = layer.padding_idx
        self.back = back if padding is None else back * (self.words != padding)[:, :, None]

    def squared_norms(self) -> Tensor:
        """See `Rule`."""
        n, positions = self.words.shape
        return ghost_norms(self._grams, n, positions**2)

    def weighted(self, factors: Tensor) -> Params:
        """See `Rule`."""
        back = self.back * factors.to(self.back.dtype)[:, None, None]
        return {
            "weight": back.new_zeros(self.shape).index_add_(
                0, self.words.flatten(), back.flatten(0, 1)
            )
        }

    def _grams(self, piece: slice) -> tuple[Tensor, Tensor]:
        words = self.words[piece]
        back = self.back[piece]
        return (words[:, :, None] == words[:, None, :]).to(back.dtype), back @ back.mT


def normalisation_rule(layer: nn.Module, uses: list[LayerCall]) -> Rule:
    """Scale and shift of a normalisation: few numbers a record."""
    names = [name for name, _ in layer.named_parameters()]

    def form(piece: slice) -> Params:
        parts = [_scale_and_shift(layer, *use.of(piece).flowed()) for use in uses]
        rows = {
            "weight": sum_of([scale for scale, _ in parts]),
            "bias": sum_of([shift for _, shift in parts]),
        }
        return {name: rows[name] for name in names}

    formed = [
        form(piece)
        for piece in record_slices(len(uses[0].back), sum(use.back[0].numel() for use in uses))
    ]
    return RowsRule({name: torch.cat([rows[name] for rows in formed]) for name in names})


def _scale_and_shift(layer: nn.Module, x: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over positions of d * normalised and of d, one row a record."""
    if isinstance(layer, nn.GroupNorm):
        normal = F.group_norm(x, layer.num_groups, eps=layer.eps)
        over = tuple(range(2, back.dim()))
    else:
        assert isinstance(layer, nn.LayerNorm)
        normal = F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
        over = tuple(range(1, back.dim() - len(layer.normalized_shape)))
    product = back * normal
    return (product.sum(over), back.sum(over)) if over else (product, back)
