"""FedProx: pull the parameters of a client towards the global parameters of the round.

Li, Sahu, Zaheer, Sanjabi, Talwalkar and Smith, Federated optimization in heterogeneous networks,
MLSys 2020, section 3.2, equation 2 and algorithm 2:

    penalty = strength / 2 * sum_j (theta_j - theta^t_j)^2
    theta^t = the parameters with which the round starts

Use it alone, or with any strategy that trains by gradients: `Combine(FedProx(strength=0.1),
Replay(memory_size=200))`. Without a federation the rounds are the blocks of the learner, so one
block per experience pulls towards the parameters before the experience.

State: `anchor`, the parameters at the start of the round, identical on all clients of the round and
kept by each. Memory cost: once the parameters. Privacy cost: only the gradient: the anchor is a
released model.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from perdure.contract import QuadraticPenalty, Spec, State
from perdure.errors import ConfigError
from perdure.tasks import Task
from perdure.types import Params


@dataclass(frozen=True, kw_only=True)
class FedProx(QuadraticPenalty):
    """Quadratic penalty around the parameters with which a round starts.

    Args:
        strength: weight of the penalty (mu).
    """

    strength: float
    tasks: ClassVar[tuple[type[Task], ...]] = (Task,)

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise ConfigError.of("fed_prox.strength", self.strength, "a finite number, 0 or more")

    @classmethod
    def example(cls) -> Self:
        """Return a small instance: a penalty of strength 0.1."""
        return cls(strength=0.1)

    def init(self, spec: Spec) -> State:
        """Create the state with the anchor, which every round replaces."""
        return State().declare_group("anchor", spec.params, "local")

    def begin_round(self, params: Params, state: State) -> State:
        """Store the parameters of the round as the anchor."""
        return state.replace_group("anchor", params)

    def weight(self, state: State, *groups: Tensor) -> Tensor:
        """Weight of the penalty: the strength, for every parameter."""
        return torch.tensor(self.strength)
