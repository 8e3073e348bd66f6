"""Rule: records of earlier classes are classified as new classes."""

from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace


@dataclass(frozen=True, kw_only=True)
class BiasToNewClasses(Rule):
    """Find a class-incremental model that classifies most earlier records as new classes.

    Symptom: more than `share` of the public test records of earlier experiences are classified as
    one of the newest classes.

    Remedy: replay with equal shares of the classes, or a corrected head (`bic`).

    Source: Wu et al. 2019, "Large scale incremental learning", bias of the last layer.

    Args:
        share: share of the records.
    """

    name: ClassVar[str] = "bias to new classes"
    cause: ClassVar[Cause] = "memory"
    source: ClassVar[str] = "Wu et al. 2019, Large scale incremental learning"
    explained_by: ClassVar[tuple[str, ...]] = ("dead memory",)

    share: float = 0.5

    def watch(self, trace: Trace) -> Finding | None:
        """Look at the predictions for earlier classes."""
        share = trace.taken_by_new
        if share is None or share <= self.share:
            return None
        return self.finding(
            f"{share:.0%} of the test records of earlier classes are classified as new ones",
            measured=share,
            threshold=self.share,
            # an arm stands for its strategy, so no setting replaces it
            remedy=Remedy(advice="strategy 'bic' or 'replay', or a larger memory_size"),
            experience=trace.experience,
        )
