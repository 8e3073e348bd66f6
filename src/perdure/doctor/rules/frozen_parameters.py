"""Rule: parameters that should be trained do not require gradients."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from perdure.doctor.case import Case
from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule

FEWEST = 64
"""Fewest numbers of a weight whose distribution is judged."""


@dataclass(frozen=True, kw_only=True)
class FrozenParameters(Rule):
    """Find a frozen head, and frozen layers that have never been trained.

    Symptom: nothing requires gradients; or the head, the last layer with a weight, is frozen while
    others are trained; or more than `share` of the parameters are frozen weights that still look
    like PyTorch's initial ones: uniform between +-1 / sqrt(fan in). A pre-trained backbone that is
    frozen on purpose does not look like that.

    Remedy: `model.requires_grad_(True)`.

    Source: UMLAUT and SageMaker Debugger (UnchangedTensor) for the symptom; the distribution is
    that of torch.nn.Linear and torch.nn.Conv2d.

    Args:
        share: share of the parameters that may be frozen and untrained.
    """

    name: ClassVar[str] = "frozen parameters"
    cause: ClassVar[Cause] = "wiring"
    source: ClassVar[str] = "SageMaker Debugger, UnchangedTensor"

    share: float = 0.01

    def examine(self, case: Case) -> Finding | None:
        """Walk over the modules of the model."""
        total = sum(value.numel() for value in case.model.parameters())
        if not total:
            return None
        frozen = {n: v for n, v in case.model.named_parameters() if not v.requires_grad}
        if not frozen:
            return None
        layers = {
            name: weight
            for name, layer in case.model.named_modules()
            if isinstance(weight := getattr(layer, "weight", None), nn.Parameter)
        }
        head = list(layers)[-1] if layers else ""
        if len(frozen) == len(list(case.model.parameters())):
            return self._found("no parameter requires gradients", 1.0)
        if head and not layers[head].requires_grad:
            return self._found(f"the head {head!r} is frozen", layers[head].numel() / total)
        initial = [n for n, w in layers.items() if not w.requires_grad and looks_initial(w)]
        part = sum(layers[name].numel() for name in initial) / total
        if part <= self.share:
            return None
        return self._found(f"{', '.join(initial)} are frozen with initial weights", part)

    def _found(self, problem: str, part: float) -> Finding:
        return self.finding(
            f"{problem}: {part:.0%} of all parameters",
            measured=part,
            threshold=self.share,
            remedy=Remedy(advice="model.requires_grad_(True) before the optimiser is made"),
        )


def looks_initial(weight: Tensor) -> bool:
    """Return True if a weight (out, in, ...) is distributed as PyTorch initialises layers."""
    if weight.dim() < 2 or weight.numel() < FEWEST:
        return False
    bound = 1 / math.sqrt(weight[0].numel())
    top = float(weight.detach().abs().max())
    spread = float(weight.detach().std()) * math.sqrt(3) / bound
    return 0.9 * bound < top <= 1.0001 * bound and 0.85 < spread < 1.15
