"""What may be asked of a curator: functions that give one row per record.

A function of the user's gives rows, and the curator clips them. `Gram`, `SquaredGradient` and its
kin know a faster way to their sum, clipped or not. Only they may clip for themselves, and they do
so with the curator's own factors.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from perdure.contract.forward import Forward
from perdure.data.records import Batch
from perdure.privacy.clipping.clip import Clip, clipped_sum, per_pass
from perdure.queries.gram import Gram
from perdure.queries.grouped_gradients import GroupedGradient
from perdure.queries.per_record import CHUNK, Query, add_to, as_params, rows_of
from perdure.queries.squared_gradients import AbsoluteGradient, SquaredGradient
from perdure.types import Params
from perdure.utils.chunking import chunks

SUMMED = (SquaredGradient, AbsoluteGradient, GroupedGradient)
"""Queries that may clip for themselves, besides `Gram`; not their subclasses, which could clip
otherwise.
"""


def exact_sum(query: Query, forward: Forward, batch: Batch, chunk: int) -> Params:
    """Sum of the query's rows over the batch, in pieces of at most `chunk` records."""
    if isinstance(query, Gram):
        return query.exact(forward, batch, chunk)
    total: Params = {}
    if isinstance(query, SquaredGradient):
        params = forward.params or {
            name: value.detach() for name, value in forward.module.named_parameters()
        }
        total = query.summed(forward.module, params, batch.tensors()) or {}
        chunk = min(chunk, per_pass(params))  # each row is as large as the parameters
    for piece in () if total else chunks(batch.tensors(), chunk):
        for name, rows in as_params(query(forward, Batch.from_tensors(piece))).items():
            add_to(total, name, rows.sum(0).detach())
    return total


def bounded_sum(
    query: Query, module: nn.Module, params: Params, tensors: Mapping[str, Tensor], clip: Clip
) -> Params | None:
    """Sum over the records of the query's rows, each clipped; None when there is no record.

    Guarantee: one record moves it by at most `clip.norm` in L2 norm, whatever the query does.
    """
    # not isinstance: a class of the user's could clip otherwise; its rows are clipped here
    if type(query) is Gram:
        return query.clipped(module, params, tensors, clip)
    if isinstance(query, SquaredGradient) and type(query) in SUMMED:
        total = query.summed(module, params, tensors, clip)
        if total:
            return total
    return clipped_sum(rows_of(query, module), params, tensors, clip, per_pass(params))


def shapes_of(
    query: Query, forward: Forward, tensors: Mapping[str, Tensor]
) -> dict[str, torch.Size]:
    """Shapes of one row, from a synthetic record like those of `tensors`.

    An empty partition still gets its noise.
    """
    blank = {
        n: torch.zeros(1, *t.shape[1:], dtype=t.dtype, device=t.device) for n, t in tensors.items()
    }
    if isinstance(query, Gram):
        return query.shapes(forward, Batch.from_tensors(blank))
    answer = as_params(query(forward, Batch.from_tensors(blank)))
    return {name: rows.shape[1:] for name, rows in answer.items()}


def evaluate_on_synthetic(query: Query, forward: Forward, batch: Batch) -> Params:
    """What the query makes of synthetic records, without rows of d^2 numbers.

    It tells one question from another.
    """
    return (
        query.parts(forward, batch)
        if isinstance(query, Gram)
        else exact_sum(query, forward, batch, CHUNK)
    )
