"""SCAFFOLD: correct the gradients of a client by the difference between its own and the mean one.

Karimireddy, Kale, Mohri, Reddi, Stich and Suresh, SCAFFOLD: stochastic controlled averaging for
federated learning, ICML 2020, section 4, algorithm 1, option II:

    gradient_i  <-  g_i - c_i + c
    c_i         <-  c_i - c + (x - y_i) / (K lr)  =  mean of g_i over the K steps of the round
    c           <-  c + 1 / N  sum over the clients of the round of (new c_i - old c_i)

The right-hand side of c_i is that of plain SGD; here it is taken for every optimiser, as the mean
of the gradients. Unequal clients pull the model apart in a round of several steps; the control
variates c_i and c take out what is known of the difference. N is the number of clients of the
federation. Use it alone, or with any strategy that trains by gradients: `Combine(Scaffold(),
Replay(memory_size=200))`. With one party the correction is 0.

State: `control`, c on the server, which follows every round by the rule `round_mean`; on a client
it is c and the client's own change so far. `own`, the client's variate, and `correction`, c - c_i
of the round, kept by each client. Memory cost: three times the parameters; a message and a reply of
a round carry the parameters twice. Privacy cost: only the gradient: a variate is a mean of released
gradients.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from perdure.contract import Spec, State, Strategy
from perdure.tasks import Task
from perdure.types import Params


@dataclass(frozen=True, kw_only=True)
class Scaffold(Strategy):
    """Control variates against the drift of unequal clients in a round."""

    tasks: ClassVar[tuple[type[Task], ...]] = (Task,)

    def init(self, spec: Spec) -> State:
        """Create a state in which all variates are 0."""
        zeros = {name: torch.zeros_like(value) for name, value in spec.params.items()}
        state = State().declare_group("control", zeros, "round_mean")
        state = state.declare_group("own", zeros, "local").declare_group(
            "correction", zeros, "local"
        )
        return state.declare("steps", torch.zeros((), dtype=torch.int64), "local")

    def begin_round(self, params: Params, state: State) -> State:
        """Fix the correction of the round from the server's variate and the client's own."""
        control, own = state.group("control"), state.group("own")
        correction = {name: control[name] - own[name] for name in control}
        begun = state.replace({"steps": torch.zeros_like(state["steps"])})
        return begun.replace_group("correction", correction)

    def project(self, gradient: Params, references: tuple[Params, ...], state: State) -> Params:
        """Add the correction of the round to the released gradient."""
        correction = state.group("correction")
        return {name: value + correction[name] for name, value in gradient.items()}

    def after_step(
        self,
        before: Params,
        after: Params,
        gradient: Params,
        state: State,
        noise_variance: float = 0.0,
    ) -> State:
        """Update the mean gradient of the round, and add its change to the server's variate."""
        steps = state["steps"] + 1
        changes = {"steps": steps}
        for name, value in gradient.items():
            own = state[f"own/{name}"]
            change = (value - own) / steps  # the first step replaces the variate of the last round
            changes[f"own/{name}"] = own + change
            changes[f"control/{name}"] = state[f"control/{name}"] + change
        return state.replace(changes)
