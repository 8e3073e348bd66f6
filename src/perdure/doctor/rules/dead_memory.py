"""Rule: memory is too small to help."""

from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace


@dataclass(frozen=True, kw_only=True)
class DeadMemory(Rule):
    """Find a memory with room for less than a few records of each class.

    Symptom: the declared capacity is below `records` for each class of each experience so far. Its
    rows are then learnt by heart, and say little about their class.

    Remedy: a larger memory.

    Source: own measurement: replay on split digits with one record for each class forgets as much
    as training without memory.

    Args:
        records: smallest number of records for each class.
    """

    name: ClassVar[str] = "dead memory"
    cause: ClassVar[Cause] = "memory"
    source: ClassVar[str] = "own measurement on split digits"

    records: float = 2.0

    def watch(self, trace: Trace) -> Finding | None:
        """Compare the declared capacity with the number of classes."""
        room = trace.memory_per_class
        if room is None or room >= self.records or trace.experience == 0:
            return None
        return self.finding(
            f"memory has room for {room:.1f} records of each class so far",
            measured=room,
            threshold=self.records,
            remedy=Remedy(advice="a larger memory_size: 20 records for each class or more"),
            experience=trace.experience,
        )
