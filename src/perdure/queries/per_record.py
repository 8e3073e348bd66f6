"""Evaluate a query on each record alone, so that no row depends on another record."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from perdure.contract.curator import Losses, Of, Query
from perdure.contract.forward import Forward
from perdure.data.records import Batch, batch_of_one
from perdure.errors import DataError, PrivacyError
from perdure.privacy.clipping.clip import Clip, Rows, clipped_sum, per_pass
from perdure.types import Params
from perdure.utils.chunking import chunks, filled, filled_chunks

CHUNK = 1024
"""Number of records that are evaluated together; it only limits memory."""


def rows_of(query: Query, module: nn.Module) -> Rows:
    """Return a function that evaluates the query on one record, alone in a batch.

    It takes the parameters and one record's tensors, so its row depends on no other record.
    """

    def rows(params: Params, tensors: Mapping[str, Tensor]) -> Params:
        answer = as_params(query(Forward(module, params), batch_of_one(tensors)))
        return {name: value[0] for name, value in answer.items()}

    return rows


def rows_one_by_one(query: Query, forward: Forward, batch: Batch) -> Params:
    """Rows of the query, each record evaluated alone under `torch.func.vmap`.

    Without records, the rows are (0, ...) with the names that the query gives to a blank record.
    """
    params = {name: value.detach() for name, value in forward.module.named_parameters()}
    tensors = batch.tensors()
    some = tensors if len(batch) else filled(tensors)
    parts = list(asked_alone(rows_of(query, forward.module), params, some))
    return {name: torch.cat([part[name] for part in parts])[: len(batch)] for name in parts[0]}


def asked_alone(rows: Rows, params: Params, tensors: Mapping[str, Tensor]) -> Iterator[Params]:
    """Yield the results of `rows` for each record alone, `CHUNK` records at a time."""
    each = torch.func.vmap(rows, in_dims=(None, 0))
    for piece, count in filled_chunks(tensors, CHUNK):
        with explain_vmap_errors():
            answer = each(params, piece)
        yield {name: value[:count] for name, value in answer.items()}


def gradient_rows(losses: Losses, module: nn.Module) -> Rows:
    """Return a function that computes the gradient of one record's loss, alone in a batch."""

    def loss(params: Params, tensors: Mapping[str, Tensor]) -> Tensor:
        return losses(Forward(module, params), batch_of_one(tensors)).squeeze(0)

    return torch.func.grad(loss)


def exact_row_sum(query: Query, forward: Forward, batch: Batch, chunk: int) -> Params:
    """Sum of the query's rows, computed for `chunk` records at a time."""
    sums: Params = {}
    for piece in chunks(batch.tensors(), chunk):
        for name, rows in as_params(query(forward, Batch.from_tensors(piece))).items():
            add_to(sums, name, rows.sum(0).detach())
    return sums


def clipped_row_sum(
    query: Query, module: nn.Module, params: Params, tensors: Mapping[str, Tensor], clip: Clip
) -> Params | None:
    """Sum of the query's clipped rows, each record evaluated alone; None without records.

    Guarantee: one record changes the sum by at most `clip.norm` in L2 norm, for any query.
    """
    return clipped_sum(rows_of(query, module), params, tensors, clip, per_pass(params))


def as_params(answer: Tensor | Params) -> Params:
    """Give a single tensor the name `value`; return named tensors unchanged."""
    return {"value": answer} if isinstance(answer, Tensor) else answer


@torch.no_grad()
def numbers_of(of: Of, batch: Batch, *, alone: bool) -> Tensor:
    """Return (n,) numbers that the function `of` returns for the records.

    Args:
        of: function from a batch to (n,) numbers.
        batch: the records.
        alone: True to evaluate `of` on each record alone, under `torch.func.vmap`.

    Raises:
        DataError: if the shape is not one number per record.
        PrivacyError: if the function cannot be evaluated on one record alone.
    """

    def one(tensors: Mapping[str, Tensor]) -> Tensor:
        return _numbers(of, batch_of_one(tensors))[0]

    ask = (
        torch.func.vmap(one) if alone else lambda tensors: _numbers(of, Batch.from_tensors(tensors))
    )
    pieces = filled_chunks(batch.tensors(), CHUNK, fill=alone)
    with explain_vmap_errors():
        parts = [ask(piece)[:count] for piece, count in pieces]
    return torch.cat(parts) if parts else batch.labels.new_zeros(0)


@contextmanager
def explain_vmap_errors() -> Iterator[None]:
    """Context manager that turns an error of `torch.func.vmap` into a PrivacyError with a fix."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("vmap"):
            raise
        reason = str(error).partition(". ")[0]
        raise PrivacyError(
            "a query runs on each record alone, under torch.func.vmap, so it may not draw random "
            f"numbers or branch on values; use masks and torch.where ({reason})"
        ) from error


def _numbers(of: Of, batch: Batch) -> Tensor:
    answer = of(batch)
    if answer.shape != (len(batch),):
        raise DataError(
            f"`of` returns shape {tuple(answer.shape)} for {len(batch)} records; return one "
            "number per record, (n,)"
        )
    return answer


def add_to(sums: Params, name: str, value: Tensor) -> None:
    """Add a value to the sum with this name; if there is none, the value becomes the sum."""
    sums[name] = sums[name] + value if name in sums else value
