"""Rule: the steps of a federation's server are too large."""

import statistics
from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace


@dataclass(frozen=True, kw_only=True)
class DivergingServerStep(Rule):
    """Find a server whose steps are larger than the updates of its clients allow.

    Symptom: in half of the rounds or more, the step of the server is above `ratio` times the median
    norm of the clients' updates. A mean of updates has at most their largest norm.

    Remedy: a lower learning rate of the server.

    Source: Reddi et al. 2021, "Adaptive federated optimization", server learning rate.

    Args:
        ratio: norm of the server's step, relative to the median client's update.
        rounds: smallest number of rounds.
    """

    name: ClassVar[str] = "diverging server step"
    cause: ClassVar[Cause] = "learning rate"
    source: ClassVar[str] = "Reddi et al. 2021, Adaptive federated optimization"

    ratio: float = 2.0
    rounds: int = 2

    def watch(self, trace: Trace) -> Finding | None:
        """Compare the steps of the server with the clients' updates."""
        ratios = [
            each.server_step / max(1e-12, statistics.median(each.norms.values()))
            for each in trace.rounds
        ]
        if len(ratios) < self.rounds:
            return None
        median = statistics.median(ratios)
        if not median > self.ratio:
            return None
        return self.finding(
            f"steps of the server are {median:.1f} times the clients' updates",
            measured=median,
            threshold=self.ratio,
            remedy=Remedy(
                advice="a lower server learning rate in federation.aggregator_options",
            ),
            series=tuple(ratios),
            series_name="server step relative to the clients' updates",
            experience=trace.experience,
        )
