"""Averaged gradient episodic memory: no step against the mean gradient of stored records.

Chaudhry, Ranzato, Rohrbach and Elhoseiny, Efficient Lifelong Learning with A-GEM, ICLR 2019,
equations 10 and 11.

    g' = g                                      where <g, r> >= 0
    g' = g - <g, r> / <r, r> r                  otherwise,  r = mean gradient of stored records

State: none. Memory cost: the stored records, and one more gradient per step. Privacy cost: in
addition to the gradient of new records, one reference gradient per step over the stored records,
charged to every partition that may be in memory. The projection costs no privacy.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from perdure.contract import (
    MemoryPlan,
    Plan,
    PrivacyCost,
    Selection,
    State,
    Strategy,
    records_in,
    refuse_size,
)
from perdure.tasks import Task
from perdure.types import Params

if TYPE_CHECKING:
    from perdure.contract import Curator
    from perdure.data import Experience


@dataclass(frozen=True, kw_only=True)
class AGEM(Strategy):
    """Project the gradient so that, to first order, the loss of stored records does not grow.

    Args:
        memory_size: total number of stored records, or bytes such as "2 MB".
        selection: choice of the stored records, as in `perdure.contract.MemoryPlan`.
        per_class: number of stored records for each class of each experience, instead of an equal
            share of `memory_size`.
        batch_size: number of stored records in the reference gradient of a step; None for the
            number of new records.
    """

    memory_size: int | str
    selection: Selection = "class-balanced"
    per_class: int | None = None
    batch_size: int | None = None
    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost(references=1, reuses_past_records=True)
    tasks: ClassVar[tuple[type[Task], ...]] = (Task,)

    def __post_init__(self) -> None:
        refuse_size(self.memory_size)

    @classmethod
    def example(cls) -> Self:
        """Return a small instance: a memory of 16 records."""
        return cls(memory_size=16)

    def plan(self, experience: "Experience") -> Plan:
        """Return a plan with a memory for reference gradients only, which is not rehearsed."""
        return Plan(
            memory=MemoryPlan(
                capacity=records_in(self.memory_size, experience),
                selection=self.selection,
                per_class=self.per_class,
                batch_size=self.batch_size,
                use="reference",
            )
        )

    def references(self, curator: "Curator", params: Params, state: State) -> tuple[Params, ...]:
        """Return the mean gradient of stored records; none in the first experience."""
        if curator.context.experience == 0:
            return ()
        losses = lambda forward, batch: self.losses(forward, batch, curator.context, state)  # noqa: E731
        return (curator.reference(losses, params),)

    def project(self, gradient: Params, references: tuple[Params, ...], state: State) -> Params:
        """Remove the component of the gradient that points against the reference gradient."""
        return against(gradient, references[0]) if references else gradient


def against(gradient: Params, reference: Params) -> Params:
    """Project a gradient orthogonally to a reference, if their inner product is negative."""
    along = torch.stack([(gradient[name] * reference[name]).sum() for name in gradient]).sum()
    length = torch.stack([reference[name].square().sum() for name in gradient]).sum()
    part = along.clamp(max=0) / length.clamp(min=torch.finfo(length.dtype).tiny)
    return {name: value - part * reference[name] for name, value in gradient.items()}
