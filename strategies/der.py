"""Dark experience replay: rehearse stored records with the logits the model had for them.

Buzzega, Boschini, Porrello, Abati and Calderara, Dark Experience for General Continual Learning: a
Strong, Simple Baseline, NeurIPS 2020, equations 5 and 6, algorithms 1 and 2.

    loss = mean over new of CE(x, y) + alpha * mean over stored of mean_c (z_c - h_c(x))^2
           + beta * mean over stored of CE(x, y)                                   (DER++: beta > 0)

z are the logits at the step in which the row was drawn, not at the end of its experience. The paper
draws one batch of stored rows for each of the two terms. Here one batch is used for both; it is
twice as large if you double `batch_size`.

State: none. Memory cost: the stored records and C numbers for each, and one more forward pass of
the new rows. Privacy cost: records that may be stored are used again in all later experiences.
Under differential privacy each record is stored at random, independently of the others, with the
logits of its last step, and all rows have the same weight.
"""

import math
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
    records_in,
    refuse_size,
)
from perdure.data import Batch
from perdure.errors import ConfigError
from perdure.tasks import Task

if TYPE_CHECKING:
    from perdure.data import Experience


@dataclass(frozen=True, kw_only=True)
class DER(Strategy):
    """Rehearse stored logits: `DER(memory_size=200)`.

    With stored labels, too, it is DER++: `DER(memory_size=200, beta=0.5)`.

    Args:
        memory_size: total number of stored records, or bytes such as "2 MB" (without logits).
        alpha: weight of the distance to the stored logits.
        beta: weight of the cross entropy of stored labels; above 0 for DER++.
        batch_size: number of stored records per step; None for the number of new records.
    """

    memory_size: int | str
    alpha: float = 0.5
    beta: float = 0.0
    batch_size: int | None = None
    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost(reuses_past_records=True)
    tasks: ClassVar[tuple[type[Task], ...]] = (Task,)

    def __post_init__(self) -> None:
        refuse_size(self.memory_size)
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError.of(
                    f"der.{name}", getattr(self, name), "a finite number, 0 or more"
                )

    @classmethod
    def example(cls) -> Self:
        """Return a small instance: a memory of 16 records and beta = 0.5 (DER++)."""
        return cls(memory_size=16, beta=0.5)

    def plan(self, experience: "Experience") -> Plan:
        """Return a plan with a reservoir memory that is offered the rows of every step."""
        capacity = records_in(self.memory_size, experience)
        memory = MemoryPlan(
            capacity=capacity, selection="reservoir", batch_size=self.batch_size, update="step"
        )
        return Plan(memory=memory)

    def remember(self, forward: Forward, batch: Batch, state: State) -> dict[str, Tensor]:
        """Compute the current logits over all classes, to store them with the rows."""
        return {"logits": forward(batch.inputs)}

    def losses(self, forward: Forward, batch: Batch, context: Context, state: State) -> Tensor:
        """(n,) losses: cross entropy of new rows, and the distance to stored logits of stored rows.

        Stored rows also have `beta` times their cross entropy.
        """
        logits = forward(batch.inputs)
        entropy = context.losses(logits, batch)
        if "logits" not in batch.stored:
            return entropy
        apart = (logits - batch.stored["logits"]).square().flatten(1).mean(1)
        share = context.memory_share
        of_new, of_stored = (1 / (1 - share), 1 / share) if share else (1.0, 1.0)
        stored = of_stored * (self.alpha * apart + self.beta * entropy)
        return torch.where(batch.from_memory, stored, of_new * entropy)
