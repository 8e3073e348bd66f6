"""Stability of sampled explanations over seeds."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.explain.base import Attribution


def stability(explain: Callable[[torch.Generator], Attribution], *, seeds: int = 5) -> Tensor:
    """Rank correlation of the contributions between seeds, as a mean over pairs of seeds.

    1 means that every seed orders the features alike; 0 that the order is chance, so more samples
    are needed.

    Args:
        explain: function from a generator to the explanation, such as
            `lambda generator: LIME().explain(model, inputs, generator=generator)`.
        seeds: number of seeds, 2 or more.

    Returns:
        (n,) float64, one number per instance; (n, k) for all outputs.

    Raises:
        ConfigError: if there are fewer than 2 seeds.

    Source: Spearman's rank correlation; Visani et al. 2020, "Statistical stability indices for
    LIME", for the question.
    """
    if seeds < 2:
        raise ConfigError.of("seeds", seeds, "2 or more")
    found = [_centred_ranks(explain(torch.Generator().manual_seed(seed))) for seed in range(seeds)]
    pairs = [(one * other).sum(1) for one, other in itertools.combinations(found, 2)]
    return torch.stack(pairs).mean(0)


def _centred_ranks(found: Attribution) -> Tensor:
    """Return the ranks (n, features[, k]) with mean 0 and norm 1 over features.

    Ties are resolved by position, so that features without any influence do not lower the result.
    """
    flat = found.values.flatten(1, found.values.ndim - found.base.ndim).double()
    ranks = flat.argsort(dim=1, stable=True).argsort(1).double()
    centred = ranks - ranks.mean(1, keepdim=True)
    scaled: Tensor = centred / centred.norm(dim=1, keepdim=True).clamp_min(1.0)
    return scaled
