"""Rule: labels do not fit the outputs of the model."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from perdure.doctor.case import Case
from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.tasks import Regression, SingleLabel


@dataclass(frozen=True, kw_only=True)
class LabelRange(Rule):
    """Find a head of the wrong width, labels that begin at 1, and targets of the wrong scale.

    Symptom: the head has fewer outputs than the stream has classes; or class 0 is declared and has
    no record, although all other classes have some; or the root mean square of regression targets
    is above `largest`.

    Remedy: give the model all classes, let labels begin at 0, standardise targets.

    Source: own rules; a target of size t gives first gradients of size t, as an input does.

    Args:
        largest: root mean square above which regression targets are too large.
    """

    name: ClassVar[str] = "label range"
    cause: ClassVar[Cause] = "data"
    source: ClassVar[str] = "own rule: labels are 0 .. C - 1, targets are about 1"

    largest: float = 10.0

    def examine(self, case: Case) -> Finding | None:
        """Compare the head of the model, the declared classes and the labels of the sample."""
        return self._of_head(case) or self._of_first(case) or self._of_targets(case)

    def _of_head(self, case: Case) -> Finding | None:
        width = case.task.head_width(case.stream.num_classes)
        given = case.outputs(case.some_inputs(2)).shape[-1]
        if given >= width:
            return None
        return self.finding(
            f"the model has {given} outputs; the stream needs {width}",
            measured=given,
            threshold=width,
            remedy=Remedy(advice=f"num_classes={width} for the model"),
        )

    def _of_first(self, case: Case) -> Finding | None:
        if case.sample is None or not isinstance(case.task, SingleLabel):
            return None
        counts = torch.bincount(case.sample.labels, minlength=case.stream.num_classes)
        declared = {label for experience in case.stream for label in experience.classes}
        if counts[0] or 0 not in declared or len(counts) < 3 or bool((counts[1:] == 0).any()):
            return None
        return self.finding(
            f"no record of {case.origin} has label 0, although it is declared and all others occur",
            measured=0,
            threshold=1,
            remedy=Remedy(advice="labels - 1, with one class fewer, if labels begin at 1"),
            series=counts.tolist(),
            series_name="records of each class",
        )

    def _of_targets(self, case: Case) -> Finding | None:
        if case.sample is None or not isinstance(case.task, Regression):
            return None
        sizes = case.sample.labels.double().square().mean(0).sqrt()
        size = float(sizes.max())
        if size <= self.largest:
            return None
        return self.finding(
            f"targets of {case.origin} have a root mean square of {size:.3g}; expected is about 1",
            measured=size,
            threshold=self.largest,
            remedy=Remedy(advice="(targets - mean) / deviation, with public constants"),
            series=sizes.tolist(),
            series_name="root mean square of each target",
        )
