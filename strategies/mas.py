"""Memory aware synapses: penalise changes of parameters that the logits depend on.

Aljundi, Babiloni, Elhoseiny, Rohrbach and Tuytelaars, Memory Aware Synapses: Learning what (not) to
forget, ECCV 2018, section 4 (the global form, with the squared norm of the output).

    importance_j = sum over experiences of 1/n sum_i |d |f(x_i)|^2 / d theta_j|
                   at the end of each experience
    penalty      = strength * sum_j importance_j (theta_j - theta*_j)^2

f are the logits of the classes that a record may be predicted as. Logits of other classes were
never trained, so their dependence on parameters means nothing. No label is used. The absolute value
is taken of the gradient of each record. In the mean gradient of a batch, gradients of different
sign cancel, so its absolute value would be smaller.

State: `importance`, which adds up over experiences and is averaged over clients by declared sizes;
`anchor`, identical on all clients and kept by each.
Memory cost: twice the parameters.
Privacy cost: one release per experience. Each record contributes the absolute value of its
gradient. This has the same L2 norm as the gradient, and is clipped to the same clip norm. The sum
is divided by the declared size, and negative values are set to 0.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from perdure.contract import Forward, Plan, PrivacyCost, QuadraticPenalty, Spec, State
from perdure.data import Batch
from perdure.errors import ConfigError
from perdure.queries import AbsoluteGradient
from perdure.tasks import Task
from perdure.types import Params

if TYPE_CHECKING:
    from perdure.contract import Curator
    from perdure.data import Experience


@dataclass(frozen=True, kw_only=True)
class MAS(QuadraticPenalty):
    """Quadratic penalty weighted by the sensitivity of the squared norm of the logits.

    Args:
        strength: weight of the penalty (lambda).
    """

    strength: float
    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost(releases=1)
    weighted_by: ClassVar[tuple[str, ...]] = ("importance",)
    tasks: ClassVar[tuple[type[Task], ...]] = (Task,)

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise ConfigError.of("mas.strength", self.strength, "a finite number, 0 or more")

    @classmethod
    def example(cls) -> Self:
        """Return a small instance: a penalty of strength 0.1."""
        return cls(strength=0.1)

    def init(self, spec: Spec) -> State:
        """Create a state in which all importance is 0."""
        zeros = {name: torch.zeros_like(value) for name, value in spec.params.items()}
        return (
            State()
            .declare_group("importance", zeros, "mean")
            .declare_group("anchor", spec.params, "local")
        )

    def plan(self, experience: "Experience") -> Plan:
        """Return the plan of an experience; in the first one the penalty is 0 and not computed."""
        return Plan(applies_penalty=experience.index > 0)

    def weight(self, state: State, *groups: Tensor) -> Tensor:
        """Weights of the penalty: twice strength times importance, as the formula has no 1/2."""
        (importance,) = groups
        return 2 * self.strength * importance

    def after_experience(self, curator: "Curator", params: Params, state: State) -> State:
        """Release the importance of the experience, add it up, and set the anchor."""
        query = AbsoluteGradient(lambda forward, batch: self._terms(curator, forward, batch))
        total = curator.release(query, clip_norm=curator.clip_norm, purpose="importance")
        new = {
            name: state[f"importance/{name}"] + (total[name] / curator.declared_size).clamp(min=0)
            for name in params
        }
        return state.replace_group("importance", new).replace_group("anchor", params)

    def _terms(self, curator: "Curator", forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        possible = torch.nonzero(curator.context.allowed).flatten()
        squares = forward(batch.inputs)[..., possible].square().flatten(1).sum(1, keepdim=True)
        return squares, torch.ones_like(squares)
