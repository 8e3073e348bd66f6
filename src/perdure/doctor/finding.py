"""Findings: symptoms of known challenges of training, each with its evidence and its remedy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from perdure.errors import ConfigError
from perdure.utils.checked_fields import CheckedFields

Level = Literal["free", "paid", "debug"]
"""Reading that a rule needs.

`free`: weights, released gradients, public data, declared numbers. `paid`: a release, which is
charged to the ledger. `debug`: raw values of private records, refused under privacy unless the
diagnostics are raw.
"""
Cause = Literal[
    "data", "wiring", "privacy", "learning rate", "initialisation", "activation", "fit", "memory"
]
"""Kind of fault, in the order of repair: a fault of one kind often causes those after it."""
CAUSES: tuple[Cause, ...] = (
    "data",
    "wiring",
    "privacy",
    "learning rate",
    "initialisation",
    "activation",
    "fit",
    "memory",
)
Setting = bool | int | float | str | None | list[int] | list[float] | list[str]
"""Value of a setting in a config."""


@dataclass(frozen=True, kw_only=True)
class Remedy(CheckedFields):
    """One-line remedy of a symptom, and the settings that apply it.

    Args:
        advice: the remedy in one line, as a Python user would write it.
        changes: path in a config, such as "training.max_grad_norm", to its new value. Empty if no
            setting applies the remedy, as for mistakes in the user's own model.
    """

    advice: str
    changes: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Finding(CheckedFields):
    """Symptom that a rule has found.

    Args:
        rule: name of the rule.
        cause: kind of fault.
        evidence: measurement in words, with its numbers and the layer or data that it is about.
        measured: measured number.
        threshold: number above or below which the rule makes a finding.
        source: publication or measurement that the threshold comes from.
        remedy: proposed remedy.
        level: reading that the rule needed.
        experience: index of the experience, from 0 (texts count from 1); None before training.
        step: step of the experience; None before training, and at the end of an experience.
        series: recent measurements, oldest first, for a picture; may be empty.
        series_name: meaning of the numbers in `series`, such as "loss of each step".
        explained_by: names of rules whose symptom causes this one.
    """

    rule: str
    cause: Cause
    evidence: str
    measured: float
    threshold: float
    source: str
    remedy: Remedy
    level: Level = "free"
    experience: int | None = None
    step: int | None = None
    series: tuple[float, ...] = ()
    series_name: str = ""
    explained_by: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.cause not in CAUSES:
            raise ConfigError.of("cause", self.cause, CAUSES)

    @property
    def found(self) -> str:
        """Examination or place in training that made the finding, in words; both count from 1."""
        if self.experience is None:
            return "before training"
        at = "" if self.step is None else f", step {self.step}"
        return f"experience {self.experience + 1}{at}"

    def __str__(self) -> str:
        return f"{self.rule} ({self.found}): {self.evidence}; remedy: {self.remedy.advice}"


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    """Sort findings by cause, in the order of repair, and leave out those that others explain.

    Equal causes stay in their order. Of findings that explain each other in a circle, the first
    in this order stays. A finding before training can explain findings of every
    experience, and can be explained by them.

    Args:
        findings: findings of `examine`, of a `Monitor`, or of both.
    """
    ordered = sorted(findings, key=lambda finding: CAUSES.index(finding.cause))
    explaining = [_all_explaining(finding, ordered) for finding in ordered]

    def is_explained(place: int) -> bool:
        # of findings that explain each other in a circle the first stays, or all would be left out
        return any(at < place or place not in explaining[at] for at in explaining[place])

    return [each for place, each in enumerate(ordered) if not is_explained(place)]


def _all_explaining(finding: Finding, findings: Sequence[Finding]) -> set[int]:
    """Return the places of the findings that explain one, directly or through others."""
    found: set[int] = set()
    following = [finding]
    while following:
        explained = following.pop()
        for place, other in enumerate(findings):
            if place not in found and _explains(other, explained):
                found.add(place)
                following.append(other)
    return found


def _explains(other: Finding, finding: Finding) -> bool:
    alike = other.experience == finding.experience or None in (
        other.experience,
        finding.experience,
    )
    return alike and other.rule in finding.explained_by
