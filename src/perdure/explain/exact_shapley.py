"""Shapley values from their definition, for few features (Shapley 1953)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.explain._shapley_game import Link, all_subsets, count_of, game, players_of
from perdure.explain.base import Attribution, Background, Explainer, Predict, Rows, Targets

MOST_PLAYERS = 16
"""Largest number of features (or groups), for which all 2^d subsets are evaluated."""


@dataclass(frozen=True, kw_only=True)
class ExactShapley(Explainer):
    """Shapley values from their definition, over all 2^d subsets of at most 16 features or groups.

        phi_j = sum over S without j of |S|! (d - |S| - 1)! / d! * (v(S + j) - v(S))

    Guarantee: as for `KernelSHAP`.

    Args:
        link: as for `KernelSHAP`.
        cells: as for `KernelSHAP`.
        chunk: largest number of rows in one forward pass; None for a size that suits the caches.

    Source: Shapley 1953; Lundberg and Lee 2017, equation 4.
    """

    link: Link = "identity"
    cells: int | None = None

    def unknowns(self, shape: Sequence[int]) -> int:
        """Return the number of features or superpixels; see `Explainer.unknowns`."""
        return _few(count_of(players_of(shape, None, self.cells)))

    def explain(
        self,
        predict: Predict,
        inputs: Rows,
        background: Background,
        *,
        targets: Targets = None,
        generator: torch.Generator | None = None,
        groups: Tensor | None = None,
    ) -> Attribution:
        """Compute exact Shapley values; `generator` is not used. See `KernelSHAP.explain`.

        Raises:
            ConfigError: if an argument is not allowed, or there are too many features.
        """
        played = game(
            self,
            predict,
            inputs,
            background,
            targets,
            groups=groups,
            cells=self.cells,
            link=self.link,
        )
        masks = all_subsets(_few(played.count))
        operator = _exact_operator(masks).to(played.ends.device)
        values = [
            torch.einsum(
                "dm,nmk->ndk", operator, torch.cat([first[:, None], inner, last[:, None]], dim=1)
            )
            for block, inner in played.blocks(masks[1:-1])
            for first, last in [played.ends[:, block]]
        ]
        return played.share_out(torch.cat(values))


def _few(count: int) -> int:
    if count > MOST_PLAYERS:
        raise ConfigError.of(
            "features", count, f"at most {MOST_PLAYERS}; use KernelSHAP, or groups"
        )
    return count


def _exact_operator(masks: Tensor) -> Tensor:
    """Matrix (d, 2^d) from coalition values to Shapley values."""
    count = masks.shape[1]
    share = [1 / (count * math.comb(count - 1, size)) for size in range(count)]
    joined = torch.tensor([0.0, *share], dtype=torch.float64)
    absent = torch.tensor([*share, 0.0], dtype=torch.float64)
    size = masks.sum(1)
    return torch.where(masks, joined[size][:, None], -absent[size][:, None]).T
