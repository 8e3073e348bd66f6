"""Rule: an earlier experience is forgotten."""

from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace


@dataclass(frozen=True, kw_only=True)
class ForgottenExperience(Rule):
    """Find an earlier experience whose accuracy has fallen.

    Symptom: the accuracy on public test records of an earlier experience has fallen by more than
    `drop` of what it was above chance.

    Remedy: a strategy with memory, or a larger memory.

    Source: Chaudhry et al. 2018, "Riemannian walk for incremental learning", forgetting.

    Args:
        drop: fall of the accuracy above chance, relative to its highest.
    """

    name: ClassVar[str] = "forgotten experience"
    cause: ClassVar[Cause] = "memory"
    source: ClassVar[str] = "Chaudhry et al. 2018, forgetting"
    explained_by: ClassVar[tuple[str, ...]] = (
        "bias to new classes",
        "dead memory",
        "lost plasticity",
    )

    drop: float = 0.4

    def watch(self, trace: Trace) -> Finding | None:
        """Compare the last row of the accuracy matrix with the best of the earlier rows."""
        if len(trace.matrix) < 2:
            return None
        last = trace.matrix[-1]
        falls = {}
        for index in range(len(trace.matrix) - 1):
            best = max(row[index] for row in trace.matrix[index:-1])
            chance = trace.chances[len(trace.matrix) - 1]
            # NaN, for an experience without test records, fails both comparisons
            if best > chance and last[index] <= best:
                falls[index] = (best - max(last[index], chance)) / (best - chance)
        worst = max(falls, key=lambda index: falls[index], default=-1)
        if worst < 0 or falls[worst] <= self.drop:
            return None
        best = max(row[worst] for row in trace.matrix[worst:-1])
        return self.finding(
            f"accuracy on experience {worst + 1} fell from {best:.0f} to {last[worst]:.0f} %",
            measured=falls[worst],
            threshold=self.drop,
            # an arm stands for its strategy, so no setting replaces it
            remedy=Remedy(advice="strategy 'replay', or a larger memory_size"),
            series=tuple(row[worst] for row in trace.matrix[worst:]),
            series_name=f"accuracy on experience {worst + 1} in percent",
            experience=trace.experience,
        )
