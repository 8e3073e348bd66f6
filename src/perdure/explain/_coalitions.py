"""Coalitions for Kernel SHAP, with the weights of the regression.

Coalitions come in pairs of a set and its complement, and a pair has two sizes, s and d - s. The
budget is shared among the sizes by a sampling rule; sizes of which the budget covers all coalitions
are enumerated, and what they leave is shared among the others. Within a size, coalitions are drawn
without repetition. A coalition's weight is the total kernel weight of its size over the number of
its coalitions that were drawn, so every size has the weight that it has in the full regression.
"""

import itertools
import math
from typing import Literal

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.explain._shapley_game import all_subsets

Sampling = Literal["leverage", "kernel"]
"""Rule that shares the budget among the sizes of coalitions."""

ASSURED = 4
"""Samples per player from which draws alone determine the regression well.

Below, every coalition of one player is drawn, with its complement. For 128 coalitions of the 64
pixels of digits, the relative error falls from between 0.3 and 1.1 to 0.07; it is equal at 250.
"""


def coalitions(
    count: int, samples: int, sampling: Sampling, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Choose coalitions (m, count) without the empty and the full one, and weights (m,).

    Args:
        count: number of players.
        samples: largest number of coalitions.
        sampling: rule that shares the budget among the sizes.
        generator: CPU generator.

    Raises:
        ConfigError: if there are fewer samples than two per player.
    """
    if 2**count - 2 <= samples:
        masks = all_subsets(count)[1:-1]
        each = [_weight(count, size) / math.comb(count, size) for size in range(1, count)]
        weights = torch.tensor([0.0, *each], dtype=torch.float64)
        return masks, weights[masks.sum(1)]
    check_samples(count, samples)
    sizes = range(1, count // 2 + 1)
    drawn = _pairs_of_sizes(count, samples, sampling, generator)
    halves = [
        _draw(count, size, number, generator)
        for size, number in zip(sizes, drawn, strict=True)
        if number
    ]
    each = [
        _weight(count, size) / (number if 2 * size < count else 2 * number)
        for size, number in zip(sizes, drawn, strict=True)
        if number
    ]
    half = torch.cat(halves)
    weights = torch.tensor(each, dtype=torch.float64)
    weights = weights.repeat_interleave(torch.tensor([len(part) for part in halves]))
    return torch.cat([half, ~half]), torch.cat([weights, weights])


def check_samples(count: int, samples: int) -> None:
    """Refuse fewer samples than two per player, unless these are all coalitions."""
    if samples < min(2 * count, 2**count - 2):
        raise ConfigError.of(
            "samples",
            samples,
            f"at least {2 * count} for {count} features, better {ASSURED * count} and more; "
            "raise samples, or explain groups of features (groups, or cells for images)",
        )


def _weight(count: int, size: int) -> float:
    """Return the total kernel weight of all coalitions of one size."""
    return (count - 1) / (size * (count - size))


def _pairs(count: int, size: int) -> int:
    """Return the number of pairs of a coalition of this size and its complement."""
    every = math.comb(count, size)
    return every // 2 if 2 * size == count else every


def _pairs_of_sizes(
    count: int, samples: int, sampling: Sampling, generator: torch.Generator
) -> list[int]:
    """Share the budget of pairs among the sizes 1 to count // 2."""
    sizes = range(1, count // 2 + 1)
    # Leverage scores of coalitions are inverse to the number of coalitions of their size, so all
    # sizes get equal shares; a pair of the middle size has one size instead of two.
    shares = [
        (1.0 if sampling == "leverage" else _weight(count, size))
        * (0.5 if 2 * size == count else 1)
        for size in sizes
    ]
    left = samples // 2
    whole = 0
    if samples < ASSURED * count:
        whole = 1
        left -= count
    # Small sizes have few coalitions and large shares, so they are filled up first.
    while whole < len(shares):
        pairs = _pairs(count, sizes[whole])
        if left * shares[whole] < pairs * sum(shares[whole:]):
            break
        left -= pairs
        whole += 1
    found = [_pairs(count, size) for size in sizes[:whole]]
    rest = torch.tensor(shares[whole:], dtype=torch.float64)
    # Rounding up or down at random gives every size its share on average.
    ends = (
        rest.cumsum(0) / rest.sum() * left + torch.rand(1, generator=generator).double()
    ).floor()
    numbers = torch.diff(ends, prepend=torch.zeros(1, dtype=torch.float64))
    return [*found, *numbers.long().tolist()]


def _draw(count: int, size: int, number: int, generator: torch.Generator) -> Tensor:
    """Draw `number` different coalitions (number, count) of one size, no two of them one pair."""
    if number >= _pairs(count, size):
        members = torch.tensor(list(itertools.combinations(range(count), size)))
        # The first half of the middle size holds player 0; the complements are the second half.
        members = members[: _pairs(count, size)]
        return torch.zeros(len(members), count, dtype=torch.bool).scatter_(1, members, True)
    found = torch.zeros(0, count, dtype=torch.bool)
    while len(found) < number:
        ranks = torch.rand(number, count, generator=generator).argsort(1).argsort(1)
        drawn = ranks < size
        if 2 * size == count:
            drawn = torch.where(drawn[:, :1], drawn, ~drawn)
        found = _first_of_each(torch.cat([found, drawn]))
    return found[:number]


def _first_of_each(masks: Tensor) -> Tensor:
    """Remove repeated rows, and keep the order of the rest, so that a cut is a random choice."""
    unique, where = torch.unique(masks, dim=0, return_inverse=True)
    first = torch.full((len(unique),), len(masks))
    first.scatter_reduce_(0, where, torch.arange(len(masks)), "amin")
    return masks[first.sort().values]
