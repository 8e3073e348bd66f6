"""Joint: train a new model on all records so far in every experience, as an upper bound.

    loss_i = cross entropy(record i),  records of all experiences so far in one pool

State: none. Memory: all records of all experiences. Privacy cost: every record is used again in all
later experiences, at the sampling rate of the growing pool.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from perdure.contract import Plan, PrivacyCost, Strategy
from perdure.tasks import Task

if TYPE_CHECKING:
    from perdure.data import Experience


@dataclass(frozen=True, kw_only=True)
class Joint(Strategy):
    """Retrain from the initial parameters on all records seen so far."""

    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost(reuses_past_records=True)
    tasks: ClassVar[tuple[type[Task], ...]] = (Task,)

    def plan(self, experience: "Experience") -> Plan:
        """Return a plan to train a new model on the records of all experiences so far."""
        return Plan(pool="all", restart=True)
