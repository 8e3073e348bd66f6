"""Rule: some classes have far more records than others."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from perdure.doctor.case import Case
from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.tasks import SingleLabel


@dataclass(frozen=True, kw_only=True)
class ClassImbalance(Rule):
    """Find streams in which the largest class has many times the records of the smallest.

    Symptom: the ratio of the largest to the smallest class that occurs is above `ratio`, counted
    over all records that may be read. Under privacy these are the public test records, because
    because counts of training records are private. The rule is silent if the loss balances the
    classes already.

    Remedy: a memory that keeps the same number of records of each class, or a loss that weights
    classes by public counts.

    Source: SageMaker Debugger, ClassImbalance (ratio above 10).

    Args:
        ratio: ratio above which there is a finding.
    """

    name: ClassVar[str] = "class imbalance"
    cause: ClassVar[Cause] = "data"
    source: ClassVar[str] = "SageMaker Debugger, ClassImbalance"

    ratio: float = 10.0

    def examine(self, case: Case) -> Finding | None:
        """Count the labels of the records that may be read."""
        if not isinstance(case.task, SingleLabel):
            return None
        if case.task.loss is not None and case.task.loss.balances_classes:
            return None
        width = case.stream.num_classes
        counts = torch.zeros(width, dtype=torch.int64)
        for experience in case.stream:
            counts += torch.bincount(
                case.records_of(experience.index).labels.cpu(), minlength=width
            )
        present = counts[counts > 0]
        if len(present) < 2:
            return None
        ratio = float(present.max() / present.min())
        if ratio <= self.ratio:
            return None
        return self.finding(
            f"class {int(counts.argmax())} has {ratio:.0f} times the {case.origin} of class "
            f"{int(counts.where(counts > 0, counts.max() + 1).argmin())}",
            measured=ratio,
            threshold=self.ratio,
            remedy=self._remedy(case, counts.tolist()),
            series=counts.tolist(),
            series_name="records of each class",
        )

    def _remedy(self, case: Case, counts: list[int]) -> Remedy:
        """Return a loss that knows the counts: read without privacy, public ones under it."""
        shown = [max(1, count) for count in counts]
        loss = {"name": "balanced_softmax", "counts": shown if case.privacy else "balanced"}
        return Remedy(
            advice="a loss that balances the classes, BalancedSoftmax",
            changes={"training.loss": loss},
        )
