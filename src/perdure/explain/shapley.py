"""Shapley values of a model's output, for all instances of a batch at once.

The game: a coalition S of features keeps its values from the instance x, all others come from a
background row:

    v(S) = mean over background rows r of f(x on S, r elsewhere)

and feature j receives its average contribution over all orders in which features can join. Both
methods below are one matrix applied to the coalition values, so a batch costs its forward passes
and one product.

The background must be public or synthetic: a background of private records is a query on them, and
each explanation a release without noise.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.explain.base import Attribution, Predict, chosen_targets, scores, seeded

MOST_EXACT = 16
"""Most features (or groups) for which all 2^d subsets are walked by `exact_shapley`."""


def kernel_shap(
    predict: Predict,
    inputs: Tensor,
    background: Tensor,
    *,
    targets: Tensor | None = None,
    samples: int = 2048,
    chunk: int = 8192,
    generator: torch.Generator | None = None,
    groups: Tensor | None = None,
) -> Attribution:
    """Shapley values by weighted least squares over coalitions.

        min_phi  sum_S w(|S|) (v(S) - v({}) - sum_{j in S} phi_j)^2
                 with sum_j phi_j = v(all) - v({})
        w(s) = (d - 1) / (binomial(d, s) s (d - s))

    Exact when all 2^d - 2 proper coalitions fit in `samples`. Otherwise coalitions are drawn once
    for all instances from the kernel's distribution of sizes, each together with its complement.

    Guarantee: none of its own. With a model that was released under privacy and a public or
    synthetic background it is post-processing; a background of private records must be paid for as
    a query on them.

    Args:
        predict: (rows, ...) -> (rows, outputs), called without gradients.
        inputs: (n, ...) instances to explain.
        background: (b, ...) public or synthetic rows that stand in for absent features, on the same
            device.
        targets: (n,) int64 output to explain for each instance; None for its largest.
        samples: most coalitions to evaluate, empty and full ones apart; n * samples * b forward
            rows.
        chunk: most rows in one forward pass.
        generator: CPU generator that draws the coalitions; None for seed 0.
        groups: (...) integers in the shape of one instance; features of equal number join together,
            and each carries an equal share of its group's value. None: every feature for itself.

    Returns:
        Attribution whose values add up to f(x) - base, with base = mean of f over the background.

    Raises:
        ConfigError: when shapes do not fit, or `samples` are too few for so many features.

    >>> import torch
    >>> product = lambda rows: rows.prod(1, keepdim=True)
    >>> kernel_shap(product, torch.tensor([[2.0, 3.0]]), torch.zeros(1, 2)).values
    tensor([[3., 3.]])

    Source: Lundberg and Lee 2017, section 4.1; pairs: Covert and Lee 2021, section 4.2.
    """
    players = _players(inputs, background, groups)
    masks, weights = _coalitions(int(players.max()) + 1, samples, seeded(generator))
    targets = chosen_targets(predict, inputs, targets, chunk)
    game = _Game(
        predict=predict, inputs=inputs, background=background, targets=targets, chunk=chunk
    )
    return _attribution(game, masks, _kernel_operator(masks, weights), players)


def exact_shapley(
    predict: Predict,
    inputs: Tensor,
    background: Tensor,
    *,
    targets: Tensor | None = None,
    chunk: int = 8192,
    groups: Tensor | None = None,
) -> Attribution:
    """Shapley values from their definition, over all 2^d subsets.

    At most 16 features or groups are allowed.

        phi_j = sum over S without j of |S|! (d - |S| - 1)! / d! * (v(S + j) - v(S))

    Guarantee, args and errors: as in `kernel_shap`; ConfigError also where there are too many
    features.

    Source: Shapley 1953; Lundberg and Lee 2017, equation 4.
    """
    players = _players(inputs, background, groups)
    count = int(players.max()) + 1
    if count > MOST_EXACT:
        raise ConfigError.of("features", count, f"at most {MOST_EXACT}; use kernel_shap, or groups")
    masks = _subsets(count)
    targets = chosen_targets(predict, inputs, targets, chunk)
    game = _Game(
        predict=predict, inputs=inputs, background=background, targets=targets, chunk=chunk
    )
    return _attribution(game, masks, _exact_operator(masks), players)


def _players(inputs: Tensor, background: Tensor, groups: Tensor | None) -> Tensor:
    """Player that each flattened feature belongs to, (features,) on the CPU, numbered 0 .. d-1."""
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


def _subsets(count: int) -> Tensor:
    """All subsets of `count` players, (2^count, count) bool.

    The empty one first, the full one last.
    """
    return (torch.arange(2**count)[:, None] >> torch.arange(count)) % 2 == 1


def _coalitions(count: int, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Distinct coalitions (m, count) and the kernel weight of each (m,).

    The empty coalition is first, the full one last.
    """
    sizes = torch.arange(count + 1, dtype=torch.float64)
    share = torch.zeros_like(sizes)
    share[1:-1] = (count - 1) / (sizes[1:-1] * (count - sizes[1:-1]))
    if 2**count - 2 <= samples:
        masks = _subsets(count)
        each = share / torch.tensor([math.comb(count, size) for size in range(count + 1)])
        return masks, each[masks.sum(1)]
    if samples < 2 * count:
        raise ConfigError.of(
            "samples", samples, f"at least {2 * count} for {count} features, or fewer groups"
        )
    drawn = _draw_pairs(share, samples // 2, generator)
    ends = torch.tensor([[False], [True]]).expand(2, count)
    # Sorting rows puts the empty coalition first and the full one last; repeated draws are
    # evaluated once.
    masks, weights = torch.unique(torch.cat([drawn, ends]), dim=0, return_counts=True)
    return masks, weights.double()


def _draw_pairs(share: Tensor, pairs: int, generator: torch.Generator) -> Tensor:
    """Draw coalitions of sizes with probability proportional to `share`.

    Each is drawn with its complement.
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

    The constraint is eliminated by phi = (v(all) - v({})) / d + psi with psi summing to zero:
    centring each coalition over the features confines psi to that space, and treats all features
    alike. A direction that no coalition tells apart is left at zero by the pseudo-inverse.
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


def _exact_operator(masks: Tensor) -> Tensor:
    """Matrix (d, 2^d) from coalition values to Shapley values."""
    count = masks.shape[1]
    share = [1 / (count * math.comb(count - 1, size)) for size in range(count)]
    joined = torch.tensor([0.0, *share], dtype=torch.float64)
    absent = torch.tensor([*share, 0.0], dtype=torch.float64)
    size = masks.sum(1)
    return torch.where(masks, joined[size][:, None], -absent[size][:, None]).T


@dataclass(frozen=True, kw_only=True, eq=False)
class _Game:
    """Cooperative game of every instance.

    A coalition's value is the model's output when the other features are absent.
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
        """Mean output over the background, (pairs,), for instance `owner` under `mask`."""
        present = self.inputs[owner]
        targets = self.targets[owner]
        total = torch.zeros(len(owner), dtype=torch.float64, device=owner.device)
        for absent in torch.split(self.background, self.chunk):
            rows = torch.where(mask[:, None], present[:, None], absent).flatten(0, 1)
            outputs = scores(self.predict, rows, targets.repeat_interleave(len(absent)))
            total += outputs.view(len(owner), -1).sum(1)
        return total / len(self.background)


def _attribution(game: _Game, masks: Tensor, operator: Tensor, players: Tensor) -> Attribution:
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
