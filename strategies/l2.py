"""L2 anchoring: penalise every change of a parameter since the last experience equally.

The baseline of Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, PNAS
2017, figure 2, and of Hsu et al., Re-evaluating continual learning scenarios, NeurIPS continual
learning workshop 2018, table 2.

    penalty = strength * sum_j (theta_j - theta*_j)^2
    theta*  = the parameters after the last experience

State: `anchor`, identical on all clients and kept by each, and `held`, which is 0 in the first
experience. Memory cost: once the parameters. Privacy cost: only the gradient: the anchor is a
released model.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from perdure.contract import Plan, QuadraticPenalty, Spec, State
from perdure.errors import ConfigError
from perdure.tasks import Task
from perdure.types import Params

if TYPE_CHECKING:
    from perdure.contract import Curator
    from perdure.data import Experience


@dataclass(frozen=True, kw_only=True)
class L2(QuadraticPenalty):
    """Quadratic penalty with the same weight for every parameter.

    Args:
        strength: weight of the penalty.
    """

    strength: float
    tasks: ClassVar[tuple[type[Task], ...]] = (Task,)

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise ConfigError.of("l2.strength", self.strength, "a finite number, 0 or more")

    @classmethod
    def example(cls) -> Self:
        """Return a small instance: a penalty of strength 0.05."""
        return cls(strength=0.05)

    def init(self, spec: Spec) -> State:
        """Create the state with the anchor, which is used from the second experience on."""
        held = torch.zeros((), device=next(iter(spec.params.values())).device)
        return State().declare_group("anchor", spec.params, "local").declare("held", held, "local")

    def plan(self, experience: "Experience") -> Plan:
        """Return the plan of an experience; in the first one the penalty is 0 and not computed."""
        return Plan(applies_penalty=experience.index > 0)

    def weight(self, state: State, *groups: Tensor) -> Tensor:
        """Weight of the penalty: twice the strength, because the formula has no factor 1/2."""
        return 2 * self.strength * state["held"]

    def after_experience(self, curator: "Curator", params: Params, state: State) -> State:
        """Store the current parameters as the next anchor."""
        return state.replace_group("anchor", params).replace(
            {"held": torch.ones_like(state["held"])}
        )
