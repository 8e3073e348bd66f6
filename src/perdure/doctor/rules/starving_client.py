"""Rule: a client has far fewer records than the others."""

import statistics
from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace


@dataclass(frozen=True, kw_only=True)
class StarvingClient(Rule):
    """Find a client that has far fewer records than the median client.

    Symptom: the declared number of records of a client is below `share` of the median client's, so
    its updates hardly count and its records are learnt by heart.

    Remedy: merge small clients, or choose clients in proportion to their records.

    Source: Li et al. 2020, "Federated optimization in heterogeneous networks".

    Args:
        share: number of records, relative to the median client's.
    """

    name: ClassVar[str] = "starving client"
    cause: ClassVar[Cause] = "data"
    source: ClassVar[str] = "Li et al. 2020, Federated optimization in heterogeneous networks"

    share: float = 0.1

    def watch(self, trace: Trace) -> Finding | None:
        """Compare the declared sizes of the clients."""
        sizes = {client: size for each in trace.rounds for client, size in each.sizes.items()}
        if len(sizes) < 3:
            return None
        client = min(sizes, key=lambda one: sizes[one])
        median = statistics.median(sizes.values())
        share = sizes[client] / median
        if share >= self.share:
            return None
        return self.finding(
            f"client {client} has {sizes[client]} records; the median client has {median:.0f}",
            measured=share,
            threshold=self.share,
            remedy=Remedy(advice="merge small clients, or a larger min_size of the split"),
            series=tuple(float(sizes[one]) for one in sorted(sizes)),
            series_name="declared records of each client",
            experience=trace.experience,
        )
