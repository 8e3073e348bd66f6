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
candidates. If no layer of the model depends on the mode, the gradient of the new rows serves both
the virtual step and the real one, so the training pass has the chosen rows only. Privacy cost:
refused under differential privacy.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

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
from perdure.utils import evaluating, ignores_mode

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
        is_new = ~batch.from_memory & batch.valid
        is_old = batch.from_memory & batch.valid
        new = torch.nonzero(is_new).flatten()
        old = torch.nonzero(is_old).flatten()
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
        current = batch.among(is_new)
        named = forward.module.named_parameters()
        own: Params = {name: value for name, value in named if value.requires_grad}
        slope, known = self._slope(forward, current, context, own)
        scores = self._scores(forward, batch.among(is_old), context, own, slope)
        chosen = old[scores.argsort(descending=True, stable=True)[:wanted]]
        # only the rows with a weight, because a pass with gradients costs three without
        rows = torch.cat([new, chosen])
        if known is None:
            losses = task_losses(forward, batch.at(rows), context)
        else:
            learnt: Tensor = _Differentiated.apply(known, *own.values(), *slope.values())
            losses = torch.cat([learnt, task_losses(forward, batch.at(chosen), context)])
        share = torch.where(torch.arange(len(rows)) < len(new), 1 / len(new), 1 / len(chosen))
        weighted = losses * batch.valid.sum() * share.to(losses)
        return torch.zeros_like(batch.valid, dtype=losses.dtype).scatter(0, rows, weighted)

    def _slope(
        self, forward: Forward, new: Batch, context: Context, own: Params
    ) -> tuple[Params, Tensor | None]:
        """Return the gradient of the mean loss of the `new` rows, and their losses (m,).

        The losses are None if training mode could give others.

        Args:
            forward: the model.
            new: new rows of the step.
            context: context of the step.
            own: parameters of the model by name.
        """
        module = forward.module
        with evaluating(module):
            if forward.params is not None:

                def loss(params: Params) -> Tensor:
                    return task_losses(Forward(module, params), new, context).mean()

                return torch.func.grad(loss)({**own, **forward.params}), None
            with torch.enable_grad():  # always here in a step; a third faster than torch.func
                losses = task_losses(Forward(module), new, context)
                mean = losses.mean()
            found = torch.autograd.grad(
                mean, list(own.values()), allow_unused=True, materialize_grads=True
            )
        known = losses.detach() if torch.is_grad_enabled() and ignores_mode(module) else None
        return dict(zip(own, found, strict=True)), known

    def _scores(
        self, forward: Forward, old: Batch, context: Context, own: Params, slope: Params
    ) -> Tensor:
        """(n,) increase of the loss of each `old` row by a virtual step against the slope."""
        here = {**own, **(forward.params or {})}
        with evaluating(forward.module), torch.no_grad():
            before = task_losses(forward, old, context)
        there = {n: torch.sub(value, slope[n], alpha=self.rate) for n, value in here.items()}
        return task_losses(forward.at(there), old, context) - before


class _Differentiated(torch.autograd.Function):
    """Losses (m,) of rows with equal weights, whose mean was differentiated already.

    The virtual step has the gradient that the real step needs, so no second pass computes it.
    """

    @staticmethod
    def forward(ctx: Any, losses: Tensor, *tensors: Tensor) -> Tensor:
        """Return the losses; `tensors` are all parameters, then the gradients of the mean loss."""
        ctx.save_for_backward(*tensors[len(tensors) // 2 :])
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the losses, added up with equal weights (m,)."""
        slopes = ctx.saved_tensors
        weight = weights[0].sum()
        return (None, *(weight * slope for slope in slopes), *[None] * len(slopes))
