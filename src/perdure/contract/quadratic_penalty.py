"""Base class of strategies that pull every parameter towards an anchor."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perdure.contract.state import State
from perdure.contract.strategy import Strategy
from perdure.errors import StrategyError
from perdure.types import Params
from perdure.utils.pieces import pieces


@dataclass(frozen=True, kw_only=True)
class QuadraticPenalty(Strategy):
    """Base class of strategies with a quadratic penalty around an anchor.

        penalty    = 1/2 sum_j w_j (theta_j - anchor_j)^2
        gradient_j = w_j (theta_j - anchor_j)

    The loop adds the gradient by the formula, in place, so a step needs no tensor of the size of
    the model. In a subclass, declare the group `anchor` in `init`, list in `weighted_by` the groups
    from which the weights are computed, and override `weight`.

    Class attributes:
        weighted_by: groups of the state that are the arguments of `weight`.
    """

    weighted_by: ClassVar[tuple[str, ...]] = ()

    def weight(self, state: State, *groups: Tensor) -> Tensor:
        """Compute the weights w of the penalty, element by element.

        Args:
            state: state of the strategy, for single numbers such as scales.
            groups: tensors in the shape of one parameter, one from each group in `weighted_by`; or
                the same slice of each of these tensors.

        Returns:
            The weights, in the shape of the groups, or one number for all.

        Raises:
            StrategyError: if a subclass does not override the method.
        """
        raise StrategyError(
            f"{type(self).__name__} has no weight(); allowed: a subclass that overrides it; "
            "return the weights of the given groups"
        )

    def penalty(self, params: Params, state: State) -> Tensor:
        """Half the weighted squared distance of the parameters from the anchor, a scalar."""
        terms = [
            (
                self.weight(state, *self._groups(state, name))
                * (value - state[f"anchor/{name}"]).square()
            ).sum()
            for name, value in params.items()
        ]
        return 0.5 * torch.stack(terms).sum()

    def add_penalty_gradient(self, gradient: Params, params: Params, state: State) -> None:
        """Add the weighted difference of parameters and anchor to `gradient`, in place."""
        with torch.no_grad():
            for name, total in gradient.items():
                tensors = (total, params[name], state[f"anchor/{name}"])
                for out, value, anchor, *groups in pieces(*tensors, *self._groups(state, name)):
                    pull = value - anchor
                    pull.mul_(self.weight(state, *groups))
                    out.add_(pull)

    def _groups(self, state: State, name: str) -> list[Tensor]:
        return [state[f"{group}/{name}"] for group in self.weighted_by]
