"""Cooperative game for Shapley values, for all instances of a batch at once.

The players are the features. A coalition S of features keeps its values from the instance x; all
other features come from a background row:

    v(S) = mean over background rows r of f(x on S, r elsewhere)

The Shapley value of feature j is its average contribution over all orders in which features can
join. Every method is one matrix that is applied to the coalition values, so a batch needs its
forward passes and one product.

The background must be public or synthetic: with a background of private records, each explanation
would be a release without noise.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.explain.base import Attribution, Predict, scores


def players_of(inputs: Tensor, background: Tensor, groups: Tensor | None) -> Tensor:
    """Return the player (features,) to which each flattened feature belongs, from 0 to d-1."""
    shape = inputs.shape[1:]
    if len(background) == 0 or background.shape[1:] != shape:
        raise ConfigError.of(
            "background.shape", tuple(background.shape), f"(b, {', '.join(map(str, shape))})"
        )
    if groups is None:
        return torch.arange(shape.numel())
    if groups.shape != shape:
        raise ConfigError.of(
            "groups.shape", tuple(groups.shape), f"{tuple(shape)}, the shape of one instance"
        )
    players: Tensor = torch.unique(groups.flatten().cpu(), return_inverse=True)[1]
    return players


def all_subsets(count: int) -> Tensor:
    """Return all coalitions of `count` players, (2^count, count) bool, True for a member.

    The empty subset is first, the full one last.
    """
    return (torch.arange(2**count)[:, None] >> torch.arange(count)) % 2 == 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Game:
    """Cooperative game of features, one for each instance.

    The value of a coalition is the model's output with the other features from the background.
    """

    predict: Predict
    inputs: Tensor
    background: Tensor
    targets: Tensor
    chunk: int

    @torch.no_grad()
    def values(self, masks: Tensor) -> Tensor:
        """v(S) for every instance and coalition, (n, m) float64; `masks` is (m, features) bool."""
        count = len(masks)
        instances = len(self.inputs)
        masks = masks.view(count, *self.inputs.shape[1:]).to(self.inputs.device)
        pairs = torch.arange(instances * count, device=self.inputs.device)
        parts = torch.split(pairs, max(1, self.chunk // len(self.background)))
        means = [self._mean(pair // count, masks[pair % count]) for pair in parts]
        return torch.cat(means).view(instances, count)

    def _mean(self, owner: Tensor, mask: Tensor) -> Tensor:
        """Return (pairs,) mean output over the background, per pair of instance and coalition."""
        present = self.inputs[owner]
        targets = self.targets[owner]
        total = torch.zeros(len(owner), dtype=torch.float64, device=owner.device)
        for absent in torch.split(self.background, self.chunk):
            rows = torch.where(mask[:, None], present[:, None], absent).flatten(0, 1)
            outputs = scores(self.predict, rows, targets.repeat_interleave(len(absent)))
            total += outputs.view(len(owner), -1).sum(1)
        return total / len(self.background)


def share_out(game: Game, masks: Tensor, operator: Tensor, players: Tensor) -> Attribution:
    values = game.values(masks[:, players])
    inputs = game.inputs
    # Each feature carries an equal share of its player's value, so that the sum over features stays
    # the same.
    spread = operator[players] / players.bincount()[players, None]
    shares = values @ spread.T.to(inputs.device)
    base = values[:, 0].to(inputs.dtype)
    return Attribution(
        values=shares.view(inputs.shape).to(inputs.dtype), base=base, targets=game.targets
    )
