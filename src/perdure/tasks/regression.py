"""Regression: one or several numbers per record.

    loss_i = mean over the outputs c of (outputs_ic - y_ic)^2
    metric = root mean squared error over records and outputs, in the unit of the targets

Targets and outputs are (n, k) float32. Scale targets of very different sizes by declared constants,
because the loss and the metric give equal weight to one unit of every output.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perdure.errors import DataError
from perdure.tasks.base import EXTREME, Metric, Task, check_shape

FAR = 1e4
"""Absolute value of the large synthetic targets."""


@dataclass(frozen=True, kw_only=True)
class Regression(Task):
    """Regression task: mean squared error per record, and its root over all records (RMSE)."""

    name: ClassVar[str] = "regression"
    metric: ClassVar[Metric] = Metric(name="RMSE", unit="", higher_is_better=False)

    def losses(self, outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (n,) squared error of each record, averaged over outputs; masks are ignored."""
        return (outputs - targets).square().mean(1)

    def distillation(
        self,
        outputs: Tensor,
        teacher: Tensor,
        targets: Tensor,
        *,
        known: Tensor | None = None,
        allowed: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Return (n,) squared distance from the teacher's outputs, averaged over outputs."""
        return ((outputs - teacher) / temperature).square().mean(1)

    def predictions(self, outputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the outputs (n, k) unchanged, because they are the predictions."""
        return outputs

    def measures(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return (n, 1) squared error of each record, averaged over outputs."""
        return (outputs.double() - targets.double()).square().mean(1, keepdim=True)

    def score(self, totals: Tensor, records: int) -> float:
        """Root mean squared error over all records and outputs."""
        return math.sqrt(float(totals[0]) / records)

    def check(self, targets: Tensor) -> None:
        """Refuse targets that are not (n, k) float32, or not finite."""
        check_shape(
            targets,
            dtype=torch.float32,
            dims=2,
            needed="(n, k), k numbers per record; for one number, give labels[:, None]",
            fix="convert them with labels.float()",
        )
        wrong = (~targets.isfinite()).nonzero()
        if len(wrong):
            row, column = wrong[0].tolist()
            value = float(targets[row, column])
            raise DataError(
                f"labels have {value} in row {row}, column {column}; allowed: finite numbers; "
                "repair or leave out the row"
            )

    def undeclared(self, targets: Tensor, classes: Sequence[int]) -> str:
        """Describe a number of columns that differs from the declared outputs.

        "" if it does not.
        """
        columns = targets.shape[1]
        return "" if set(range(columns)) == set(classes) else f"labels of {columns} columns"

    def synthetic(self, targets: Tensor, classes: Sequence[int], numbers: Tensor) -> Tensor:
        """Make small numbers of both signs in turn; from `EXTREME` on, large ones of both signs."""
        number = numbers.cpu()[:, None]
        small = (number + torch.arange(targets.shape[1])) % 5 - 2.0
        large = torch.where(number % 3 == 0, FAR / 10, -FAR)
        return torch.where(number < EXTREME, small, large).to(targets)
