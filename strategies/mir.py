"""Maximally interfered retrieval: rehearse the records that the coming step would harm most.

Aljundi, Belilovsky, Tuytelaars, Charlin, Caccia, Lin and Page-Caccia, Online Continual Learning
with Maximal Interfered Retrieval, NeurIPS 2019, section 3.1 (ER-MIR, criterion s_MI-1), algorithm
1.

    theta_v = theta - rate * grad of mean over new of CE(x, y; theta)
    score_i = CE(x_i, y_i; theta_v) - CE(x_i, y_i; theta)        for the stored candidates of a step
    loss    = mean over new of CE(x, y; theta) + mean over chosen of CE(x, y; theta)

chosen are the `batch_size` candidates of the highest score. The sum of two means is that of the
authors' code, whose virtual step is at the rate of the optimiser. Candidates are drawn from all
that is stored, records of the present experience included, which the authors' code leaves out.
Scores are found in evaluation mode, so that dropout or BatchNorm do not tell them apart. As many
candidates as chosen is experience replay: nothing is selected.

The virtual step is of all new rows of the step, and every candidate is ranked against all others:
the loss of a row depends on the others. So `micro_batch_size` must not cut the batch, which is
refused; nor can one record's influence be bounded, as it moves which others count.

State: none. Memory cost: the stored records. A step takes a pass with its gradient, and one
without, on top, over the new rows and all candidates.
Privacy cost: refused under differential privacy.
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
    cross_entropy,
    records_in,
    refuse_size,
)
from perdure.data import Batch
from perdure.errors import ConfigError, StrategyError
from perdure.types import Params
from perdure.utils import evaluating

if TYPE_CHECKING:
    from perdure.data import Experience


@dataclass(frozen=True, kw_only=True)
class MIR(Strategy):
    """Rehearse, out of many stored records, those that the new ones interfere with.

    Args:
        memory_size: records stored in all, or bytes such as "2 MB".
        candidates: stored records of a step that are looked at (C).
        batch_size: how many of them are rehearsed, 50 and 10 in the paper; None for as many as new
            ones.
        rate: of the virtual step; that of the optimiser in the paper.
    """

    memory_size: int | str
    candidates: int = 50
    batch_size: int | None = 10
    rate: float = 0.1
    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost(reuses_past_records=True)
    couples_records: ClassVar[bool] = True

    def __post_init__(self) -> None:
        refuse_size(self.memory_size)
        if not 0 < self.rate < math.inf:
            raise ConfigError.of("mir.rate", self.rate, "a finite number above 0")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError.of("mir.batch_size", self.batch_size, "1 or more records, or none")
        if self.candidates < (self.batch_size or 1):
            raise ConfigError.of(
                "mir.candidates", self.candidates, "at least batch_size records, of which to choose"
            )

    @classmethod
    def example(cls) -> Self:
        """Return a small instance: a memory of 16 records and 12 candidates a step."""
        return cls(memory_size=16, candidates=12)

    def plan(self, experience: "Experience") -> Plan:
        """Keep a reservoir that takes in the rows of every step, and bring back the candidates."""
        capacity = records_in(self.memory_size, experience)
        return Plan(
            memory=MemoryPlan(
                capacity=capacity, selection="reservoir", batch_size=self.candidates, update="step"
            )
        )

    def losses(self, forward: Forward, batch: Batch, context: Context, state: State) -> Tensor:
        """Cross entropy of new rows and of the chosen candidates; 0 for the other candidates.

        Raises:
            StrategyError: where the batch was cut, or there are no more candidates than are
                rehearsed.
        """
        losses = cross_entropy(forward, batch, context)
        if context.memory_share == 0:
            return losses
        old = batch.from_memory & batch.valid
        new = ~batch.from_memory & batch.valid
        if not bool(old.any() & new.any()):
            raise StrategyError(
                "MIR ranks all rows of a step together; give Learner(micro_batch_size=None)"
            )
        wanted = new.sum() if self.batch_size is None else torch.as_tensor(self.batch_size)
        if self.batch_size is None and int(wanted) >= self.candidates:
            raise StrategyError(
                f"MIR looks at {self.candidates} stored rows to rehearse {int(wanted)}: it "
                "leaves out "
                "none; give more candidates or a batch_size"
            )
        chosen = highest(self._scores(forward, batch, context, new), old, wanted)
        return losses * batch.valid.sum() * (new / new.sum() + chosen / chosen.sum())

    def _scores(self, forward: Forward, batch: Batch, context: Context, new: Tensor) -> Tensor:
        """(n,) by how much a virtual step on the `new` rows raises the loss of each."""

        def loss(params: Params) -> tuple[Tensor, Tensor]:
            each = cross_entropy(Forward(forward.module, params), batch, context)
            return (each * new).sum() / new.sum(), each

        trained = {
            name: value.detach()
            for name, value in forward.module.named_parameters()
            if value.requires_grad
        }
        here = {**trained, **(forward.params or {})}
        with evaluating(forward.module):
            slope, now = torch.func.grad(loss, has_aux=True)(here)
        there = {name: value - self.rate * slope[name] for name, value in here.items()}
        rise: Tensor = cross_entropy(forward.at(there), batch, context) - now
        return rise


def highest(scores: Tensor, among: Tensor, wanted: Tensor) -> Tensor:
    """(n,) bool: the `wanted` highest of the scores (n,) `among` (n,) bool.

    All where there are fewer.
    """
    order = torch.where(among, scores, -torch.inf).argsort(descending=True, stable=True)
    return among & (order.argsort() < wanted)
