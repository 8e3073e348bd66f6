"""Per-record gradients and their clipped sum: the only place where a record's influence is bounded."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from perdure.records import Params

Rows = Callable[[Params, Mapping[str, Tensor]], Params]
"""(parameters, tensors of ONE record without batch dimension) -> that record's vector, by name."""

LARGEST_PASS = 256
PASS_NUMBERS = 2**27
"""Numbers that a vectorised pass may hold; they bound memory, not the accounting."""


def clip_factors(squared_norms: Tensor, clip_norm: float) -> Tensor:
    """(n,) min(1, C / norm), and 0 for a row whose norm is not finite, so that no row can exceed C.

    Norms are computed in float32 whatever the precision of the rows.
    """
    norms = squared_norms.float().sqrt()
    factors = (clip_norm / norms.clamp(min=1e-30)).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))


def clip_rows(rows: Params, clip_norm: float) -> Params:
    """Scale each record's whole vector, all names together, to L2 norm at most `clip_norm`.

    Args:
        rows: name to (n, ...), one row per record.
        clip_norm: bound C.
    """
    squared = torch.stack([row.float().unsqueeze(-1).flatten(1).square().sum(1) for row in rows.values()]).sum(0)
    factors = clip_factors(squared, clip_norm)
    clean = {name: torch.nan_to_num(row, nan=0.0, posinf=0.0, neginf=0.0) for name, row in rows.items()}
    return {n: row * factors.view(-1, *[1] * (row.dim() - 1)).to(row.dtype) for n, row in clean.items()}


def chunks(tensors: Mapping[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """Cut the rows into pieces of at most `size`; clipping is per record, so the sum does not change."""
    n = len(next(iter(tensors.values())))
    for start in range(0, n, size):
        yield {name: value[start : start + size] for name, value in tensors.items()}


def per_pass(params: Params) -> int:
    """Records whose vectors, each of the size of `params`, are formed at once: at most 256, and about 0.5 GB."""
    size = sum(value.numel() for value in params.values())
    return min(LARGEST_PASS, max(1, PASS_NUMBERS // max(1, size)))


@torch.no_grad()  # only `rows` differentiates; without this every pass would be kept for a second derivative
def clipped_sum(
    rows: Rows, params: Params, tensors: Mapping[str, Tensor], clip_norm: float, chunk: int
) -> Params | None:
    """Sum over records of clip(rows(record), C), or None when there is no record.

    Guarantee: adding or removing one record changes the result by at most `clip_norm` in L2 norm.

    Args:
        rows: the query for one record.
        tensors: name to (n, ...), the batch.
        chunk: records per vectorised pass; bounds memory only.
    """
    total: Params | None = None
    for piece in chunks(tensors, chunk):
        vectors = torch.func.vmap(rows, in_dims=(None, 0), randomness="different")(params, piece)
        clipped = {name: row.sum(0) for name, row in clip_rows(vectors, clip_norm).items()}
        total = clipped if total is None else {name: total[name] + value for name, value in clipped.items()}
    return total
