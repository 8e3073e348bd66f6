"""DeepLIFT over a background (Deep SHAP), by captum (Shrikumar et al. 2017)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.explain._gradients import GradientExplainer, Network, by_pieces
from perdure.explain.base import Question


@dataclass(frozen=True, kw_only=True)
class DeepLiftSHAP(GradientExplainer):
    """Differences from each background row, passed back through the layers by the rescale rule.

    At an activation s the gradient is replaced by (s(x) - s(b)) / (x - b). The values add up to
    f(x) less the mean of f over the background, if all activations are modules of their own: a
    function such as `torch.relu`, or a product of activations, passes its plain gradient, and
    `additivity_gap` shows what is missing.

    Guarantee: as for `KernelSHAP`.

    Args:
        chunk: largest number of rows in one pass, if the rows of one instance fit in; None for a
            size that suits the caches.

    Raises:
        ConfigError: if a value is not allowed.

    Source: Shrikumar, Greenside, Kundaje 2017, "Learning important features through propagating
    activation differences"; Lundberg and Lee 2017, section 4.2.
    """

    def _values(self, captum: Any, asked: Question, network: Network, target: Tensor) -> Tensor:
        if network.body is None:
            allowed = "a torch module or a learner's predictor for DeepLiftSHAP"
            raise ConfigError.of("predict", "a function", allowed)
        absent = asked.absent
        if len(absent) == 1:  # captum asks for two rows or more
            absent = torch.cat([absent, absent])
        method = captum.DeepLiftShap(network)
        parts = []
        for piece in by_pieces(asked, 2 * len(absent)):
            try:
                parts.append(method.attribute(asked.inputs[piece], absent, target=target[piece]))
            except (AssertionError, RuntimeError) as error:
                text = " ".join(str(error).split())
                raise ConfigError(
                    f"DeepLiftSHAP cannot pass through this model: {text}; give each activation a "
                    "module of its own, or use integrated_gradients"
                ) from None
        return torch.cat(parts)
