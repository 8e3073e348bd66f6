"""Rule: gradients explode towards the input."""

from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace

CLIPPED = 1.0
"""Gradient norm of the remedy, as is common for recurrent networks and transformers."""


@dataclass(frozen=True, kw_only=True)
class ExplodingGradient(Rule):
    """Find layers whose gradients are far larger than the gradient of the head, or infinite.

    Symptom: early in training, the gradient norm of a weight is above `ratio` times that of the
    head, or the first gradient is NaN or infinite. Under privacy the rule is silent: each record's
    gradient is clipped.

    Remedy: `training.max_grad_norm`, orthogonal initialisation, or normalisation.

    Source: AutoTrainer, ratio of layers above 70; healthy runs on digits have at most 4.

    Args:
        ratio: ratio of gradient norms.
    """

    name: ClassVar[str] = "exploding gradient"
    cause: ClassVar[Cause] = "initialisation"
    source: ClassVar[str] = "AutoTrainer, exploding gradient"

    ratio: float = 70.0

    def watch(self, trace: Trace) -> Finding | None:
        """Compare the early gradients of the layers."""
        layers = trace.layer_gradients
        if trace.private or layers.shape[-1] < 2:
            return None
        early = layers[: trace.early]
        early = early[early.isfinite().all(1)]
        if not len(early):
            largest = float("inf")
            problem = "the first gradient is NaN or infinite"
        else:
            early = early[early[:, -1] > 0]
            # a head without gradient is another symptom
            if not len(early):
                return None
            # one explosion is enough: it can move the weights to where gradients are small
            ratios = (early / early[:, -1:]).amax(0)
            largest = float(ratios.max())
            worst = trace.layer_names[int(ratios.argmax())]
            problem = f"the gradient of {worst} is {largest:.2g} times the head's"
        if largest <= self.ratio:
            return None
        return self.finding(
            problem,
            measured=largest,
            threshold=self.ratio,
            remedy=Remedy(
                advice=f"training.max_grad_norm = {CLIPPED}",
                changes={"training.max_grad_norm": CLIPPED},
            ),
            series=trace.gradient_norms,
            series_name="gradient norm",
            experience=trace.experience,
            step=trace.done,
        )
