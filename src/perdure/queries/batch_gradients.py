"""Gradients over the rows of a batch: their mean, or their clipped sum.

The clipped sum uses the fastest way that the model allows.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from perdure.contract.curator import Losses
from perdure.contract.forward import Forward
from perdure.data.records import Batch, filled_batch
from perdure.privacy.clipping.bookkeeping import clipped_gradient_sum
from perdure.privacy.clipping.clip import (
    WITHIN,
    Clip,
    NotFiniteError,
    clipped_sum,
    per_pass,
    sum_of_clipped,
)
from perdure.privacy.opacus.samplers import grad_sample_sum
from perdure.queries.per_record import gradient_rows
from perdure.types import Params
from perdure.utils.chunking import FEWEST_ROWS


def micro_batches(batch: Batch, size: int | None) -> Iterator[Batch]:
    """Yield micro-batches of at most `size` rows; the batch itself if it is small enough."""
    if size is None or len(batch) <= size:
        yield batch
        return
    for start in range(0, len(batch), size):
        yield batch.take(slice(start, start + size))


def mean_gradient(
    forward: Forward, losses: Losses, params: Params, batch: Batch, at_once: int | None
) -> tuple[Params, Tensor]:
    """Gradient of the mean loss of the valid rows, and losses whose mean is the mean loss.

    Args:
        at_once: number of rows of one pass through the model; None for all.

    Returns:
        The gradient, and the losses (n,) of all rows; if the batch has padding or was cut, their
        mean (). A step that nobody watches needs no mean, which takes a thirtieth of a small one.
    """
    total: list[Tensor] | None = None
    loss: Tensor | None = None
    for number, piece in enumerate(micro_batches(batch, at_once)):
        rows = losses(forward, piece)
        if batch.unpadded and rows.shape == batch.valid.shape:
            # to the bits of the sum over the count, by fewer operations
            part = rows.detach()
            weights = rows.new_full(rows.shape, 1 / max(1, len(batch)))
            grads = _gradients(rows, params, weights)
        else:
            part = (rows * piece.valid).sum() / batch.valid.sum()
            grads = _gradients(part, params)
        if total is None:
            total = grads
        elif number == 1:  # autograd may return one tensor twice, so the first sum is a new tensor
            total = list(torch._foreach_add(total, grads))
        else:
            torch._foreach_add_(total, grads)
        loss = part.detach() if loss is None else loss + part.detach()
    assert total is not None and loss is not None
    return dict(zip(params, total, strict=True)), loss


def _gradients(value: Tensor, params: Params, weights: Tensor | None = None) -> list[Tensor]:
    """Gradient of a value, or of the sum of its numbers by weights, for each parameter."""
    return list(
        torch.autograd.grad(
            value, list(params.values()), weights, allow_unused=True, materialize_grads=True
        )
    )


def clipped_gradient(
    forward: Forward,
    losses: Losses,
    params: Params,
    batch: Batch,
    clip: Clip,
    at_once: int | None,
    *,
    by_loop: bool = True,
    alone: bool = False,
) -> Params | None:
    """Sum over rows of clip(gradient of the row's loss), by the fastest method for the model.

    The method is book-keeping if every layer has a clipping rule, then the samplers of Opacus if
    they support the model, then record by record.

    A row whose gradient is NaN or infinite is left out of the sum. No error is raised, because an
    error would reveal that such a record exists.

    A batch of fewer than `FEWEST_ROWS` rows is filled up with copies of its first row. The copies
    are not part of the sum. They are needed because a kernel may round a row differently in a very
    small batch.

    Guarantee: adding or removing one row changes the sum by at most `clip.norm` in L2 norm. Every
    row is clipped separately, so micro-batches change only the memory in use.

    Args:
        forward: the model, with its own parameters.
        losses: function from (forward, batch) to one loss per row.
        params: parameters of the gradient, by name.
        batch: rows of the batch; each row is a record.
        clip: the bound on one row.
        at_once: number of rows in one pass through the model; None for all.
        by_loop: if `torch.func.vmap` cannot run the losses, differentiate one row after another; if
            False, raise the error of vmap.
        alone: always compute record by record, so that no row can depend on another.

    Returns:
        The sum by parameter name, or None if the batch is empty.
    """
    total: Params | None = None
    least = min(at_once or FEWEST_ROWS, FEWEST_ROWS)
    for piece in micro_batches(batch, at_once):
        part = None if alone else _from_batch(forward, losses, params, piece, clip, least)
        if part is None:
            part = _record_by_record(forward, losses, params, piece, clip, by_loop=by_loop)
        if total is None or part is None:
            total = part or total
        else:
            # in float64, so that rounding does not grow with the number of micro-batches
            total = {name: total[name].double() + value for name, value in part.items()}
    return total


def _record_by_record(
    forward: Forward, losses: Losses, params: Params, batch: Batch, clip: Clip, *, by_loop: bool
) -> Params | None:
    """Clipped sum of per-record gradients, by vmap if possible and by a loop if not.

    The code is tested before a run, but a batch may still behave differently from synthetic records
    (a row with NaN, rows that do not fit into memory). An error would come after the charge, and
    would reveal this property of the batch.
    """
    rows = gradient_rows(losses, forward.module)
    try:
        return clipped_sum(rows, params, batch.tensors(), clip, per_pass(params))
    except RuntimeError:
        if not by_loop:
            raise
    total: Params | None = None
    for i in range(len(batch)):
        loss = losses(forward, batch.take(slice(i, i + 1))).sum()
        grads = torch.autograd.grad(
            loss, list(params.values()), allow_unused=True, materialize_grads=True
        )
        row = {name: grad[None] for name, grad in zip(params, grads, strict=True)}
        part = sum_of_clipped(row, clip)
        total = part if total is None else {name: total[name] + part[name] for name in part}
    return total


def _from_batch(
    forward: Forward, losses: Losses, params: Params, rows: Batch, clip: Clip, least: int
) -> Params | None:
    """Clipped sum of gradients from whole-batch passes; None if no fast method fits the model.

    Rows that are not finite are left out, and the pass is repeated without them.

    Args:
        least: smallest number of rows in a pass; missing rows are filled with copies.
    """
    if not len(rows):
        return None
    while len(rows):
        count = len(rows)
        try:
            full = filled_batch(rows, least)
            part = _in_one_pass(forward, losses, params, full, count, clip, least)
            if part is not None and clip.counted:
                # remove the counts of the copies, whose gradient is 0 and so within the bound
                part[WITHIN] = part[WITHIN] - 0.5 * max(0, least - count)
            return part
        except NotFiniteError as found:
            bad = found.rows[:count]
            if not bool(bad.any()):
                return None  # only copies are not finite, and their losses were left out
            rows = rows.take(~bad)
    device = rows.inputs.device
    nothing = {n: torch.zeros(p.shape, device=device) for n, p in params.items()}
    return nothing | ({WITHIN: torch.zeros((), device=device)} if clip.counted else {})


def _in_one_pass(
    forward: Forward,
    losses: Losses,
    params: Params,
    rows: Batch,
    count: int,
    clip: Clip,
    least: int,
) -> Params | None:
    """Clipped sum of the gradients of the first `count` rows, from one pass over all rows."""

    def run() -> Tensor:
        every = losses(forward, rows)
        return every if count == len(rows) else every[:count]

    def rehearse() -> int:
        losses(forward, rows.take(slice(0, fewer)))
        return fewer

    fewer = least - 1  # another number of records, because a pass has `least` rows or more
    rehearsed = rehearse if fewer else None  # a single row depends on its record only
    module = forward.module
    part = clipped_gradient_sum(module, params, run, len(rows), clip, rehearsed)
    if part is None:
        part = grad_sample_sum(module, params, run, len(rows), clip, rehearsed)
    return part


def divided(total: Params, expected: float, params: Params) -> Params:
    """Divide a released sum by the expected number of rows, in the types of the parameters."""
    return {name: (value / expected).to(params[name].dtype) for name, value in total.items()}
