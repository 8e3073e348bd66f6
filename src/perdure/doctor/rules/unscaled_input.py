"""Rule: inputs are far larger or smaller than the initialisation of a model expects."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from perdure.doctor.case import Case
from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule

SHOWN = 50
"""Most features whose size is shown in the picture of the finding."""


@dataclass(frozen=True, kw_only=True)
class UnscaledInput(Rule):
    """Find inputs that are not scaled to about one.

    Symptom: the root mean square of the inputs is above `largest`, or every value is below
    `smallest`. Without records, the declared range counts.

    Remedy: standardise the inputs by constants that are public. The constants in the remedy are
    computed from the records that the rule may read.

    Source: own measurement: standardised columns have 1, pixels in [0, 1] 0.3 to 0.5, pixels in
    [0, 255] about 80, the raw columns of breast_cancer 230. UMLAUT's limit of 1 for every value
    raised a false alarm on standardised columns.

    Args:
        largest: root mean square above which inputs are too large.
        smallest: largest absolute value below which inputs are too small.
    """

    name: ClassVar[str] = "unscaled input"
    cause: ClassVar[Cause] = "data"
    source: ClassVar[str] = "own measurement; compare UMLAUT, input outside [-1, 1]"

    largest: float = 5.0
    smallest: float = 0.02

    def examine(self, case: Case) -> Finding | None:
        """Look at the inputs of the sample, or at the declared range."""
        if not case.domain.floats:
            return None
        if case.sample is None:
            return self._of_range(case)
        rows = case.sample.inputs.double().flatten(1).nan_to_num(0.0, 0.0, 0.0)
        sizes = rows.square().mean(0).sqrt()
        size = float(sizes.square().mean().sqrt())
        top = float(rows.abs().max())
        if not (size > self.largest or 0 < top < self.smallest):
            return None
        threshold = self.largest if size > self.largest else self.smallest
        return self.finding(
            f"inputs of {case.origin} have a root mean square of {size:.3g}; expected is about 1",
            measured=size if size > self.largest else top,
            threshold=threshold,
            remedy=_standardised(rows),
            series=sizes.sort(descending=True).values[:SHOWN].tolist(),
            series_name="root mean square of each feature, largest first",
        )

    def _of_range(self, case: Case) -> Finding | None:
        declared = case.domain.range
        middle = 0.0 if declared is None else sum(abs(end) for end in declared) / 2
        if declared is None or middle <= self.largest:
            return None
        return self.finding(
            f"inputs are declared from {declared[0]:g} to {declared[1]:g}; expected is about -1 to "
            "1",
            measured=middle,
            threshold=self.largest,
            remedy=Remedy(
                advice="from_arrays(..., standardise='declared')",
                changes={"data.options.standardise": "declared"},
            ),
        )


def _standardised(rows: Tensor) -> Remedy:
    """Return the remedy with mean and deviation of each feature, or of all for many features."""
    few = rows.shape[1] <= SHOWN
    mean = rows.mean(0) if few else rows.mean()
    deviation = rows.std(0) if few else rows.std()
    deviation = deviation.where(deviation > 0, deviation.new_ones(()))
    constants = [[float(f"{x:.4g}") for x in each.flatten().tolist()] for each in (mean, deviation)]
    shown = constants if few else [values[0] for values in constants]
    return Remedy(
        advice="from_arrays(..., standardise=(mean, deviation)), with public constants",
        changes={"data.options.standardise": shown},
    )
