"""Rule: a strategy stores far more than the model."""

from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace


@dataclass(frozen=True, kw_only=True)
class LargeState(Rule):
    """Find a strategy whose state is many times the model.

    Stored records are not counted: their number is declared.

    Symptom: after an experience, the state has more than `ratio` times the bytes of the model.

    Remedy: a strategy with one state for all experiences, or with a memory of a declared size.

    Source: own measurement: on split digits, OGD stores 100 times the model, and EWC 3 times.

    Args:
        ratio: bytes of the state, relative to those of the model.
    """

    name: ClassVar[str] = "large state"
    cause: ClassVar[Cause] = "memory"
    source: ClassVar[str] = "own measurement on split digits"

    ratio: float = 10.0

    def watch(self, trace: Trace) -> Finding | None:
        """Compare the state after the last experience with the model."""
        sizes = trace.state_bytes
        if not sizes or not trace.model_bytes:
            return None
        ratio = sizes[-1] / trace.model_bytes
        if ratio <= self.ratio:
            return None
        return self.finding(
            f"the state of the strategy has {sizes[-1] / 1e6:.3g} MB, {ratio:.0f} times the model",
            measured=ratio,
            threshold=self.ratio,
            # an arm stands for its strategy, so no setting replaces it
            remedy=Remedy(advice="EWC(mode='online'), or a strategy with a memory_size in bytes"),
            series=sizes,
            series_name="bytes of the state after each experience",
            experience=trace.experience,
        )
