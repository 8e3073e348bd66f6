"""Rule: records have missing values, or numbers that stand for them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perdure.doctor.case import Case
from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule

PLACEHOLDERS = (-999.0, -9999.0, -99999.0, 999.0, 9999.0, 99999.0)
"""Numbers that often stand for a missing value."""


@dataclass(frozen=True, kw_only=True)
class MissingValues(Rule):
    """Find NaN, infinite values, and numbers such as -999 that stand for missing ones.

    Symptom: the share of such values is above `share`. A placeholder counts if all other values of
    its feature are at most a tenth of it.

    Remedy: leave out the rows, or fill the values, before the records are made.

    Source: every such value makes a loss, and then all parameters, NaN; own list of placeholders.

    Args:
        share: share of missing values above which there is a finding.
    """

    name: ClassVar[str] = "missing values"
    cause: ClassVar[Cause] = "data"
    source: ClassVar[str] = "SageMaker Debugger, ExplodingTensor (any NaN or infinite value)"

    share: float = 0.0

    def examine(self, case: Case) -> Finding | None:
        """Look at the inputs of the sample."""
        if case.sample is None or not case.domain.floats:
            return None
        rows = case.sample.inputs.flatten(1)
        missing = ~rows.isfinite() | _placeholders(rows)
        share = float(missing.double().mean())
        if share <= self.share:
            return None
        by_feature = missing.double().mean(0)
        worst = int(by_feature.argmax())
        return self.finding(
            f"{share:.1%} of the values of {case.origin} are missing, most of feature {worst} "
            f"({float(by_feature[worst]):.1%})",
            measured=share,
            threshold=self.share,
            remedy=Remedy(advice="table = table.fillna(table.median()) before from_pandas(table)"),
            series=by_feature.tolist()[:100],
            series_name="share of missing values of each feature",
        )


def _placeholders(rows: Tensor) -> Tensor:
    """(n, d) True for placeholders in features whose other values are far smaller."""
    found = torch.zeros(rows.shape, dtype=torch.bool)
    for number in PLACEHOLDERS:
        here = rows == number
        others = rows.where(rows.isfinite() & ~here, rows.new_zeros(())).abs().amax(0)
        found |= here & (others <= abs(number) / 10)
    return found
