"""Local linear models of a model's output (LIME), for all instances of a batch at once."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.explain.base import Attribution, Explainer, Predict, chosen_targets, scores, seeded


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalModel(Attribution):
    """Result of LIME: a linear model that approximates the real model near each instance.

    Args:
        values: (n, ...) slopes: change of the output per unit of each input.
        base: (n,) value of the local model at the instance.
        targets: (n,) int64, index of the explained output.
        fidelity: (n,) weighted R^2 of the local model on its perturbations; 1 is a perfect fit.
    """

    fidelity: Tensor


@dataclass(frozen=True, kw_only=True)
class LIME(Explainer):
    """Slopes of a weighted ridge regression on Gaussian perturbations around each instance.

        min_(a, b)  sum_k w_k (f(x + noise_scale * z_k) - a - <b, z_k>)^2 + ridge |b|^2
        z_k ~ N(0, 1),  w_k = exp(-|z_k|^2 / (2 kernel_width^2)),  values = b / noise_scale

    The perturbations come in pairs z, -z and are drawn once for all instances. Distances do not
    depend on the instance, so all instances use the same regression matrix. No feature is removed
    for sparsity.

    Guarantee: none. For a privately released model and a public noise scale, the result is
    post-processing and costs no privacy. A noise scale that is measured on private records costs
    privacy like every query on them.

    Args:
        samples: number of perturbations per instance, an even number; n instances need n * samples
            forward rows.
        kernel_width: width of the kernel in units of the noise; None for 0.75 * sqrt(features).
        noise_scale: standard deviation of the perturbation in units of the inputs.
        ridge: penalty on the slopes per unit of noise.
        chunk: largest number of rows in one forward pass.

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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 2 or self.samples % 2:
            raise ConfigError.of("samples", self.samples, "an even number, 2 or more")
        for name in ("kernel_width", "noise_scale", "ridge"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError.of(name, value, "a positive number")

    def explain(
        self,
        predict: Predict,
        inputs: Tensor,
        background: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        generator: torch.Generator | None = None,
        feature_scales: Tensor | None = None,
    ) -> LocalModel:
        """Compute slopes, the value at each instance, and the fidelity of the local model.

        Args:
            predict: function (rows, ...) -> (rows, outputs), called without gradients.
            inputs: (n, ...) instances to explain.
            background: not used.
            targets: (n,) int64 output to explain for each instance; None for the largest output.
            generator: CPU generator that draws the perturbations; None for seed 0.
            feature_scales: one `noise_scale` per feature, in the shape of an instance; None for one
                value for all features.

        Raises:
            ConfigError: if shapes do not match, or the kernel is so narrow that all weights are 0.
        """
        scale = self._scale(inputs.shape[1:], feature_scales)
        noise, weights = self._perturbations(scale.numel(), seeded(generator))
        targets = chosen_targets(predict, inputs, targets, self.chunk)
        outputs = _perturbed_outputs(
            predict, inputs, noise.view(-1, *scale.shape) * scale, targets, self.chunk
        )
        slopes, base, fidelity = _local_model(outputs, noise, weights, self.ridge)
        values = slopes.view(inputs.shape) / scale.to(inputs.device)
        return LocalModel(
            values=values.to(inputs.dtype),
            base=base.to(inputs.dtype),
            fidelity=fidelity.to(inputs.dtype),
            targets=targets,
        )

    def _scale(self, shape: torch.Size, feature_scales: Tensor | None) -> Tensor:
        """Noise scale of every feature, as float64 on the CPU."""
        if feature_scales is None:
            return torch.full(shape, self.noise_scale, dtype=torch.float64)
        if feature_scales.shape != shape:
            raise ConfigError.of(
                "feature_scales.shape", tuple(feature_scales.shape), f"{tuple(shape)}"
            )
        if not (feature_scales > 0).all():
            raise ConfigError.of("feature_scales", float(feature_scales.min()), "positive numbers")
        return feature_scales.to("cpu", torch.float64)

    def _perturbations(self, features: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw noise (samples, features) in opposite pairs; return it with weights (samples,)."""
        width = 0.75 * math.sqrt(features) if self.kernel_width is None else self.kernel_width
        half = torch.randn(self.samples // 2, features, generator=generator, dtype=torch.float64)
        noise = torch.cat([half, -half])
        weights = torch.exp(noise.square().sum(1) / (-2 * width**2))
        if weights.sum() == 0:
            raise ConfigError.of(
                "kernel_width",
                width,
                f"a larger width, about {math.sqrt(features):.2g}, because "
                "all weights are 0 with this one",
            )
        return noise, weights


@torch.no_grad()
def _perturbed_outputs(
    predict: Predict, inputs: Tensor, shifts: Tensor, targets: Tensor, chunk: int
) -> Tensor:
    """Return (n, samples) float64 outputs of the model, for every instance and perturbation."""
    shifts = shifts.to(inputs)
    pairs = torch.arange(len(inputs) * len(shifts), device=inputs.device)
    values = [
        scores(
            predict,
            inputs[pair // len(shifts)] + shifts[pair % len(shifts)],
            targets[pair // len(shifts)],
        )
        for pair in torch.split(pairs, chunk)
    ]
    return torch.cat(values).view(len(inputs), len(shifts))


def _local_model(
    outputs: Tensor, noise: Tensor, weights: Tensor, ridge: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Slopes (n, features), value at the instance (n,) and fidelity (n,), all float64.

    Slopes are per unit of noise.
    """
    operator = _ridge_operator(noise, weights, ridge).to(outputs.device)
    noise = noise.to(outputs.device)
    weights = weights.to(outputs.device)
    # Opposite pairs have weighted mean zero, so the intercept is the weighted mean of the outputs.
    base = outputs @ weights / weights.sum()
    slopes = outputs @ operator.T
    return slopes, base, weighted_r2(outputs, base[:, None] + slopes @ noise.T, weights)


def _ridge_operator(noise: Tensor, weights: Tensor, ridge: float) -> Tensor:
    """Matrix (features, samples) from outputs to the slopes of the weighted ridge regression."""
    weighted = noise.T * weights
    penalty = ridge * torch.eye(noise.shape[1], dtype=noise.dtype)
    operator: Tensor = torch.linalg.solve(weighted @ noise + penalty, weighted)
    return operator


def weighted_r2(outputs: Tensor, fitted: Tensor, weights: Tensor) -> Tensor:
    """(n,) share of the weighted variance of each row that the fit explains; 1 for constant rows.

    1 - sum_k w_k (y_k - fit_k)^2 / sum_k w_k (y_k - mean)^2
    """
    centred = outputs - (outputs @ weights / weights.sum())[:, None]
    total = centred.square() @ weights
    unexplained = (outputs - fitted).square() @ weights
    # Below the rounding of a float32 model there is no variance to explain.
    constant = total <= torch.finfo(torch.float32).eps ** 2 * (outputs.square() @ weights)
    return torch.where(constant, 1.0, 1.0 - unexplained / total)
