"""Rule: the updates of one client point away from those of the others."""

import statistics
from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace


@dataclass(frozen=True, kw_only=True)
class DriftedClient(Rule):
    """Find a client whose updates disagree with those of the others, or are far larger.

    Symptom: over `rounds` rounds or more, the mean cosine between a client's update and the mean of
    the others' is below `cosine`, and below half of the median client's; or its update is more than
    `norm` times the median one.

    Remedy: check the client's labels; fewer local steps, or a robust aggregator.

    Source: Karimireddy et al. 2020, "SCAFFOLD", client drift; limits from runs on digits, where
    clients with the same distribution have cosines of 0.7 to 0.9.

    Args:
        cosine: cosine below which a client disagrees.
        norm: norm of an update, relative to the median client's.
        rounds: smallest number of rounds in which a client took part.
    """

    name: ClassVar[str] = "drifted client"
    cause: ClassVar[Cause] = "data"
    source: ClassVar[str] = "Karimireddy et al. 2020, SCAFFOLD, client drift"

    cosine: float = 0.2
    norm: float = 5.0
    rounds: int = 2

    def watch(self, trace: Trace) -> Finding | None:
        """Compare the updates of the clients over the rounds."""
        clients = {client for each in trace.rounds for client in each.norms}
        cosines, norms = {}, {}
        for client in clients:
            mine = [each for each in trace.rounds if client in each.norms and len(each.norms) > 2]
            if len(mine) < self.rounds:
                continue
            cosines[client] = statistics.mean(each.cosines[client] for each in mine)
            norms[client] = statistics.median(
                each.norms[client] / max(1e-12, statistics.median(each.norms.values()))
                for each in mine
            )
        if not cosines:
            return None
        client = min(cosines, key=lambda one: cosines[one])
        usual = statistics.median(cosines.values())
        largest = max(norms, key=lambda one: norms[one])
        if cosines[client] < min(self.cosine, usual / 2):
            problem = f"updates of client {client} have a cosine of {cosines[client]:.2f} with the "
            problem += f"others'; the median client has {usual:.2f}"
            measured, threshold = cosines[client], self.cosine
        elif norms[largest] > self.norm:
            problem = f"updates of client {largest} are {norms[largest]:.1f} times the median"
            measured, threshold = norms[largest], self.norm
        else:
            return None
        return self.finding(
            problem,
            measured=measured,
            threshold=threshold,
            remedy=Remedy(
                advice="check the labels of this client, or federation.aggregator = 'FedMedian'",
                changes={"federation.aggregator": "FedMedian"},
            ),
            series=tuple(cosines[one] for one in sorted(cosines)),
            series_name="cosine of each client's updates with those of the others",
            experience=trace.experience,
        )
