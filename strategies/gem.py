"""Gradient episodic memory: no step against the gradient of any earlier experience.

Lopez-Paz and Ranzato, Gradient Episodic Memory for Continual Learning, NeurIPS 2017, equations 8 to
12.

    g'  = argmin |g' - g|^2   with   <g', r_k> >= 0 for every earlier experience k
    r_k = mean gradient of its stored records

At every step `batch_size` of the stored records are drawn. (The authors' code takes all of them:
set `batch_size` to the number of stored records of a task.) The problem is solved by its dual, a
quadratic program with one variable per earlier experience:

    v = argmin v^T R R^T v / 2 + g^T R^T v   with   v >= margin,     g' = R^T v + g

State: none. Memory cost: the stored records, and one more gradient per step for every earlier
experience. Privacy cost: one reference gradient per step for every earlier experience. Each is over
the stored records of that experience alone and is charged to its partition. The projection costs no
privacy.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

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
from perdure.errors import ConfigError
from perdure.tasks import Task
from perdure.types import Params

if TYPE_CHECKING:
    from perdure.contract import Curator
    from perdure.data import Experience

RIDGE = 1e-3
"""Number that is added to the diagonal of the quadratic program, so that it has one solution.

It is the value of the authors' code, but for reference gradients scaled to length 1, so its effect
does not depend on the size of the gradients.
"""


@dataclass(frozen=True, kw_only=True)
class GEM(Strategy):
    """Project the gradient so that, to first order, the loss of no earlier experience grows.

    Args:
        memory_size: total number of stored records, or bytes such as "2 MB".
        selection: choice of the stored records, as in `perdure.contract.MemoryPlan`.
        per_class: number of stored records for each class of each experience, instead of an equal
            share of `memory_size`.
        batch_size: number of stored records in each reference gradient of a step; None for the
            number of new records.
        margin: lower bound of the dual variables (gamma); with a bound above 0, steps also follow
            the gradients of earlier experiences.
    """

    memory_size: int | str
    selection: Selection = "ring"
    per_class: int | None = None
    batch_size: int | None = None
    margin: float = 0.5
    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost(references=1, reuses_past_records=True)
    not_vmappable_because: ClassVar[str | None] = (
        "its quadratic program is solved on the host, one at a time"
    )
    tasks: ClassVar[tuple[type[Task], ...]] = (Task,)

    def __post_init__(self) -> None:
        refuse_size(self.memory_size)
        if not 0 <= self.margin < math.inf:
            raise ConfigError.of("gem.margin", self.margin, "a finite number, 0 or more")

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
                use="references",
            )
        )

    def references(self, curator: "Curator", params: Params, state: State) -> tuple[Params, ...]:
        """Return the mean gradient of the stored records of each earlier experience."""
        losses = lambda forward, batch: self.losses(forward, batch, curator.context, state)  # noqa: E731
        return tuple(
            curator.reference(losses, params, of=k) for k in range(curator.context.experience)
        )

    def project(self, gradient: Params, references: tuple[Params, ...], state: State) -> Params:
        """Solve the quadratic program if a reference gradient points against the gradient."""
        if not references:
            return gradient
        own = flat(gradient)
        others = torch.stack([flat(reference) for reference in references])
        along = others @ own
        if bool((along >= 0).all()):
            return gradient
        nearest = own + others.T @ dual(others @ others.T, along, self.margin)
        pieces = torch.split(nearest, [value.numel() for value in gradient.values()])
        return {
            name: piece.view_as(value)
            for (name, value), piece in zip(gradient.items(), pieces, strict=True)
        }


def flat(gradient: Params) -> Tensor:
    """Concatenate all tensors of a gradient into one vector, for inner products."""
    return torch.cat([value.flatten() for value in gradient.values()])


def dual(gram: Tensor, along: Tensor, margin: float) -> Tensor:
    """Return (k,) dual variables of the quadratic program, from R R^T (k, k) and R g (k,).

    The program is solved for references of length 1 and a scaled gradient; a common factor does not
    change the solution.
    """
    import numpy as np
    import quadprog  # not qpsolvers, which imports every solver it finds, JAX among them

    matrix, vector = (value.detach().double().cpu().numpy() for value in (gram, along))
    lengths = np.sqrt(matrix.diagonal())
    lengths[lengths == 0] = 1.0  # a reference of 0 excludes no direction
    unit = np.eye(len(vector))
    slope = vector / lengths
    least = margin * lengths
    size = max(np.abs(slope).max(), least.max())
    found = quadprog.solve_qp(
        matrix / np.outer(lengths, lengths) + RIDGE * unit, -slope / size, unit, least / size
    )[0]
    return torch.from_numpy(found * size / lengths).to(gram)
