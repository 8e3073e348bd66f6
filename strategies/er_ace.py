"""Experience replay with asymmetric cross entropy: new records have no old classes in their loss.

Caccia, Aljundi, Asadi, Tuytelaars, Pineau and Belilovsky, New Insights on Reducing Abrupt
Representation Change in Online Continual Learning, ICLR 2022, section 4.1 and algorithm 1.

    loss = mean over new of CE over the classes of this experience
           + mean over stored of CE over all classes seen

In the paper, the loss of new rows has the classes of their batch. Here it has the declared classes
of the experience, so that the loss of a row depends on that row alone.

State: none. Memory cost: the stored records. Privacy cost: records that may be stored are used
again in all later experiences. Under differential privacy each record is stored at random,
independently of the others, and all rows have the same weight. Memory then has records of earlier
experiences only, so no loss compares new classes with old ones before the next experience. The
newest classes are predicted badly, and `Replay` is the better choice.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from perdure.contract import (
    Context,
    Forward,
    MemoryPlan,
    Plan,
    PrivacyCost,
    State,
    Strategy,
    Update,
    records_in,
    refuse_single_class,
    refuse_size,
)
from perdure.data import Batch
from perdure.tasks import MultiLabel, SingleLabel, Task

if TYPE_CHECKING:
    from perdure.data import Experience


@dataclass(frozen=True, kw_only=True)
class ERACE(Strategy):
    """Rehearse stored records; the loss of new records has the classes of their experience only.

    Args:
        memory_size: total number of stored records, or bytes such as "2 MB".
        batch_size: number of stored records per step; None for the number of new records.
        update: `step` offers the rows of each step to the memory after that step, as in the paper;
            `experience` offers all records at the end of the experience.
    """

    memory_size: int | str
    batch_size: int | None = None
    update: Update = "step"
    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost(reuses_past_records=True)
    tasks: ClassVar[tuple[type[Task], ...]] = (SingleLabel, MultiLabel)
    tasks_because: ClassVar[str] = "it keeps new records to the classes of their experience"

    def __post_init__(self) -> None:
        refuse_size(self.memory_size)

    @classmethod
    def example(cls) -> Self:
        """Return a small instance: a memory of 16 records."""
        return cls(memory_size=16)

    def plan(self, experience: "Experience") -> Plan:
        """Return a plan with a reservoir memory.

        Raises:
            StrategyError: if the experience has one class and records enter the memory only at its
                end, because the loss of new rows compares only the classes of the experience.
        """
        if self.update == "experience":
            refuse_single_class(self.name, experience)
        return Plan(
            memory=MemoryPlan(
                capacity=records_in(self.memory_size, experience),
                selection="reservoir",
                batch_size=self.batch_size,
                update=self.update,
            )
        )

    def losses(self, forward: Forward, batch: Batch, context: Context, state: State) -> Tensor:
        """(n,) cross entropy: new rows over the experience's classes, stored rows over all seen."""
        allowed = context.allowed_for(batch)
        own = context.current if allowed is None else context.current & allowed
        allowed = torch.ones_like(own) if allowed is None else allowed
        mask = torch.where(batch.from_memory[:, None], allowed, own)
        losses = context.task.losses(forward(batch.inputs), batch.labels, mask)
        share = context.memory_share
        of_new, of_stored = (1 / (1 - share), 1 / share) if share else (1.0, 1.0)
        return losses * torch.where(batch.from_memory, of_stored, of_new)
