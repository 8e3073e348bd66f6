"""Rule: the memory of the process grows from step to step."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace

MEBIBYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class GrowingMemory(Rule):
    """Find memory that grows over the whole experience, as when something keeps every graph.

    Symptom: after the first quarter of the experience, memory has grown by more than `growth` of
    its size and more than `bytes`, and it rose between `rising` of the probes or more.

    Remedy: keep numbers, not tensors, in callbacks: `float(loss)`, `value.detach()`.

    Source: own measurement; a training of a fixed batch size needs no more memory over time.

    Args:
        growth: relative growth.
        bytes: absolute growth.
        rising: share of pairs of neighbouring probes between which memory rose.
    """

    name: ClassVar[str] = "growing memory"
    cause: ClassVar[Cause] = "memory"
    source: ClassVar[str] = "own measurement on digits"

    growth: float = 0.3
    bytes: int = 128 * MEBIBYTE
    rising: float = 0.8

    def watch(self, trace: Trace) -> Finding | None:
        """Compare the memory of the probes."""
        used = [probe.memory_bytes for probe in trace.probes[len(trace.probes) // 4 :]]
        if len(used) < 4 or trace.share < 0.5 or not used[0]:
            return None
        grown = used[-1] - used[0]
        rising = sum(after > before for before, after in pairwise(used)) / (len(used) - 1)
        if grown <= max(self.bytes, self.growth * used[0]) or rising < self.rising:
            return None
        return self.finding(
            f"memory grew from {used[0] // MEBIBYTE} to {used[-1] // MEBIBYTE} MiB",
            measured=grown / used[0],
            threshold=self.growth,
            remedy=Remedy(advice="keep numbers in callbacks: float(loss) or value.detach()"),
            series=tuple(each / MEBIBYTE for each in used),
            series_name="memory in MiB",
            experience=trace.experience,
            step=trace.done,
        )
