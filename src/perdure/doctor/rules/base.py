"""Base class of the doctor's rules."""

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from perdure.doctor.finding import Cause, Finding, Level, Remedy
from perdure.utils.checked_fields import CheckedFields

if TYPE_CHECKING:
    from perdure.doctor.case import Case
    from perdure.doctor.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Rule(CheckedFields, ABC):
    """Base class of rules: one symptom, its thresholds, and its remedy.

    Thresholds are the fields of the dataclass. A rule overrides `examine`, `watch`, or both.

    Class attributes:
        name: name of the rule, which is the name of its file with spaces for underscores.
        cause: kind of fault that the rule names.
        level: reading that the rule needs.
        source: publication or measurement that the thresholds come from.
        explained_by: names of rules whose symptom causes this one; if one of them makes a finding
            in the same experience, the finding of this rule is left out.
        trains: True if `examine` trains copies of the model, which takes seconds.
    """

    name: ClassVar[str]
    cause: ClassVar[Cause]
    level: ClassVar[Level] = "free"
    source: ClassVar[str]
    explained_by: ClassVar[tuple[str, ...]] = ()
    trains: ClassVar[bool] = False

    def examine(self, case: "Case") -> Finding | None:
        """Look for the symptom before training; return None if there is none."""
        return None

    def watch(self, trace: "Trace") -> Finding | None:
        """Look for the symptom in measurements of training; return None if there is none."""
        return None

    def finding(
        self,
        evidence: str,
        *,
        measured: float,
        threshold: float,
        remedy: Remedy,
        series: Sequence[float] = (),
        series_name: str = "",
        experience: int | None = None,
        step: int | None = None,
    ) -> Finding:
        """Make a finding of this rule.

        Args:
            evidence: measurement in words, with its numbers and the layer or data that it is about.
            measured: measured number.
            threshold: number above or below which the rule makes a finding.
            remedy: proposed remedy.
            series: recent measurements, oldest first, for a picture.
            series_name: quantity of the series, for the label of the picture.
            experience: index of the experience; None before training.
            step: step of the experience; None before training, and at the end of an experience.
        """
        return Finding(
            rule=self.name,
            cause=self.cause,
            evidence=evidence,
            measured=measured,
            threshold=threshold,
            source=self.source,
            remedy=remedy,
            level=self.level,
            experience=experience,
            step=step,
            series=tuple(series),
            series_name=series_name,
            explained_by=self.explained_by,
        )
