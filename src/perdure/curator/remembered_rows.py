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
from perdure.utils.chunking import row_slices
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
        if one_by_one:
            parts = [rows_one_by_one(remember, forward, rows)]
        else:
            # rows that lie in a file are read a piece at a time
            parts = [remember(forward, rows.take(at)) for at in row_slices(rows.inputs)]
    stored = parts[0]
    if len(parts) > 1:
        stored = {name: torch.cat([part[name] for part in parts]) for name in stored}
    return replace(rows, stored={name: value.detach() for name, value in stored.items()})


def ranked_by(forward: Forward, rows: Batch, selection: str, task: Task) -> Tensor:
    """Features (n, f) of the rows for herding, else their losses (n,) over all outputs."""
    ask = forward.features if selection == "herding" else forward
    with torch.no_grad(), evaluating(forward.module):
        starts = range(0, max(1, len(rows)), CHUNK)
        answers = torch.cat([ask(rows.inputs[start : start + CHUNK]) for start in starts])
    return answers.flatten(1) if selection == "herding" else task.losses(answers, rows.labels)
