"""Experience replay: train on stored records beside the new ones.

Rolnick et al., Experience Replay for Continual Learning, NeurIPS 2019; Chaudhry et al., On Tiny
Episodic Memories in Continual Learning, 2019 (reservoir and class-balanced memories); weights as in
van de Ven et al. 2022.

    weighting = "experiences":
        loss = 1/t * mean over new records + (1 - 1/t) * mean over stored records
    weighting = "equal":
        loss = mean over new and stored records together

With `Replay(selection="reservoir", weighting="equal", update="step")` it is the ER of the
literature on buffers, with a memory that takes in every step's records.

State: none; the rows live with the curator. Memory cost: the stored records.
Privacy cost: records that may be stored go on being used in all later experiences. Under
differential privacy a record is stored by its own coin, new and stored records are one pool at one
rate, and all weights are equal.
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
        memory_size: records stored in all, or bytes such as "2 MB".
        selection: see `perdure.contract.MemoryPlan`.
        per_class: fixed quota for every class of every experience instead of an equal share of
            `memory_size`.
        batch_size: stored records a step; None for as many as new ones.
        weighting: `experiences` gives the new experience the weight 1/t; `equal` gives every row
            the same.
        update: offer records to memory at the end of an `experience`, or at every `step` those that
            were in it.
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
        """Keep a memory."""
        return Plan(memory=self._memory(records_in(self.memory_size, experience)))

    def losses(self, forward: Forward, batch: Batch, context: Context, state: State) -> Tensor:
        """Cross entropy, weighted by the role of the row."""
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
