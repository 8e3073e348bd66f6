"""Findings of the doctor in the form of `result.json`."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from perdure.doctor import Finding, Remedy
from perdure.doctor.finding import in_order
from perdure.experiment.result_schema import FindingResult


def finding_row(finding: Finding) -> FindingResult:
    """Convert a finding to the form of `result.json`."""
    return {
        "rule": finding.rule,
        "cause": finding.cause,
        "evidence": finding.evidence,
        "measured": _finite(finding.measured),
        "threshold": _finite(finding.threshold),
        "source": finding.source,
        "remedy": finding.remedy.advice,
        "changes": dict(finding.remedy.changes),
        "level": finding.level,
        "experience": finding.experience,
        "step": finding.step,
        "series": [_finite(value) for value in finding.series],
        "series_name": finding.series_name,
        "explained_by": list(finding.explained_by),
    }


def finding_of(row: FindingResult) -> Finding:
    """Convert a finding of `result.json` back."""
    values: dict[str, Any] = {
        **{key: value for key, value in row.items() if key not in ("remedy", "changes")},
        "measured": math.inf if row["measured"] is None else row["measured"],
        "threshold": math.inf if row["threshold"] is None else row["threshold"],
        "explained_by": tuple(row["explained_by"]),
        "series": tuple(math.inf if value is None else value for value in row["series"]),
        "remedy": Remedy(advice=row["remedy"], changes=row["changes"]),
    }
    return Finding(**values)


def each_once(findings: Iterable[FindingResult]) -> list[FindingResult]:
    """Return each rule and experience once, in the order of repair."""
    first: dict[tuple[str, int | None], Finding] = {}
    for row in findings:
        first.setdefault((row["rule"], row["experience"]), finding_of(row))
    return [finding_row(finding) for finding in in_order(list(first.values()))]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def rows_by_arm(found: Mapping[str, Sequence[Finding]]) -> dict[str, list[FindingResult]]:
    """Convert the findings of every arm to the form of `result.json`."""
    return {name: [finding_row(each) for each in findings] for name, findings in found.items()}
