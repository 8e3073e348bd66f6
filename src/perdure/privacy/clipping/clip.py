"""Per-record gradients and their clipped sum."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.privacy.clipping import row_loops
from perdure.privacy.clipping.norms import at_least_float32
from perdure.privacy.clipping.rules.base import record_slices, sum_of
from perdure.types import Params
from perdure.utils.chunking import filled_chunks

Rows = Callable[[Params, Mapping[str, Tensor]], Params]
"""Function from parameters and one record to the record's vector, such as its gradient, by name.

The tensors of the record have no batch dimension.
"""

LARGEST_PASS = 256
PASS_NUMBERS = 2**27
"""Most numbers that a vectorised pass may hold: this bounds memory, and privacy does not change."""

SMALLEST = 2.0**-100
"""Smallest clip factor other than 0; below 2^-126 float32 has few digits and a row could be too
long.
"""

WITHIN = "within clip norm"
"""Name of the sum that counts how many records had a norm within the clip norm."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Clipping of the vector of each record to an L2 norm of at most C.

    Guarantee: the L2 norm of a clipped vector, over all names except `WITHIN`, is at most `norm`. A
    record adds 1/2 or -1/2 to `WITHIN`.

    Args:
        norm: the bound C.
        per_layer: clip each of the L layers separately, to C / sqrt(L). A layer is a module with
            parameters of its own.
        steps: number of grid steps in the bound C. Every clipped row is rounded to the grid, so
            that sums are exact. 0 for no grid.
        counted: also return the sum `WITHIN`: 1/2 for each record whose norm is at most C, -1/2 for
            each other record (Andrew et al. 2021, section 2.2). One record changes it by 1/2.
    """

    norm: float
    per_layer: bool = False
    counted: bool = False
    steps: int = 0

    def factors(self, squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the (n,) clip factors of each layer from the (n,) squared norms of all layers."""
        if self.per_layer:
            bound = self.norm / math.sqrt(len(squares))
            return {layer: clip_factors(square, bound) for layer, square in squares.items()}
        return dict.fromkeys(squares, clip_factors(sum_of(list(squares.values())), self.norm))

    def count(self, squares: Mapping[str, Tensor]) -> Params:
        """Count the records whose norm is at most C, for the sum `WITHIN` (see `Clip`).

        Args:
            squares: layer to (n,) squared norms.

        Returns:
            A dict from `WITHIN` to a float64 scalar; an empty dict if `counted` is False.
        """
        if not self.counted:
            return {}
        within = sum_of(list(squares.values())) <= self.norm**2
        return {WITHIN: (within.double() - 0.5).sum()}


class NotFiniteError(Exception):
    """Some records have gradients with NaN or infinity; leave these records out and call again.

    Args:
        rows: (n,) True for such a record.
    """

    def __init__(self, rows: Tensor) -> None:
        super().__init__(f"{int(rows.sum())} rows are not finite")
        self.rows = rows


def layer_of(name: str) -> str:
    """Return the name of the layer that has the parameter of this name."""
    return name.rpartition(".")[0]


def clip_factors(squared_norms: Tensor, clip_norm: float) -> Tensor:
    """(n,) factors min(1, C / norm), so that no row is longer than C; 0 if a norm is not finite.

    A factor below `SMALLEST` becomes 0. Norms are computed in float32 or wider, whatever the
    precision of the rows.
    """
    norms = at_least_float32(squared_norms).sqrt()
    factors = (clip_norm / norms).clamp(max=1.0)  # 1 for a norm of 0, as C / 0 is infinite
    # the factor is 0 for an infinite norm, and also for NaN
    return torch.where(factors >= SMALLEST, factors, 0.0)


def clip_rows(rows: Params, clip: Clip) -> Params:
    """Scale the vector of each record so that its norm is within the bound of the clip.

    Args:
        rows: name to (n, ...), one row per record.
    """
    return scaled(rows, clip.factors(squared_norms(rows)))


def squared_norms(rows: Params) -> dict[str, Tensor]:
    """Compute the (n,) squared L2 norms of per-record rows, by layer, in float64."""
    squares: dict[str, list[Tensor]] = {}
    compiled = row_loops.takes(rows)
    for name, row in rows.items():
        own = _by_loop(row) if compiled else _by_torch(row)
        squares.setdefault(layer_of(name), []).append(own)
    return {layer: sum_of(parts) for layer, parts in squares.items()}


def _by_loop(row: Tensor) -> Tensor:
    """Return (n,) squared norms of one tensor's rows, by the compiled loops."""
    squares = torch.zeros(len(row), dtype=torch.float64)
    row_loops.row_loops().add_squares(row_loops.table_of(row), squares.numpy())
    return squares


def _by_torch(row: Tensor) -> Tensor:
    """Return (n,) squared norms of one tensor's rows, by torch."""
    table = row.unsqueeze(-1).flatten(1)
    norms: Tensor = torch.linalg.vector_norm(table, dim=1, dtype=torch.float64)
    return norms.square()


def scaled(rows: Params, factors: Mapping[str, Tensor]) -> Params:
    """Rows times the (n,) factors of their layers; 0 for a row with factor 0, even with NaN.

    A factor is 0 or at least `SMALLEST`, so that float32 can hold it, and 0 if a norm is not
    finite.
    """
    silent = {layer: factor == 0 for layer, factor in factors.items()}
    silenced = {layer for layer, rows_at in silent.items() if bool(rows_at.any())}
    result = {}
    for name, row in rows.items():
        layer = layer_of(name)
        shape = (-1, *[1] * (row.dim() - 1))
        product = row * factors[layer].to(at_least_float32(row).dtype).view(shape)
        if layer in silenced:
            product = product.masked_fill(silent[layer].view(shape), 0.0)
        result[name] = product.to(row.dtype)
    return result


def per_pass(params: Params) -> int:
    """Number of records whose vectors, each of the size of `params`, are computed at once.

    It is at most 256, and such that the vectors take about 0.5 GB.
    """
    size = sum(value.numel() for value in params.values())
    return min(LARGEST_PASS, max(1, PASS_NUMBERS // max(1, size)))


# only `rows` uses gradients; otherwise each pass would be kept for a second derivative
@torch.no_grad()
def clipped_sum(
    rows: Rows, params: Params, tensors: Mapping[str, Tensor], clip: Clip, chunk: int
) -> Params | None:
    """Sum of clip(rows(record), C) over all records; None if there is no record.

    Guarantee: adding or removing one record changes the result by at most `clip.norm` in L2 norm
    (and `WITHIN` by 1/2).

    Args:
        rows: function from the parameters and one record to the record's vector.
        params: parameters by name.
        tensors: the batch, name to (n, ...).
        clip: bound on each row.
        chunk: records per vectorised pass; it limits memory and does not change the result.
    """
    total: Params | None = None
    each = torch.func.vmap(rows, in_dims=(None, 0), randomness="different")
    # the rounding of a row depends on the size of its chunk, so the last chunk is filled up
    for full, count in filled_chunks(tensors, chunk):
        vectors = each(params, full)
        clipped = sum_of_clipped({n: v[:count] for n, v in vectors.items()}, clip)
        total = (
            clipped
            if total is None
            else {name: total[name] + value for name, value in clipped.items()}
        )
    return total


def sum_of_clipped(rows: Params, clip: Clip) -> Params:
    """Clipped sum of rows that are already computed, in float64 if the clip has a grid.

    Guarantee: on a grid, a row is added as integers whose L2 norm was checked, and integers below
    2^53 add up exactly in float64, in any order. So a record moves the sum by the norm of its own
    row, at most C plus half a grid step in every coordinate.
    """
    squares = squared_norms(rows)
    factors = clip.factors(squares)
    if not clip.steps:
        clipped = scaled(rows, factors)
        return {name: row.sum(0) for name, row in clipped.items()} | clip.count(squares)
    sums = {name: row.new_zeros(row.shape[1:], dtype=torch.float64) for name, row in rows.items()}
    scales = {n: factors[layer_of(n)].double() * (clip.steps / clip.norm) for n in rows}
    numbers = sum(value.numel() for value in sums.values())
    longest = (clip.steps + math.sqrt(numbers) / 2) ** 2
    if row_loops.takes(rows):
        _add_by_loop(rows, scales, longest, sums)
    else:
        for piece in record_slices(len(next(iter(rows.values()))), numbers):
            part = {name: row[piece] for name, row in rows.items()}
            _add_by_torch(part, {n: scale[piece] for n, scale in scales.items()}, longest, sums)
    step = clip.norm / clip.steps
    return {name: value * step for name, value in sums.items()} | clip.count(squares)


def _add_by_torch(rows: Params, scales: Params, longest: float, sums: Params) -> None:
    """Add rows, rounded to whole grid steps, to the sums.

    A row that is longer than its bound is left out; no clipped row is.

    Args:
        rows: name to (n, ...).
        scales: name to (n,) factors from the unclipped row to grid steps of the clipped row.
        longest: squared norm of the longest row that is allowed, in grid steps.
        sums: sums by name, which the rows are added to.
    """
    units: Params = {}
    for name, row in rows.items():
        scale = scales[name].view(-1, *[1] * (row.dim() - 1))
        whole = (row.double() * scale).round_()
        if bool((scale == 0).any()):  # a row with scale 0 may contain NaN
            whole.masked_fill_(scale == 0, 0.0)
        units[name] = whole.unsqueeze(-1).flatten(1)
    squares = sum_of([table.square().sum(1) for table in units.values()])
    inside = (squares <= longest).double()
    for name, table in units.items():
        # integers times 0 or 1, so the sum is exact in any order
        sums[name] += (inside @ table).view(sums[name].shape)


def _add_by_loop(rows: Params, scales: Params, longest: float, sums: Params) -> None:
    """Add rows to sums that are 0 before, like `_add_by_torch` but with the compiled loops."""
    loops = row_loops.row_loops()
    squares = torch.zeros(len(next(iter(scales.values()))), dtype=torch.float64)
    for name, row in rows.items():
        total = sums[name].view(-1).numpy()
        loops.add_grid_rows(row_loops.table_of(row), scales[name].numpy(), total, squares.numpy())
    inside = squares <= longest
    if not bool(inside.all()):  # does not happen for a clipped row; then add again without it
        for value in sums.values():
            value.zero_()
        kept = {name: torch.where(inside, scale, 0.0) for name, scale in scales.items()}
        _add_by_loop(rows, kept, math.inf, sums)
