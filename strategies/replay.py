"""Experience replay: train on stored records together with the new ones.

Rolnick et al., Experience Replay for Continual Learning, NeurIPS 2019; Chaudhry et al., On Tiny
Episodic Memories in Continual Learning, 2019 (reservoir and class-balanced memories); weights as in
van de Ven et al. 2022.

    weighting = "experiences":
        loss = 1/t * mean over new records + (1 - 1/t) * mean over stored records
    weighting = "equal":
        loss = mean over new and stored records together

`Replay(selection="reservoir", weighting="equal", update="step")` is ER as in the literature on
online learning: the memory is updated with the records of every step.

State: none; the curator holds the stored rows. Memory cost: the stored records. Privacy cost:
records that may be stored are used again in all later experiences. Under differential privacy each
record is stored at random, independently of the others; new and stored records are one pool with
one sampling rate, and all weights are equal.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from torch import Tensor

from perdure.contract import (
    Context,
    Forward,
    MemoryPlan,
    Plan,
    PrivacyCost,
    Selection,
    State,
    Strategy,
    Update,
    records_in,
    refuse_size,
    task_losses,
)
from perdure.data import Batch
from perdure.errors import ConfigError
from perdure.tasks import Task

if TYPE_CHECKING:
    from perdure.data import Experience


@dataclass(frozen=True, kw_only=True)
class Replay(Strategy):
    """Rehearse stored records.

    Args:
        memory_size: total number of stored records, or bytes such as "2 MB".
        selection: choice of the stored records, as in `perdure.contract.MemoryPlan`.
        per_class: number of stored records for each class of each experience, instead of an equal
            share of `memory_size`.
        batch_size: number of stored records per step; None for the number of new records.
        weighting: `experiences` gives the new experience the weight 1/t; `equal` gives every row
            the same weight.
        update: `experience` offers all records to the memory at the end of the experience; `step`
            offers the rows of each step after that step.
    """

    memory_size: int | str
    selection: Selection = "class-balanced"
    per_class: int | None = None
    batch_size: int | None = None
    weighting: Literal["experiences", "equal"] = "experiences"
    update: Update = "experience"
    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost(reuses_past_records=True)
    tasks: ClassVar[tuple[type[Task], ...]] = (Task,)

    def __post_init__(self) -> None:
        refuse_size(self.memory_size)
        self._memory(1 if isinstance(self.memory_size, str) else self.memory_size)
        if self.weighting not in ("experiences", "equal"):
            raise ConfigError.of("replay.weighting", self.weighting, ("experiences", "equal"))

    @classmethod
    def example(cls) -> Self:
        """Return a small instance: a memory of 16 records."""
        return cls(memory_size=16)

    def plan(self, experience: "Experience") -> Plan:
        """Return a plan with a memory for rehearsal."""
        return Plan(memory=self._memory(records_in(self.memory_size, experience)))

    def losses(self, forward: Forward, batch: Batch, context: Context, state: State) -> Tensor:
        """Return (n,) cross entropy, with other weights for stored rows than for new rows."""
        losses = task_losses(forward, batch, context)
        if self.weighting == "equal" or context.memory_share == 0:
            return losses
        new_share = 1 / (context.experience + 1)
        of_new = new_share / (1 - context.memory_share)
        of_memory = (1 - new_share) / context.memory_share
        return losses * torch.where(batch.from_memory, of_memory, of_new)

    def _memory(self, capacity: int) -> MemoryPlan:
        return MemoryPlan(
            capacity=capacity,
            selection=self.selection,
            per_class=self.per_class,
            batch_size=self.batch_size,
            update=self.update,
        )
