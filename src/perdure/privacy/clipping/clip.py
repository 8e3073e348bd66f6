"""Per-record gradients and their clipped sum.

The only place where a record's influence is bounded.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.privacy.clipping.rules.base import sum_of
from perdure.types import Params
from perdure.utils.chunking import chunks

Rows = Callable[[Params, Mapping[str, Tensor]], Params]
"""(parameters, tensors of ONE record without batch dimension) -> that record's vector, by name."""

LARGEST_PASS = 256
PASS_NUMBERS = 2**27
"""Numbers that a vectorised pass may hold; they bound memory, not the accounting."""

WITHIN = "within clip norm"
"""Name under which a counted clip adds up how many records it left as they were."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """How a record's vector is bounded.

    Guarantee: its L2 norm, all names but `WITHIN` together, is at most `norm`; what it adds to
    `WITHIN` is 1/2 or -1/2.

    Args:
        norm: the bound C.
        per_layer: bound each of the L layers by C / sqrt(L) by itself. A layer is a module with
            parameters of its own.
        counted: also sum, as `WITHIN`, 1/2 for a record whose norm is at most C and -1/2 for
            another (Andrew et al. 2021, section 2.2): one record moves it by 1/2.
    """

    norm: float
    per_layer: bool = False
    counted: bool = False

    def factors(self, squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Layer to (n,) scales, from each layer's (n,) squared norms."""
        if self.per_layer:
            bound = self.norm / math.sqrt(len(squares))
            return {layer: clip_factors(square, bound) for layer, square in squares.items()}
        return dict.fromkeys(squares, clip_factors(sum_of(list(squares.values())), self.norm))

    def count(self, squares: Mapping[str, Tensor]) -> Params:
        """What the records add to `WITHIN`; nothing where it is not asked for."""
        if not self.counted:
            return {}
        within = sum_of(list(squares.values())) <= self.norm**2
        return {WITHIN: (within.float() - 0.5).sum()}


def layer_of(name: str) -> str:
    """Layer that a parameter belongs to."""
    return name.rpartition(".")[0]


def clip_factors(squared_norms: Tensor, clip_norm: float) -> Tensor:
    """(n,) min(1, C / norm), and 0 for a row whose norm is not finite, so that no row can exceed C.

    Norms are computed in float32 whatever the precision of the rows.
    """
    norms = squared_norms.float().sqrt()
    factors = (clip_norm / norms.clamp(min=1e-30)).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))


def clip_rows(rows: Params, clip: Clip) -> Params:
    """Scale each record's vector into its bound.

    Args:
        rows: name to (n, ...), one row per record.
    """
    return scaled(rows, clip.factors(squared_norms(rows)))


def squared_norms(rows: Params) -> dict[str, Tensor]:
    """Layer to (n,) squared L2 norms, in float32."""
    squares: dict[str, list[Tensor]] = {}
    for name, row in rows.items():
        squares.setdefault(layer_of(name), []).append(
            row.float().unsqueeze(-1).flatten(1).square().sum(1)
        )
    return {layer: sum_of(parts) for layer, parts in squares.items()}


def scaled(rows: Params, factors: Mapping[str, Tensor]) -> Params:
    """Rows times their layer's factors (n,); what is not a number becomes 0."""
    clean = {
        name: torch.nan_to_num(row, nan=0.0, posinf=0.0, neginf=0.0) for name, row in rows.items()
    }
    return {
        n: r * factors[layer_of(n)].view(-1, *[1] * (r.dim() - 1)).to(r.dtype)
        for n, r in clean.items()
    }


def per_pass(params: Params) -> int:
    """Records whose vectors, each of the size of `params`, are formed at once.

    At most 256, and about 0.5 GB.
    """
    size = sum(value.numel() for value in params.values())
    return min(LARGEST_PASS, max(1, PASS_NUMBERS // max(1, size)))


# only `rows` differentiates; without this every pass would be kept for a second derivative
@torch.no_grad()
def clipped_sum(
    rows: Rows, params: Params, tensors: Mapping[str, Tensor], clip: Clip, chunk: int
) -> Params | None:
    """Sum over records of clip(rows(record), C), or None when there is no record.

    Guarantee: adding or removing one record changes the result by at most `clip.norm` in L2 norm
    (and `WITHIN` by 1/2).

    Args:
        rows: the query for one record.
        tensors: name to (n, ...), the batch.
        chunk: records per vectorised pass; bounds memory only.
    """
    total: Params | None = None
    for piece in chunks(tensors, chunk):
        vectors = torch.func.vmap(rows, in_dims=(None, 0), randomness="different")(params, piece)
        clipped = sum_of_clipped(vectors, clip)
        total = (
            clipped
            if total is None
            else {name: total[name] + value for name, value in clipped.items()}
        )
    return total


def sum_of_clipped(rows: Params, clip: Clip) -> Params:
    """Clipped sum of rows that are already there."""
    squares = squared_norms(rows)
    clipped = scaled(rows, clip.factors(squares))
    return {name: row.sum(0) for name, row in clipped.items()} | clip.count(squares)
