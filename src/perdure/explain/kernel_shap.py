"""Kernel SHAP: Shapley values by weighted least squares over coalitions (Lundberg and Lee 2017)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.explain._coalitions import Sampling, check_samples, coalitions
from perdure.explain._shapley_game import Game, Link, count_of, game, players_of
from perdure.explain.base import Attribution, Background, Explainer, Predict, Rows, Targets, seeded


@dataclass(frozen=True, kw_only=True)
class KernelSHAP(Explainer):
    """Shapley values by weighted least squares over coalitions.

        min_phi  sum_S w(|S|) (v(S) - v({}) - sum_{j in S} phi_j)^2
                 with sum_j phi_j = v(all) - v({})
        w(s) = (d - 1) / (binomial(d, s) s (d - s))

    The values are exact if `samples` is at least 2^d - 2, the number of proper coalitions. With
    fewer samples, coalitions are chosen once for all instances and outputs, each together with its
    complement: sizes with few coalitions as a whole, the others by draws without repetition.
    Features that equal all background rows get exactly 0, and are no unknowns of an instance.

    Guarantee: none. For a privately released model and a public or synthetic background, the values
    are post-processing and cost no privacy. A background of private records costs privacy like
    every query on them. See `Explainer.explain` for what an explanation of a record reveals.

    Args:
        samples: largest number of coalitions to evaluate, not counting the empty and the full one;
            at least two per feature. This needs n * samples * b forward rows for n instances and b
            background rows.
        sampling: "leverage" shares the samples evenly among the sizes of coalitions, "kernel" by
            the weight of the sizes. With equal samples, the error of "leverage" is smaller.
        link: "identity", or "logit" to explain the log-odds of probabilities.
        cells: number of superpixels along each side of an image; None to explain single features.
        chunk: largest number of rows in one forward pass; None for a size that suits the caches.

    Raises:
        ConfigError: if a value is not allowed.

    >>> import torch
    >>> product = lambda rows: rows.prod(1, keepdim=True)
    >>> KernelSHAP().explain(product, torch.tensor([[2.0, 3.0]]), torch.zeros(1, 2)).values
    tensor([[3., 3.]])

    Source: Lundberg and Lee 2017, section 4.1; pairs: Covert and Lee 2021, section 4.2; leverage
    scores: Musco and Witter 2024.
    """

    samples: int = 2048
    sampling: Sampling = "leverage"
    link: Link = "identity"
    cells: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 2:
            raise ConfigError.of("samples", self.samples, "2 or more coalitions")
        if self.cells is not None and self.cells < 1:
            raise ConfigError.of("cells", self.cells, "1 or more superpixels along each side")

    def unknowns(self, shape: Sequence[int]) -> int:
        """Return the number of features or superpixels; see `Explainer.unknowns`."""
        count = count_of(players_of(shape, None, self.cells))
        check_samples(count, self.samples)
        return count

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
        """Compute values that add up to f(x) - base, with base the mean of f over the background.

        Args:
            predict: the model; see `Explainer.explain`.
            inputs: (n, ...) instances to explain.
            background: (b, ...) public or synthetic rows that give the values of absent features.
            targets: outputs to explain; "all" costs no more than one.
            generator: CPU generator that draws the coalitions; None for seed 0.
            groups: (...) integers in the shape of one instance; features with equal numbers join
                together, and each gets an equal share of the group's value. None: `cells`, or
                every feature is a group of its own.

        Raises:
            ConfigError: if an argument is not allowed, or `samples` is too small for the number of
                features.
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
        masks, weights = coalitions(played.count, self.samples, self.sampling, seeded(generator))
        return played.share_out(_solutions(played, masks, weights))


def _solutions(played: Game, masks: Tensor, weights: Tensor) -> Tensor:
    """Return the players' values (n, d, k) by the constrained weighted least squares.

    The normal matrix is the same for all instances and outputs. An instance whose unknowns are
    fewer uses the rows and columns of its own, so one factorisation serves all that agree in them.
    """
    device = played.ends.device
    design = masks.to(device, torch.float64)
    weighted = design.T * weights.to(device)
    # The full coalition fits by the constraint, so its weight changes no solution; it makes the
    # matrix regular in the direction of all players.
    normal = weighted @ design + 1.0
    rank = int(torch.linalg.matrix_rank(normal, hermitian=True, rtol=1e-10))
    if rank < len(normal):
        raise ConfigError.of(
            "samples",
            len(masks),
            f"more than that for {len(normal)} features: the coalitions drawn determine only "
            f"{rank} of them; raise samples, or explain groups of features",
        )
    sides = []
    for block, values in played.blocks(masks):
        empty = played.ends[0, block]
        total = played.ends[1, block] - empty
        moments = torch.einsum("dm,nmk->ndk", weighted, values - empty[:, None])
        sides.append(moments + total[:, None])
    return _constrained(normal, torch.cat(sides), played.varying, played.ends[1] - played.ends[0])


def _constrained(normal: Tensor, sides: Tensor, varying: Tensor, totals: Tensor) -> Tensor:
    """Solve for the values (n, d, k) of each instance's unknowns, so that they sum to `totals`.

    With a multiplier u for the constraint, phi = normal^-1 (side - u 1).
    """
    values = torch.zeros_like(sides)
    patterns, which = torch.unique(varying, dim=0, return_inverse=True)
    for i, players in enumerate(patterns):
        rows = (which == i).nonzero()[:, 0]
        own = players.nonzero()[:, 0]
        if not len(own):
            continue
        factor = torch.linalg.cholesky(normal[own][:, own])
        side = sides[rows][:, own]
        ones = torch.ones(len(own), 1, dtype=side.dtype, device=side.device)
        shift = torch.cholesky_solve(ones, factor)
        free = torch.cholesky_solve(side, factor)
        excess = (free.sum(1) - totals[rows]) / shift.sum()
        values[rows[:, None], own] = free - shift * excess[:, None]
    return values
