"""Shapley values from their definition, for few features (Shapley 1953)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.explain._shapley_game import Game, all_subsets, players_of, share_out
from perdure.explain.base import Attribution, Explainer, Predict, chosen_targets

MOST_PLAYERS = 16
"""Largest number of features (or groups), for which all 2^d subsets are evaluated."""


@dataclass(frozen=True, kw_only=True)
class ExactShapley(Explainer):
    """Shapley values from their definition, over all 2^d subsets of at most 16 features or groups.

        phi_j = sum over S without j of |S|! (d - |S| - 1)! / d! * (v(S + j) - v(S))

    Guarantee: as for `KernelSHAP`.

    The fields are those of `Explainer`.

    Source: Shapley 1953; Lundberg and Lee 2017, equation 4.
    """

    def explain(
        self,
        predict: Predict,
        inputs: Tensor,
        background: Tensor,
        *,
        targets: Tensor | None = None,
        generator: torch.Generator | None = None,
        groups: Tensor | None = None,
    ) -> Attribution:
        """Compute exact Shapley values; `generator` is not used. See `KernelSHAP.explain`.

        Raises:
            ConfigError: if shapes do not match, or there are too many features.
        """
        players = players_of(inputs, background, groups)
        count = int(players.max()) + 1
        if count > MOST_PLAYERS:
            raise ConfigError.of(
                "features", count, f"at most {MOST_PLAYERS}; use KernelSHAP, or groups"
            )
        masks = all_subsets(count)
        targets = chosen_targets(predict, inputs, targets, self.chunk)
        game = Game(
            predict=predict, inputs=inputs, background=background, targets=targets, chunk=self.chunk
        )
        return share_out(game, masks, _exact_operator(masks), players)


def _exact_operator(masks: Tensor) -> Tensor:
    """Matrix (d, 2^d) from coalition values to Shapley values."""
    count = masks.shape[1]
    share = [1 / (count * math.comb(count - 1, size)) for size in range(count)]
    joined = torch.tensor([0.0, *share], dtype=torch.float64)
    absent = torch.tensor([*share, 0.0], dtype=torch.float64)
    size = masks.sum(1)
    return torch.where(masks, joined[size][:, None], -absent[size][:, None]).T
