"""Memory for tensors as large as the model that every step needs, reused in each step."""

import torch

from perdure.contract.state import State
from perdure.contract.strategy import Strategy
from perdure.types import Params


class StepMemory:
    """Copies of parameters and gradients for the hooks of each step, in reused memory.

    The operating system provides new memory for a tensor as large as the model page by page, which
    takes several times as long as computing with it.
    """

    def __init__(self) -> None:
        self._total: Params = {}
        self._before: Params = {}
        self._gradient: Params = {}
        self._again = False
        self._followed: State | None = None

    def copy_of(self, gradient: Params) -> Params:
        """Copy a released gradient, so that penalty and optimiser may write to the copy."""
        self._total = _copied(gradient, self._total)
        return self._total

    def begin(self, params: Params, gradient: Params, *, again: bool) -> None:
        """Store the tensors that `follow` gives to the strategy after the step.

        Args:
            params: trained parameters before the step.
            gradient: the released gradient.
            again: True if the strategy keeps no reference to the copy of `params`, and updates its
                state in place.
        """
        self._before = _copied(params, self._before if again else {})
        self._gradient = gradient
        self._again = again

    def follow(
        self, strategy: Strategy, after: Params, state: State, noise_variance: float
    ) -> State:
        """Call the strategy's `after_step`, in place if possible, and return the new state.

        No other code refers to the tensors that `after_step` made in the last step, so the strategy
        may write to them, unless the state was set from outside in between.
        """
        in_place = self._again and state is self._followed
        follow = strategy.after_step_in_place if in_place else strategy.after_step
        self._followed = follow(self._before, after, self._gradient, state, noise_variance)
        return self._followed


def _copied(values: Params, kept: Params) -> Params:
    """Copy tensors to memory that is reused.

    Allocate it if there is none, or if it is the source.
    """
    if not kept or any(value is kept[name] for name, value in values.items()):
        kept = {name: torch.empty_like(value.detach()) for name, value in values.items()}
    with torch.no_grad():
        torch._foreach_copy_(list(kept.values()), list(values.values()))
    return kept
