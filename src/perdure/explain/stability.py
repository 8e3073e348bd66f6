"""Stability of sampled explanations over seeds."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.explain.base import Attribution
from perdure.explain.fidelity import rank_correlation


def stability(explain: Callable[[torch.Generator], Attribution], *, seeds: int = 5) -> Tensor:
    """Rank correlation of the contributions between seeds, as a mean over pairs of seeds.

    1 means that every seed orders the features alike; 0 that the order is chance, so more samples
    are needed. See `rank_correlation` for equal contributions.

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
    found = [explain(torch.Generator().manual_seed(seed)) for seed in range(seeds)]
    pairs = [rank_correlation(one, other) for one, other in itertools.combinations(found, 2)]
    return torch.stack(pairs).mean(0)
