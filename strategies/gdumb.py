"""GDumb: collect a class-balanced memory, and train a new model on the memory alone.

Prabhu, Torr and Dokania, GDumb: A Simple Approach that Questions Our Progress in Continual
Learning, ECCV 2020, section 3 and algorithm 1.

    loss_i = cross entropy(record i),  records of the memory only, from the initial parameters

The sampler of the paper is greedy: it depends on the class counts so far. Here every class of every
experience has an equal share of the memory, filled at random. The greedy sampler gives the same
shares if all classes have enough records.

State: none. Memory cost: the stored records. Privacy cost: records that may be stored are used in
this and all later experiences. Under differential privacy every record is stored with the same
probability (capacity / declared number of records so far), independently of the others, so classes
have no equal shares.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from perdure.contract import MemoryPlan, Plan, PrivacyCost, Strategy, records_in, refuse_size
from perdure.tasks import Task

if TYPE_CHECKING:
    from perdure.data import Experience


@dataclass(frozen=True, kw_only=True)
class GDumb(Strategy):
    """Train a new model on a class-balanced memory after each experience.

    Args:
        memory_size: total number of stored records, or bytes such as "2 MB".
    """

    memory_size: int | str
    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost(reuses_past_records=True)
    tasks: ClassVar[tuple[type[Task], ...]] = (Task,)

    def __post_init__(self) -> None:
        refuse_size(self.memory_size)

    @classmethod
    def example(cls) -> Self:
        """Return a small instance: a memory of 16 records."""
        return cls(memory_size=16)

    def plan(self, experience: "Experience") -> Plan:
        """Return a plan to fill the memory first, and then to train a new model on it alone."""
        return Plan(
            pool="memory",
            restart=True,
            memory=MemoryPlan(capacity=records_in(self.memory_size, experience)),
        )
