"""Rule: a group of records is selected, or classified correctly, far less often than another."""

from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace


@dataclass(frozen=True, kw_only=True)
class UnequalGroups(Rule):
    """Find groups of public test records that a model treats unequally.

    The groups are those of `Monitor(groups=...)` or the table [fairness]; without these the rule
    finds nothing.

    Symptom: the selection rate of a group is below `ratio` of another's, or its accuracy where no
    class counts as selected. Groups of fewer than `fewest` records are left out.

    Remedy: weights that make group and class independent (`training.group_weights`). They help
    where records of a group and class are rare, and cost accuracy.

    Source: EEOC 1978, "Uniform guidelines on employee selection procedures", the four-fifths rule.

    Args:
        ratio: smallest ratio of two groups without a finding.
        fewest: fewest records of a group.
    """

    name: ClassVar[str] = "unequal groups"
    cause: ClassVar[Cause] = "data"
    source: ClassVar[str] = "EEOC 1978, four-fifths rule"

    ratio: float = 0.8
    fewest: int = 30

    def watch(self, trace: Trace) -> Finding | None:
        """Compare the groups of the experience that ended."""
        found = trace.groups
        if found is None:
            return None
        of_selection = found.selection_rate is not None
        rates = found.accuracy if found.selection_rate is None else found.selection_rate
        rates = {name: rate for name, rate in rates.items() if found.records[name] >= self.fewest}
        if len(rates) < 2:
            return None
        worst = min(rates, key=lambda name: rates[name])
        best = max(rates, key=lambda name: rates[name])
        ratio = rates[worst] / rates[best] if rates[best] else 1.0
        if ratio >= self.ratio:
            return None
        quantity = "are selected" if of_selection else "are classified correctly"
        return self.finding(
            f"{rates[worst]:.0%} of the public test records of {found.attribute} {worst} "
            f"{quantity}, and {rates[best]:.0%} of {best}",
            measured=ratio,
            threshold=self.ratio,
            remedy=self._remedy(trace),
            series=tuple(rates.values()),
            series_name=f"{'selection rate' if of_selection else 'accuracy'} of each group, right "
            "after the training of this experience",
            experience=trace.experience,
        )

    def _remedy(self, trace: Trace) -> Remedy:
        """Return weights from counted records, or under privacy from public test records."""
        assert trace.groups is not None
        weights: dict[str, object] = {"attribute": trace.groups.attribute}
        if trace.private:
            weights["class_counts"] = [list(row) for row in trace.group_counts]
        else:
            weights["counts"] = "reweighing"
        return Remedy(
            advice="weights of groups and classes, by GroupWeights",
            changes={"training.group_weights": weights},
        )
