"""Local linear models of a model's outputs (LIME), for all instances of a batch at once."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.explain._question import Question, finite_scores
from perdure.explain._shapley_game import coalition_outputs, count_of, players_of, spread
from perdure.explain.base import (
    Attribution,
    Background,
    Explainer,
    Predict,
    Rows,
    Targets,
    attribution,
    seeded,
)

FOLDS = 5
"""Number of parts of the perturbations that are held out in turn, to measure the fidelity."""

SHARE_KERNEL_WIDTH = 0.25
"""Default width of the kernel for groups that are present or absent, as in the package lime."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalModel(Attribution):
    """Result of LIME: a linear model that approximates the real model near each instance.

    Args:
        values: (n, ...) or (n, ..., k) slopes: change of the output per unit of each input; with
            groups, the change when the group is present, in equal shares for its features.
        base: (n,) or (n, k) value of the local model at the instance; with groups, its value if all
            are absent.
        targets: (n,) or (n, k) int64, index of the explained output.
        fidelity: (n,) or (n, k) weighted R^2 of the local model on perturbations that were held
            out; 1 is a perfect fit, 0 and less is no better than a constant.
    """

    fidelity: Tensor


@dataclass(frozen=True, kw_only=True)
class LIME(Explainer):
    """Slopes of a weighted ridge regression on perturbations of each instance.

        min_(a, b)  sum_k w_k (f(x_k) - a - <b, z_k>)^2 + ridge |b|^2

    Numbers are perturbed by noise:

        x_k = x + noise_scale * z_k,  z_k ~ N(0, 1),  values = b / noise_scale
        w_k = exp(-|z_k|^2 / (2 kernel_width^2))

    Groups of features (superpixels, one-hot groups, tokens) are present or absent; absent features
    come from the background, over which outputs are averaged:

        z_k ~ Bernoulli(1/2),  w_k = exp(-(1 - sqrt(mean z_k))^2 / (2 kernel_width^2))

    Noise comes in pairs z, -z. Perturbations are drawn once for all instances and outputs, and
    weights do not depend on the instance, so all use the same regression matrix. The fidelity is
    that of five-fold cross-validation. No feature is removed for sparsity.

    Guarantee: none. For a privately released model and a public noise scale and background, the
    result is post-processing and costs no privacy. A noise scale that is measured on private
    records costs privacy like every query on them. See `Explainer.explain` for what an explanation
    of a record reveals.

    Args:
        samples: number of perturbations per instance, an even number, at least two per feature
            and two more; n instances need n * samples forward rows, with groups times the
            background rows.
        kernel_width: width of the kernel; None for 0.75 * sqrt(features) with noise, and 0.25
            with groups.
        noise_scale: standard deviation of the perturbation in units of the inputs.
        ridge: penalty on the slopes per unit of z.
        cells: number of superpixels along each side of an image; None for noise on every feature.
        chunk: largest number of rows in one forward pass; None for a size that suits the caches.

    Raises:
        ConfigError: if a value is not allowed.

    >>> import torch
    >>> linear = lambda rows: rows @ torch.tensor([[2.0], [-1.0]])
    >>> LIME().explain(linear, torch.zeros(1, 2)).values.round(decimals=1)
    tensor([[ 2., -1.]])

    Source: Ribeiro, Singh, Guestrin 2016, "Why should I trust you?", section 3.
    """

    samples: int = 1000
    kernel_width: float | None = None
    noise_scale: float = 1.0
    ridge: float = 1.0
    cells: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 2 or self.samples % 2:
            raise ConfigError.of("samples", self.samples, "an even number, 2 or more")
        if self.cells is not None and self.cells < 1:
            raise ConfigError.of("cells", self.cells, "1 or more superpixels along each side")
        for name in ("kernel_width", "noise_scale", "ridge"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError.of(name, value, "a positive number")

    def unknowns(self, shape: Sequence[int]) -> int:
        """Return the number of features or superpixels; see `Explainer.unknowns`."""
        count = count_of(players_of(shape, None, self.cells))
        self._enough(count)
        return count

    def explain(
        self,
        predict: Predict,
        inputs: Rows,
        background: Background | None = None,
        *,
        targets: Targets = None,
        generator: torch.Generator | None = None,
        feature_scales: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> LocalModel:
        """Compute slopes, the value at each instance, and the fidelity of the local model.

        Args:
            predict: the model; see `Explainer.explain`.
            inputs: (n, ...) instances to explain.
            background: (b, ...) public or synthetic rows for absent groups, or a `TokenBackground`;
                not used with noise.
            targets: outputs to explain; "all" costs no more than one.
            generator: CPU generator that draws the perturbations; None for seed 0.
            feature_scales: one `noise_scale` per feature, in the shape of an instance; None for one
                value for all features.
            groups: (...) integers in the shape of one instance; features with equal numbers are
                present or absent together. None: `cells`, or noise on every feature. A model that
                takes no floats, such as a model of token numbers, gets every feature as a group.

        Raises:
            ConfigError: if an argument is not allowed, there are too few samples for the number of
                features, or the kernel is so narrow that all weights are 0.
        """
        asked = self.question(predict, inputs, background, targets)
        shape = asked.inputs.shape[1:]
        grouped = groups is not None or self.cells is not None
        if grouped or not asked.inputs.is_floating_point():
            players = players_of(shape, groups, self.cells)
            return self._with_groups(asked, players, seeded(generator))
        return self._with_noise(asked, self._scale(shape, feature_scales), seeded(generator))

    def _with_noise(self, asked: Question, scale: Tensor, generator: torch.Generator) -> LocalModel:
        features = scale.numel()
        self._enough(features)
        half = torch.randn(self.samples // 2, features, generator=generator, dtype=torch.float64)
        # Pairs z, -z are neighbours, so that no fold divides them.
        noise = torch.stack([half, -half], 1).flatten(0, 1)
        width = 0.75 * math.sqrt(features) if self.kernel_width is None else self.kernel_width
        weights = _kernel(noise.square().sum(1), width, f"about {math.sqrt(features):.2g}")
        outputs = _noisy_outputs(asked, noise.view(-1, *scale.shape) * scale)
        slopes, base, fidelity = _local_model(noise, weights, outputs, self.ridge)
        values = slopes / scale.flatten().to(slopes)[:, None]
        return _result(asked, values, base, fidelity, additive=False)

    def _with_groups(
        self, asked: Question, players: Tensor, generator: torch.Generator
    ) -> LocalModel:
        count = count_of(players)
        self._enough(count)
        present = torch.rand(self.samples, count, generator=generator) < 0.5
        design = present.double()
        width = SHARE_KERNEL_WIDTH if self.kernel_width is None else self.kernel_width
        weights = _kernel(
            (1 - design.mean(1).sqrt()).square(), width, f"about {SHARE_KERNEL_WIDTH}"
        )
        outputs = coalition_outputs(asked, present[:, players], slice(0, len(asked.inputs)))
        slopes, base, fidelity = _local_model(design, weights, outputs, self.ridge)
        values = spread(slopes, players)
        if asked.kept is not None:  # no perturbation moves them, so their slopes are only rounding
            values = values.masked_fill(asked.kept.flatten(1)[:, :, None], 0.0)
        return _result(asked, values, base, fidelity, additive=True)

    def _enough(self, features: int) -> None:
        """Refuse fewer perturbations than twice the unknowns, slopes and intercept."""
        if self.samples < 2 * features + 2:
            raise ConfigError.of(
                "samples",
                self.samples,
                f"at least {2 * features + 2} for {features} features; raise samples, or explain "
                "groups of features (groups, or cells for images)",
            )

    def _scale(self, shape: torch.Size, feature_scales: Tensor | None) -> Tensor:
        """Return the noise scale of every feature, as float64 on the CPU."""
        if feature_scales is None:
            return torch.full(shape, self.noise_scale, dtype=torch.float64)
        if feature_scales.shape != shape:
            raise ConfigError.of(
                "feature_scales.shape", tuple(feature_scales.shape), f"{tuple(shape)}"
            )
        if not (feature_scales > 0).all():
            raise ConfigError.of("feature_scales", float(feature_scales.min()), "positive numbers")
        return feature_scales.to("cpu", torch.float64)


def _kernel(squares: Tensor, width: float, better: str) -> Tensor:
    """Return the weight (m,) of each perturbation from its squared distance."""
    weights = torch.exp(squares / (-2 * width**2))
    largest = max(float(weights[part].sum()) for part in _folds(len(weights)))
    if float(weights.sum()) <= (1 + 1e-9) * largest:
        allowed = f"a larger width, {better}, because nearly all weights are 0 with this one"
        raise ConfigError.of("kernel_width", width, allowed)
    return weights


def _folds(count: int) -> list[slice]:
    """Cut the perturbations into parts; no part divides a pair."""
    ends = [count // 2 * number // FOLDS * 2 for number in range(FOLDS + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


def _noisy_outputs(asked: Question, shifts: Tensor) -> Tensor:
    """Return (n, m, k) float64 outputs of the model, for every instance and shift."""
    inputs = asked.inputs
    shifts = shifts.to(inputs)
    pairs = torch.arange(len(inputs) * len(shifts), device=inputs.device)
    parts = [
        asked.scores(inputs[pair // len(shifts)] + shifts[pair % len(shifts)], pair // len(shifts))
        for pair in torch.split(pairs, asked.chunk)
    ]
    return finite_scores(torch.cat(parts)).view(len(inputs), len(shifts), -1)


def _local_model(
    design: Tensor, weights: Tensor, outputs: Tensor, ridge: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Slopes (n, d, k), intercept (n, k) and fidelity (n, k), all float64.

    Sums over a fold are computed once; the regression without the fold uses all sums but these.

    Args:
        design: (m, d) perturbations z; neighbours of a pair follow each other.
        weights: (m,) kernel weights.
        outputs: (n, m, k) outputs of the model.
        ridge: penalty on the slopes.
    """
    n, count, k = outputs.shape
    weights = weights.to(outputs)
    design = torch.cat([design.to(outputs), outputs.new_ones(count, 1)], dim=1)
    columns = outputs.movedim(1, 0).reshape(count, n * k)
    folds = _folds(count)
    weighted = [design[part].T * weights[part] for part in folds]
    normals = torch.stack([each @ design[part] for each, part in zip(weighted, folds, strict=True)])
    sides = torch.stack([each @ columns[part] for each, part in zip(weighted, folds, strict=True)])
    penalty = torch.full((design.shape[1],), ridge, dtype=design.dtype, device=design.device)
    penalty[-1] = 0  # the intercept is free
    normal = normals.sum(0) + penalty.diag()
    side = sides.sum(0)
    without = torch.linalg.solve(normal - normals, side - sides)
    fitted = torch.cat([design[part] @ each for each, part in zip(without, folds, strict=True)])
    solution = torch.linalg.solve(normal, side).view(-1, n, k).movedim(0, 1)
    fidelity = weighted_r2(columns, fitted, weights).view(n, k)
    return solution[:, :-1], solution[:, -1], fidelity


def _result(
    asked: Question, values: Tensor, base: Tensor, fidelity: Tensor, *, additive: bool
) -> LocalModel:
    found = attribution(asked, values, base)
    return LocalModel(
        values=found.values,
        base=found.base,
        targets=found.targets,
        outputs=found.outputs if additive else None,
        fidelity=asked.shaped(fidelity),
    )


def weighted_r2(outputs: Tensor, fitted: Tensor, weights: Tensor) -> Tensor:
    """(columns,) share of the weighted variance over m that the fit explains; 1 for constants.

    1 - sum_m w_m (y_m - fit_m)^2 / sum_m w_m (y_m - mean)^2

    Args:
        outputs: (m, columns) values y.
        fitted: (m, columns) values of the fit.
        weights: (m,) weights w.
    """
    total = weights @ (outputs - weights / weights.sum() @ outputs).square()
    unexplained = weights @ (outputs - fitted).square()
    # Below the rounding of a float32 model there is no variance to explain.
    constant = total <= torch.finfo(torch.float32).eps ** 2 * (weights @ outputs.square())
    return torch.where(constant, 1.0, 1.0 - unexplained / total)
