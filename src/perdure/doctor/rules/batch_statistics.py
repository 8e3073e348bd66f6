"""Rule: the model mixes the records of a batch, which privacy excludes."""

from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.case import Case
from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.errors import GuardError
from perdure.privacy.guard.model_checks import check_model


@dataclass(frozen=True, kw_only=True)
class BatchStatistics(Rule):
    """Find modules that the guard refuses under privacy, such as BatchNorm in any form.

    Symptom: `perdure.privacy.check_model` refuses the model.

    Remedy: `norm = "group"`, or `perdure.privacy.fix(model)`.

    Source: own measurement: Opacus accepts BatchNorm without affine parameters, whose running
    statistics then move without noise.
    """

    name: ClassVar[str] = "batch statistics"
    cause: ClassVar[Cause] = "privacy"
    source: ClassVar[str] = "perdure.privacy.check_model"

    def examine(self, case: Case) -> Finding | None:
        """Ask the guard, if there is privacy."""
        if case.privacy is None:
            return None
        try:
            check_model(case.model)
        except GuardError as error:
            return self.finding(
                str(error),
                measured=1,
                threshold=0,
                remedy=Remedy(advice="perdure.privacy.fix(model)", changes={"model.norm": "group"}),
            )
        return None
