"""Synaptic intelligence: penalise changes of parameters that contributed to lower losses.

Zenke, Poole and Ganguli, Continual Learning Through Synaptic Intelligence, ICML 2017, section 3,
equations 3 to 5.

    path_j       = sum over the steps of an experience of -g_j (theta_j after - theta_j before)
    importance_j = sum over experiences of path_j / (moved_j^2 + damping)
    moved_j      = theta_j at the end - theta_j at the start
    penalty      = strength * sum_j max(0, importance_j) (theta_j - theta*_j)^2

g is the released gradient of the loss without the penalty, as in the paper. The movement of theta_j
is the optimiser's step, with penalty and momentum. (The reference code of van de Ven et al. 2022
has the gradient with the penalty.)

State: `importance`, which adds up over experiences and is averaged over clients by declared sizes;
`path` and `anchor`, kept by each client. All clients divide by the same distance, from the common
anchor to the global parameters, so the average of importances is the importance of the averaged
path. The path of a client contains neither the averaging by the server nor the rounds in which the
client does not train. So if a fraction p of the clients trains in each round, importances are p
times as large as with all clients: divide `strength` by p. Memory cost: three times the parameters,
and a copy of them during a step. Privacy cost: only the gradient: SI uses the released gradient and
the parameters.

Under privacy the released gradient has noise of known variance s^2, which also changes the
parameters. With SGD and learning rate r, the noise adds r s^2 to every coordinate of the path in
every step. This gives all parameters the same meaningless importance. `add_progress` subtracts it:
exactly in expectation for plain SGD, and too much with momentum.
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
from perdure.utils import pieces

if TYPE_CHECKING:
    from perdure.contract import Curator
    from perdure.data import Experience


@dataclass(frozen=True, kw_only=True)
class SI(QuadraticPenalty):
    """Quadratic penalty weighted by each parameter's contribution to past decreases of the loss.

    The contribution is divided by the squared distance that the parameter moved.

    Args:
        strength: weight of the penalty (c).
        damping: number added to the squared distance (xi); it limits the importance of parameters
            that hardly moved.
    """

    strength: float
    damping: float = 0.1
    weighted_by: ClassVar[tuple[str, ...]] = ("importance",)
    tasks: ClassVar[tuple[type[Task], ...]] = (Task,)

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise ConfigError.of("si.strength", self.strength, "a finite number, 0 or more")
        if not 0 < self.damping < math.inf:
            raise ConfigError.of("si.damping", self.damping, "a finite number above 0")

    @classmethod
    def example(cls) -> Self:
        """Return a small instance: a penalty of strength 0.5."""
        return cls(strength=0.5)

    def init(self, spec: Spec) -> State:
        """Create a state in which all importance is 0 and the path is empty."""
        zeros = {name: torch.zeros_like(value) for name, value in spec.params.items()}
        state = (
            State().declare_group("importance", zeros, "mean").declare_group("path", zeros, "local")
        )
        return state.declare_group("anchor", spec.params, "local")

    def plan(self, experience: "Experience") -> Plan:
        """Return the plan of an experience; in the first one the penalty is 0 and not computed."""
        return Plan(applies_penalty=experience.index > 0)

    def weight(self, state: State, *groups: Tensor) -> Tensor:
        """Weights of the penalty: twice strength times importance, 0 for negative importance."""
        (importance,) = groups
        return 2 * self.strength * importance.clamp(min=0)

    def after_step(
        self,
        before: Params,
        after: Params,
        gradient: Params,
        state: State,
        noise_variance: float = 0.0,
    ) -> State:
        """Add a step to the path of each parameter."""
        # the same arithmetic as in place, so that a resumed run ends in the same bits
        own = state.replace_group("path", {name: state[f"path/{name}"].clone() for name in before})
        return self.after_step_in_place(before, after, gradient, own, noise_variance)

    def after_step_in_place(
        self,
        before: Params,
        after: Params,
        gradient: Params,
        state: State,
        noise_variance: float = 0.0,
    ) -> State:
        """Add a step to the path of each parameter, in place."""
        for name, value in before.items():
            tensors = (state[f"path/{name}"], value, after[name], gradient[name])
            add_progress(*tensors, noise_variance)
        return state

    def after_experience(self, curator: "Curator", params: Params, state: State) -> State:
        """Compute importance from the path, and begin a new path at the current parameters."""
        new = {
            name: state[f"importance/{name}"]
            + state[f"path/{name}"] / ((value - state[f"anchor/{name}"]).square() + self.damping)
            for name, value in params.items()
        }
        fresh = {name: torch.zeros_like(value) for name, value in params.items()}
        return (
            state.replace_group("importance", new)
            .replace_group("path", fresh)
            .replace_group("anchor", params)
        )


def add_progress(
    path: Tensor, before: Tensor, after: Tensor, gradient: Tensor, noise_variance: float = 0.0
) -> None:
    """Add, in place, the part of each coordinate in a step's first-order decrease of the loss.

    The part is -g (after - before).

    Noise of variance s^2 in every coordinate of g also moves the parameters, which adds r s^2 to
    the part in a step of size r g. This is subtracted, with the rate r of each tensor estimated
    from the step: r = -<g, after - before> / |g|^2. The estimate is exact in expectation for SGD
    without a penalty, and an average over the tensor for optimisers with one rate per coordinate.

    Args:
        path: path of one parameter; it is changed.
        before: the parameter before the step.
        after: the parameter after the step.
        gradient: the released gradient.
        noise_variance: s^2 of the mean gradient; 0 without privacy.
    """
    won = torch.zeros((), device=path.device)
    energy = torch.zeros((), device=path.device)
    for out, start, end, slope in pieces(path, before, after, gradient):
        step = end - start
        step.mul_(slope)
        out.sub_(step)
        if noise_variance:
            won = won - step.sum()
            energy = energy + slope.square().sum()
    if noise_variance:
        tiny = torch.finfo(torch.float32).tiny
        path.sub_((won / energy.clamp(min=tiny)).clamp(min=0) * noise_variance)
