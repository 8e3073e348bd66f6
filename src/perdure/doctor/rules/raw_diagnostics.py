"""Rule: raw diagnostics make epsilon infinite."""

from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.case import Case
from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class RawDiagnostics(Rule):
    """Find runs that show losses and batch sizes of private records.

    Symptom: `diagnostics = "raw"` under privacy.

    Remedy: `diagnostics = "released"`.

    Source: design rule of the library: only releases leave a curator; with raw diagnostics every
    statement says that epsilon is infinite.
    """

    name: ClassVar[str] = "raw diagnostics"
    cause: ClassVar[Cause] = "privacy"
    source: ClassVar[str] = "own rule: only releases leave a curator"

    def examine(self, case: Case) -> Finding | None:
        """Look at the privacy settings."""
        if case.privacy is None or case.privacy.diagnostics != "raw":
            return None
        return self.finding(
            "raw losses and batch sizes of private records are shown, so epsilon is infinite",
            measured=1,
            threshold=0,
            remedy=Remedy(
                advice='diagnostics = "released"', changes={"privacy.diagnostics": "released"}
            ),
        )
