"""Maximally interfered retrieval: rehearse the records whose loss the next step raises most.

Aljundi, Belilovsky, Tuytelaars, Charlin, Caccia, Lin and Page-Caccia, Online Continual Learning
with Maximal Interfered Retrieval, NeurIPS 2019, section 3.1 (ER-MIR, criterion s_MI-1), algorithm
1.

    theta_v = theta - rate * grad of mean over new of CE(x, y; theta)
    score_i = CE(x_i, y_i; theta_v) - CE(x_i, y_i; theta)        for the stored candidates of a step
    loss    = mean over new of CE(x, y; theta) + mean over chosen of CE(x, y; theta)

The chosen rows are the `batch_size` candidates with the highest scores. The sum of two means is as
in the authors' code, whose virtual step has the learning rate of the optimiser. Candidates are
drawn from all stored records, also from records of the current experience, which the authors' code
leaves out. Scores are computed in evaluation mode, so that dropout and BatchNorm do not change
them. If there are no more candidates than chosen rows, this is experience replay.

The virtual step uses all new rows of the step, and every candidate is compared with all others, so
the loss of a row depends on other rows. A smaller `micro_batch_size` is therefore refused. The
influence of one record cannot be bounded, because it changes which other records are chosen.

State: none. Memory cost: the stored records. In addition to the training pass over new and chosen
rows, a step takes one pass with gradient over the new rows and two passes without gradient over the
candidates. Privacy cost: refused under differential privacy.
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
    task_losses,
)
from perdure.data import Batch
from perdure.errors import ConfigError, StrategyError
from perdure.tasks import Task
from perdure.types import Params
from perdure.utils import evaluating

if TYPE_CHECKING:
    from perdure.data import Experience


@dataclass(frozen=True, kw_only=True)
class MIR(Strategy):
    """Rehearse the stored records whose loss a step on the new records would raise most.

    Args:
        memory_size: total number of stored records, or bytes such as "2 MB".
        candidates: number of stored records that are compared in each step (C); 50 in the paper.
        batch_size: number of candidates that are rehearsed; 10 in the paper; None for the number of
            new records.
        rate: learning rate of the virtual step; the authors' code uses the learning rate of the
            optimiser.
    """

    memory_size: int | str
    candidates: int = 50
    batch_size: int | None = 10
    rate: float = 0.1
    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost(reuses_past_records=True)
    couples_records: ClassVar[bool] = True
    tasks: ClassVar[tuple[type[Task], ...]] = (Task,)

    def __post_init__(self) -> None:
        refuse_size(self.memory_size)
        if not 0 < self.rate < math.inf:
            raise ConfigError.of("mir.rate", self.rate, "a finite number above 0")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError.of("mir.batch_size", self.batch_size, "1 or more records, or None")
        if self.candidates < (self.batch_size or 1):
            raise ConfigError.of(
                "mir.candidates", self.candidates, "at least batch_size records to choose from"
            )

    @classmethod
    def example(cls) -> Self:
        """Return a small instance: a memory of 16 records and 12 candidates per step."""
        return cls(memory_size=16, candidates=12)

    def plan(self, experience: "Experience") -> Plan:
        """Return a plan with a reservoir memory, from which each step draws candidates."""
        capacity = records_in(self.memory_size, experience)
        return Plan(
            memory=MemoryPlan(
                capacity=capacity, selection="reservoir", batch_size=self.candidates, update="step"
            )
        )

    def losses(self, forward: Forward, batch: Batch, context: Context, state: State) -> Tensor:
        """(n,) cross entropy of new rows and of the chosen candidates; 0 for other candidates.

        Raises:
            StrategyError: if the batch was split into micro-batches, or there are no more
                candidates than rehearsed rows.
        """
        if context.memory_share == 0:
            return task_losses(forward, batch, context)
        new = torch.nonzero(~batch.from_memory & batch.valid).flatten()
        old = torch.nonzero(batch.from_memory & batch.valid).flatten()
        if not (len(new) and len(old)):
            raise StrategyError(
                "MIR compares all rows of a step with each other; give "
                "Learner(micro_batch_size=None)"
            )
        wanted = len(new) if self.batch_size is None else self.batch_size
        if self.batch_size is None and wanted >= self.candidates:
            raise StrategyError(
                f"MIR would rehearse {wanted} of {self.candidates} candidates, so there is no "
                "choice; give more candidates, or a smaller batch_size"
            )
        scores = self._scores(forward, batch.at(new), batch.at(old), context)
        chosen = old[scores.argsort(descending=True, stable=True)[:wanted]]
        # only the rows with a weight, because a pass with gradients costs three without
        rows = torch.cat([new, chosen])
        losses = task_losses(forward, batch.at(rows), context)
        share = torch.where(torch.arange(len(rows)) < len(new), 1 / len(new), 1 / len(chosen))
        weighted = losses * batch.valid.sum() * share.to(losses)
        return torch.zeros_like(batch.valid, dtype=losses.dtype).scatter(0, rows, weighted)

    def _scores(self, forward: Forward, new: Batch, old: Batch, context: Context) -> Tensor:
        """(n,) increase of the loss of each `old` row by a virtual step on the `new` rows."""

        def loss(params: Params | None) -> Tensor:
            return task_losses(Forward(forward.module, params), new, context).mean()

        own = {n: value for n, value in forward.module.named_parameters() if value.requires_grad}
        here = {**own, **(forward.params or {})}
        with evaluating(forward.module):
            if forward.params is None:  # always the case in a step; a third faster than torch.func
                with torch.enable_grad():
                    mean = loss(None)
                found = torch.autograd.grad(
                    mean, list(own.values()), allow_unused=True, materialize_grads=True
                )
                slope = dict(zip(own, found, strict=True))
            else:
                slope = torch.func.grad(loss)(here)
            with torch.no_grad():
                before = task_losses(forward, old, context)
        there = {n: torch.sub(value, slope[n], alpha=self.rate) for n, value in here.items()}
        return task_losses(forward.at(there), old, context) - before
