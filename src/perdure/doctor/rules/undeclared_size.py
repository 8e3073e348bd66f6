"""Rule: the number of private records is counted, not declared."""

from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.case import Case
from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class UndeclaredSize(Rule):
    """Find private training records whose size was not declared.

    Sampling rates, divisors and epsilon use the declared size. If it is the number of rows, then
    this number becomes public, and one record more would change it.

    Symptom: an experience has training records without a declared size, which are not of a
    published data set.

    Remedy: a public, rounded size: `[data] declared_size`, or `Records(declared_size=...)`.

    Source: design rule of the library: declared numbers, never realised ones.
    """

    name: ClassVar[str] = "undeclared size"
    cause: ClassVar[Cause] = "privacy"
    source: ClassVar[str] = "own rule: sizes are declared, never counted"

    def examine(self, case: Case) -> Finding | None:
        """Look at the flags of the records, if there is privacy; sizes are not read."""
        counted = case.counted_sizes
        if case.privacy is None or not counted:
            return None
        return self.finding(
            f"the sizes of {len(counted)} of {len(case.stream)} experiences are counted, so that "
            "the number of private records is public",
            measured=len(counted),
            threshold=0,
            remedy=Remedy(advice="declared_size = N with a public, rounded N"),
        )
