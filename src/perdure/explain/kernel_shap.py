"""Kernel SHAP: Shapley values by weighted least squares over coalitions (Lundberg and Lee 2017)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.explain._shapley_game import Game, all_subsets, players_of, share_out
from perdure.explain.base import Attribution, Explainer, Predict, chosen_targets, seeded


@dataclass(frozen=True, kw_only=True)
class KernelSHAP(Explainer):
    """Shapley values by weighted least squares over coalitions.

        min_phi  sum_S w(|S|) (v(S) - v({}) - sum_{j in S} phi_j)^2
                 with sum_j phi_j = v(all) - v({})
        w(s) = (d - 1) / (binomial(d, s) s (d - s))

    The values are exact if `samples` is at least 2^d - 2, the number of proper coalitions. With
    fewer samples, coalitions are drawn once for all instances, from the kernel's distribution of
    sizes; each is drawn together with its complement.

    Guarantee: none. For a privately released model and a public or synthetic background, the values
    are post-processing and cost no privacy. A background of private records costs privacy like
    every query on them.

    Args:
        samples: largest number of coalitions to evaluate, not counting the empty and the full one.
            This needs n * samples * b forward rows for n instances and b background rows.
        chunk: largest number of rows in one forward pass.

    Raises:
        ConfigError: if a value is not allowed.

    >>> import torch
    >>> product = lambda rows: rows.prod(1, keepdim=True)
    >>> KernelSHAP().explain(product, torch.tensor([[2.0, 3.0]]), torch.zeros(1, 2)).values
    tensor([[3., 3.]])

    Source: Lundberg and Lee 2017, section 4.1; pairs: Covert and Lee 2021, section 4.2.
    """

    samples: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 2:
            raise ConfigError.of("samples", self.samples, "2 or more coalitions")

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
        """Compute values that add up to f(x) - base, with base the mean of f over the background.

        Args:
            predict: function (rows, ...) -> (rows, outputs), called without gradients.
            inputs: (n, ...) instances to explain.
            background: (b, ...) public or synthetic rows that give the values of absent features,
                on the same device.
            targets: (n,) int64 output to explain for each instance; None for the largest output.
            generator: CPU generator that draws the coalitions; None for seed 0.
            groups: (...) integers in the shape of one instance; features with equal numbers join
                together, and each gets an equal share of the group's value. None: every feature is
                a group of its own.

        Raises:
            ConfigError: if shapes do not match, or `samples` is too small for the number of
                features.
        """
        players = players_of(inputs, background, groups)
        masks, weights = _coalitions(int(players.max()) + 1, self.samples, seeded(generator))
        targets = chosen_targets(predict, inputs, targets, self.chunk)
        game = Game(
            predict=predict, inputs=inputs, background=background, targets=targets, chunk=self.chunk
        )
        return share_out(game, masks, _kernel_operator(masks, weights), players)


def _coalitions(count: int, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Distinct coalitions (m, count) and the kernel weight of each (m,).

    The empty coalition is first, the full one last.
    """
    sizes = torch.arange(count + 1, dtype=torch.float64)
    share = torch.zeros_like(sizes)
    share[1:-1] = (count - 1) / (sizes[1:-1] * (count - sizes[1:-1]))
    if 2**count - 2 <= samples:
        masks = all_subsets(count)
        each = share / torch.tensor([math.comb(count, size) for size in range(count + 1)])
        return masks, each[masks.sum(1)]
    if samples < 2 * count:
        raise ConfigError.of(
            "samples",
            samples,
            f"at least {2 * count} for {count} features; raise samples, or use fewer groups",
        )
    drawn = _draw_pairs(share, samples // 2, generator)
    ends = torch.tensor([[False], [True]]).expand(2, count)
    # Sorting rows puts the empty coalition first and the full one last; repeated draws are
    # evaluated once.
    masks, weights = torch.unique(torch.cat([drawn, ends]), dim=0, return_counts=True)
    return masks, weights.double()


def _draw_pairs(share: Tensor, pairs: int, generator: torch.Generator) -> Tensor:
    """Draw coalitions whose sizes have probabilities proportional to `share`.

    Each coalition is drawn together with its complement.
    """
    uniform = torch.rand(pairs, generator=generator, dtype=torch.float64)
    # One draw in each of `pairs` equal strata: every size comes up almost exactly as often as it
    # should.
    strata = (torch.arange(pairs) + uniform) / pairs * share.sum()
    sizes = torch.bucketize(strata, share.cumsum(0)).clamp(1, len(share) - 2)
    ranks = torch.rand(pairs, len(share) - 1, generator=generator).argsort(1).argsort(1)
    drawn = ranks < sizes[:, None]
    return torch.cat([drawn, ~drawn])


def _kernel_operator(masks: Tensor, weights: Tensor) -> Tensor:
    """Matrix (d, m) from coalition values to the constrained weighted least-squares solution.

    The constraint is eliminated by phi = (v(all) - v({})) / d + psi, where psi sums to 0:
    subtracting the mean over features from each coalition keeps psi in that space, and treats all
    features alike. Directions that no coalition determines are set to 0 by the pseudo-inverse.
    """
    inner = masks[1:-1].double()
    weights = weights[1:-1]
    size = inner.mean(1, keepdim=True)
    weighted = (inner - size).T * weights
    solve = torch.linalg.pinv(weighted @ (inner - size), hermitian=True, rtol=1e-10) @ weighted
    full = 1 / masks.shape[1] - solve @ size
    # Each coalition comes with its complement at the same weight, so the rows of `solve` sum to
    # zero and the empty coalition counts as the full one does, with the opposite sign.
    return torch.cat([-full, solve, full], dim=1)
