"""Multi-label classification: any number of labels per record.

    loss_i = mean over the labels c of the mask of BCE(sigmoid(outputs_ic), y_ic)
    metric = macro-F1 in percent: mean over labels of 2 TP / (2 TP + FP + FN)

Targets are (n, C) float32 of 0 and 1, outputs (n, C) logits; a label is predicted if its logit is
above 0, which is a probability above 1/2.

Macro-F1 (also called CF1) is computed from counts that add up over records, while mean average
precision needs the order of all scores. The share of correct labels would reward a model that
predicts none. The mean is over the labels that some record has: a label of a later experience,
which no record here is annotated with, gives no information.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.errors import DataError
from perdure.tasks.base import EXTREME, Metric, Task, check_shape, fitted, mask_outputs


@dataclass(frozen=True, kw_only=True)
class MultiLabel(Task):
    """Task with any number of labels per record: binary cross entropy, and macro-F1 in percent."""

    name: ClassVar[str] = "multi-label"
    metric: ClassVar[Metric] = Metric(name="macro-F1", unit="%")

    def losses(self, outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (n,) binary cross entropy or the chosen loss, averaged over the mask."""
        if self.loss is not None:
            return _mean(self.loss.label_losses(outputs, targets), mask)
        each = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
        return _mean(each, mask)

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
        """(n,) binary cross entropy with the teacher's probabilities, averaged over its labels."""
        q = torch.sigmoid(teacher / temperature)
        each = F.binary_cross_entropy_with_logits(outputs / temperature, q, reduction="none")
        return _mean(each, known)

    def predictions(self, outputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (n, C) float32 predicted labels: 1 if a logit is above 0."""
        return (mask_outputs(outputs, mask) > 0).float()

    def measures(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return (n, 3C) counts per label: true positives, predicted labels, and present labels."""
        predicted = outputs > 0
        present = targets > 0
        return torch.cat([predicted & present, predicted, present], dim=1).double()

    def score(self, totals: Tensor, records: int) -> float:
        """Macro-F1 in percent over the labels that are present; NaN if none is."""
        found, predicted, present = totals.view(3, -1)
        counts = present > 0
        return 100.0 * float((2 * found / (predicted + present))[counts].mean())

    def check(self, targets: Tensor) -> None:
        """Refuse targets that are not (n, C) float32 of 0 and 1."""
        check_shape(
            targets,
            dtype=torch.float32,
            dims=2,
            needed="(n, C) of 0 and 1, one column per label",
            fix="convert them with labels.float()",
        )
        wrong = ((targets != 0) & (targets != 1)).nonzero()
        if len(wrong):
            row, column = wrong[0].tolist()
            value = float(targets[row, column])
            raise DataError(
                f"labels have {value} in row {row}, column {column}; allowed: 0 and 1; set 1 "
                "if a record has the label"
            )

    def undeclared(self, targets: Tensor, classes: Sequence[int]) -> str:
        """Describe labels of the records that are not declared, or missing columns; "" for none."""
        if max(classes, default=-1) >= targets.shape[1]:
            return f"labels of {targets.shape[1]} columns"
        found = set(targets.any(0).nonzero().flatten().tolist()) - set(classes)
        return f"labels {sorted(found)}" if found else ""

    def synthetic(self, targets: Tensor, classes: Sequence[int], numbers: Tensor) -> Tensor:
        """Make targets with one declared label in turn, and a second one in every second row.

        For numbers of at least `EXTREME`, rows have all declared labels or none, in turn.
        """
        width = targets.shape[1]
        columns = torch.tensor(classes)
        made = torch.zeros(len(numbers), width)
        made.scatter_(1, columns[numbers.cpu() % len(classes)][:, None], 1.0)
        twice = columns[(numbers.cpu() // 2) % len(classes)][:, None]
        made.scatter_(1, twice, 1.0)
        whole = torch.zeros(width).index_fill(0, columns, 1.0)
        number = numbers.cpu()[:, None]
        return torch.where(number < EXTREME, made, whole * (number % 2)).to(targets)

    def class_counts(self, targets: Tensor, num_classes: int) -> Tensor:
        """Return (num_classes,) number of records that have each label."""
        return targets.sum(0)


def _mean(each: Tensor, mask: Tensor | None) -> Tensor:
    """Return (n,) mean over the columns of values (n, C) that a mask selects."""
    if mask is None:
        return each.mean(1)
    mask = fitted(mask, each)
    return torch.where(mask, each, 0.0).sum(1) / mask.sum(-1).clamp(min=1)
