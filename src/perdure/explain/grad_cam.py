"""Grad-CAM: channels of a convolution, weighted by their gradients, by captum (2017)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from perdure.errors import ConfigError
from perdure.explain._gradients import GradientExplainer, Network, by_pieces
from perdure.explain.base import Attribution, Question

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}
"""Interpolation between the positions of a layer, by the number of sides of an input."""


@dataclass(frozen=True, kw_only=True)
class GradCAM(GradientExplainer):
    """Positions of a convolution whose channels raise the output, enlarged to the input.

        heat = max(0, sum_c A_c mean over positions of d f / d A_c)

    with the activations A of one layer. All channels of an input get equal shares of the heat. The
    values are a map of places, no differences of outputs: `base` is 0, and there is no
    `additivity_gap`.

    Guarantee: as for `KernelSHAP`; the background is not used.

    Args:
        layer: name of the layer in the model's `named_modules()`; None for the last convolution.
        chunk: largest number of rows in one pass; None for a size that suits the caches.

    Raises:
        ConfigError: if a value is not allowed.

    Source: Selvaraju et al. 2017, "Grad-CAM: visual explanations from deep networks via
    gradient-based localization", section 3.
    """

    layer: str | None = None

    def unknowns(self, shape: Sequence[int]) -> int:
        """Return the number of features of an input with sides; see `Explainer.unknowns`."""
        _require_sides(shape)
        return super().unknowns(shape)

    def _values(self, captum: Any, asked: Question, network: Network, target: Tensor) -> Tensor:
        shape = asked.inputs.shape[1:]
        _require_sides(shape)
        method = captum.LayerGradCam(network, _layer(network, self.layer))
        parts = []
        for piece in by_pieces(asked, 1):
            rows = asked.inputs[piece]
            heat = method.attribute(rows, target[piece], relu_attributions=True)
            if heat.ndim != len(shape) + 1:
                allowed = "a layer whose output has channels and the sides of the input"
                raise ConfigError.of("layer", self.layer, allowed)
            sides = MODES[len(shape) - 1]
            parts.append(captum.LayerAttribution.interpolate(heat, tuple(shape[1:]), sides))
        return torch.cat(parts).expand(-1, *shape) / shape[0]

    def _result(self, asked: Question, values: Tensor) -> Attribution:
        found = super()._result(asked, values)
        return replace(found, base=found.base.new_zeros(found.base.shape), outputs=None)


def _require_sides(shape: Sequence[int]) -> None:
    if len(shape) - 1 not in MODES:
        allowed = "(channels, length), (channels, height, width) or with a depth, for GradCAM"
        raise ConfigError.of("shape of an input", tuple(shape), allowed)


def _layer(network: Network, name: str | None) -> nn.Module:
    """Return the layer of this name, or the last convolution."""
    if network.body is None:
        allowed = "a torch module or a learner's predictor for GradCAM"
        raise ConfigError.of("predict", "a function", allowed)
    layers: dict[str, nn.Module] = dict(network.body.named_modules())
    convolutions = [key for key, each in layers.items() if isinstance(each, CONVOLUTIONS)]
    if name is None:
        if not convolutions:
            allowed = "a model with a convolution for GradCAM; use integrated_gradients"
            raise ConfigError.of("predict", type(network.body).__name__, allowed)
        return layers[convolutions[-1]]
    if not name or name not in layers:
        known = convolutions or [key for key in layers if key]
        raise ConfigError.of("layer", name, known)
    return layers[name]
