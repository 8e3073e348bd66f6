"""Cooperative game for Shapley values, for all instances of a batch at once.

The players are the features. A coalition S of features keeps its values from the instance x; all
other features come from a background row:

    v(S) = link(mean over background rows r of f(x on S, r elsewhere))

The Shapley value of feature j is its average contribution over all orders in which features can
join.

The background must be public or synthetic: with a background of private records, each explanation
would be a release without noise.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.explain._question import Question, finite_scores
from perdure.explain.base import (
    Attribution,
    Background,
    Explainer,
    Predict,
    Rows,
    Targets,
    attribution,
)
from perdure.explain.groups import grid_groups

Link = Literal["identity", "logit"]
"""Function of the mean output whose difference is shared out."""

NUMBERS_AT_ONCE = 2**24
"""Largest number of coalition values that are held at once."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Game:
    """Cooperative game of features, one for each instance.

    The value of a coalition is the model's output with the other features from the background.

    Args:
        question: model, instances and background.
        players: (features,) player to which each flattened feature belongs, from 0 to d-1.
        link: function of the mean output.
        ends: (2, n, k) values of the empty and of the full coalition.
    """

    question: Question
    players: Tensor
    link: Link
    ends: Tensor

    @property
    def count(self) -> int:
        """Number of players."""
        return count_of(self.players)

    @property
    def varying(self) -> Tensor:
        """Players (n, d) that differ from some background row; others have the value 0."""
        rows = self.question.inputs.flatten(1)
        differs = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device)
        for absent in self.question.absent.flatten(1):
            differs |= rows != absent
        if self.question.kept is not None:
            differs &= ~self.question.kept.flatten(1)
        players = torch.zeros(len(rows), self.count, device=rows.device)
        return players.index_add(1, self.players.to(rows.device), differs.float()) > 0

    def blocks(self, coalitions: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield blocks of instances with the values (instances, m, k) of their coalitions.

        Args:
            coalitions: (m, d) bool, True for a member.
        """
        n, outputs = self.question.targets.shape
        masks = coalitions[:, self.players]
        size = max(1, NUMBERS_AT_ONCE // max(1, len(masks) * outputs))
        for start in range(0, n, size):
            block = slice(start, min(n, start + size))
            yield block, linked(self.link, coalition_outputs(self.question, masks, block))

    def share_out(self, values: Tensor) -> Attribution:
        """Make an attribution of the players' values (n, d, k).

        Each feature carries an equal share of its player's value, so that the sum over features
        stays the same.
        """
        found = attribution(self.question, spread(values, self.players), self.ends[0])
        return replace(found, outputs=self.question.shaped(self.ends[1]))


def game(
    explainer: Explainer,
    predict: Predict,
    inputs: Rows,
    background: Background,
    targets: Targets,
    *,
    groups: Tensor | None,
    cells: int | None,
    link: Link,
) -> Game:
    """Check the arguments of `explain`, and make the game."""
    question = explainer.question(predict, inputs, background, targets)
    return Game(
        question=question,
        players=players_of(question.inputs.shape[1:], groups, cells),
        link=link,
        ends=linked(link, torch.stack([_empty(question), question.outputs])),
    )


def _empty(question: Question) -> Tensor:
    """Return the value (n, k) of the coalition without members, before the link."""
    if question.kept is not None:  # each instance has its own kept features
        nobody = torch.zeros(1, question.inputs[0].numel(), dtype=torch.bool)
        return coalition_outputs(question, nobody, slice(0, len(question.inputs)))[:, 0]
    absent = question.absent
    sums = [question.model(rows).sum(0) for rows in torch.split(absent, question.chunk)]
    return question.one_for_all(torch.stack(sums).sum(0) / len(absent))


def count_of(players: Tensor) -> int:
    """Return the number of players."""
    return int(players.max()) + 1


def players_of(shape: Sequence[int], groups: Tensor | None, cells: int | None) -> Tensor:
    """Return the player (features,) to which each flattened feature belongs, from 0 to d-1."""
    if groups is None:
        if cells is None:
            return torch.arange(math.prod(shape))
        groups = grid_groups(shape, cells)
    if tuple(groups.shape) != tuple(shape):
        raise ConfigError.of(
            "groups.shape", tuple(groups.shape), f"{tuple(shape)}, the shape of one instance"
        )
    players: Tensor = torch.unique(groups.flatten().cpu(), return_inverse=True)[1]
    return players


def spread(values: Tensor, players: Tensor) -> Tensor:
    """Give each feature an equal share of its player's value: (n, d, k) to (n, features, k)."""
    shares = values / players.bincount().to(values)[:, None]
    return shares[:, players.to(values.device)]


@torch.no_grad()
def coalition_outputs(question: Question, masks: Tensor, block: slice) -> Tensor:
    """Return the mean outputs (instances, m, k) over the background, float64.

    Args:
        question: model, instances and background.
        masks: (m, features) bool, True where a feature keeps its value.
        block: the instances.
    """
    inputs = question.inputs
    count = len(masks)
    wanted = (block.stop - block.start, count, question.targets.shape[1])
    if not count:
        return torch.zeros(wanted, dtype=torch.float64, device=inputs.device)
    masks = masks.view(count, *inputs.shape[1:]).to(inputs.device)
    pairs = torch.arange(block.start * count, block.stop * count, device=inputs.device)
    rows = max(1, question.chunk // len(question.absent))
    parts = [
        _mean(question, pair // count, masks[pair % count]) for pair in torch.split(pairs, rows)
    ]
    return finite_scores(torch.cat(parts)).view(wanted)


def _mean(question: Question, owner: Tensor, mask: Tensor) -> Tensor:
    """Return (pairs, k) mean output over the background, per pair of instance and coalition."""
    background = question.absent
    present = question.inputs[owner]
    if question.kept is not None:
        mask = mask | question.kept[owner]
    total = torch.zeros(len(owner), question.targets.shape[1], dtype=torch.float64)
    total = total.to(owner.device)
    for absent in torch.split(background, question.chunk):
        rows = torch.where(mask[:, None], present[:, None], absent).flatten(0, 1)
        outputs = question.scores(rows, owner.repeat_interleave(len(absent)))
        total += outputs.view(len(owner), len(absent), -1).sum(1)
    return total / len(background)


def linked(link: Link, means: Tensor) -> Tensor:
    """Apply the link function to mean outputs.

    Raises:
        ConfigError: if the link needs probabilities, and gets other numbers.
    """
    if link == "identity":
        return means
    wrong = means[(means <= 0) | (means >= 1)]
    if len(wrong):
        raise ConfigError.of(
            'mean output with link "logit"',
            float(wrong[0]),
            'probabilities above 0 and below 1; explain logits with link "identity"',
        )
    return torch.logit(means)


def all_subsets(count: int) -> Tensor:
    """Return all coalitions of `count` players, (2^count, count) bool, True for a member.

    The empty subset is first, the full one last.
    """
    return (torch.arange(2**count)[:, None] >> torch.arange(count)) % 2 == 1
