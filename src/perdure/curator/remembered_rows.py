"""Rows for memory, with the tensors that a strategy stores with them."""

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

NOTED_ROWS = "(whether it was noted)"
"""Key, in checkpoints, of the mask (n,) of rows whose stored tensors were already computed.

It has brackets, which no name from `remember` has.
"""

Remember = Callable[[Forward, Batch], Params]
"""Function from (forward, batch) to tensors (n, ...) by name, one row to store per record."""


def remembered(
    rows: Batch, remember: Remember, forward: Forward, *, one_by_one: bool = False
) -> Batch:
    """Rows with the tensors that `remember` computes for them, with the model in evaluation mode.

    Args:
        rows: rows to store.
        remember: function from the model and rows to tensors with one row each.
        forward: the model with the current parameters.
        one_by_one: evaluate each row in a batch of one, so that its stored tensors depend on no
            other record (needed under privacy). If there are no rows, `remember` runs on a blank
            row, because an error, or none, would otherwise reveal that there are no rows.
    """
    with torch.no_grad(), evaluating(forward.module):
        if one_by_one:
            parts = [rows_one_by_one(remember, forward, rows)]
        else:
            # rows that are stored in a file are read one piece at a time
            parts = [remember(forward, rows.take(at)) for at in row_slices(rows.inputs)]
    stored = parts[0]
    if len(parts) > 1:
        stored = {name: torch.cat([part[name] for part in parts]) for name in stored}
    return replace(rows, stored={name: value.detach() for name, value in stored.items()})


def ranked_by(forward: Forward, rows: Batch, selection: str, task: Task) -> Tensor:
    """Features (n, f) of the rows for herding; for other selections, their losses (n,)."""
    ask = forward.features if selection == "herding" else forward
    with torch.no_grad(), evaluating(forward.module):
        starts = range(0, max(1, len(rows)), CHUNK)
        answers = torch.cat([ask(rows.inputs[start : start + CHUNK]) for start in starts])
    return answers.flatten(1) if selection == "herding" else task.losses(answers, rows.labels)


def note_rows(noted: Params, new: Batch, at: Tensor, n: int) -> None:
    """Save the stored tensors of some rows; earlier saved values of these rows are replaced.

    Args:
        noted: values (n, ...) by name, and the mask `NOTED_ROWS`; it is changed.
        new: rows with their stored tensors, (k, ...).
        at: (k,) positions of the rows in the experience.
        n: number of rows of the experience.
    """
    if not noted:
        for name, value in new.stored.items():
            noted[name] = value.new_zeros(n, *value.shape[1:])
        noted[NOTED_ROWS] = torch.zeros(n, dtype=torch.bool, device=new.inputs.device)
    for name, value in new.stored.items():
        noted[name][at] = value
    noted[NOTED_ROWS][at] = True


def as_noted(noted: Params, new: Batch) -> Batch:
    """Return rows of the experience with the tensors that `note_rows` saved for them earlier.

    Args:
        noted: saved tensors by name, and the mask of rows that have them, from `note_rows`.
        new: all rows of the experience, with their stored tensors.
    """
    if not noted:
        return new
    mask = noted[NOTED_ROWS]
    stored = {
        name: torch.where(mask.view(-1, *[1] * (value.dim() - 1)), noted[name], value)
        for name, value in new.stored.items()
    }
    return replace(new, stored=stored)
