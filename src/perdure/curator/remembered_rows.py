"""Rows for memory, with the values that a strategy stores beside them."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from perdure.contract.forward import Forward
from perdure.data.records import Batch
from perdure.queries.per_record import CHUNK, rows_one_by_one
from perdure.tasks import Task
from perdure.types import Params
from perdure.utils.modules import evaluating

Remember = Callable[[Forward, Batch], Params]
"""(forward, batch) -> tensors (n, ...) by name, one row of each to be stored with every record."""


def remembered(
    rows: Batch, remember: Remember, forward: Forward, *, one_by_one: bool = False
) -> Batch:
    """Rows with the tensors that `remember` gives for them, the model in evaluation mode.

    Args:
        rows: to be stored.
        remember: from the model and rows to tensors with one row each.
        forward: the model at the present parameters.
        one_by_one: evaluate each row in a batch of one, so that the tensors stored with it depend
            on no other record (needed under privacy). `remember` then runs without rows, too, on a
            blank one: an error would tell that there are none.
    """
    with torch.no_grad(), evaluating(forward.module):
        stored = rows_one_by_one(remember, forward, rows) if one_by_one else remember(forward, rows)
    return replace(rows, stored={name: value.detach() for name, value in stored.items()})


def ranked_by(forward: Forward, rows: Batch, selection: str, task: Task) -> Tensor:
    """Features (n, f) of the rows for herding, else their losses (n,) over all outputs."""
    ask = forward.features if selection == "herding" else forward
    with torch.no_grad(), evaluating(forward.module):
        answers = torch.cat([ask(piece) for piece in torch.split(rows.inputs, CHUNK)])
    return answers.flatten(1) if selection == "herding" else task.losses(answers, rows.labels)
