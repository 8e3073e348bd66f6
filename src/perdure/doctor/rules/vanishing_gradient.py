"""Rule: gradients vanish towards the input."""

from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace


@dataclass(frozen=True, kw_only=True)
class VanishingGradient(Rule):
    """Find layers near the input whose gradients are far smaller than the gradient of the head.

    Symptom: early in training, the gradient norm of every weight in the first half of the layers is
    below `ratio` times that of the head. Layers that are dead or saturated from the start are left
    to the rules for them. Under privacy the rule is silent, because noise hides small gradients;
    see the rule "signal below noise".

    Remedy: skip connections, normalisation, or another activation.

    Source: AutoTrainer, first/last below 1e-3. One layer alone is not enough: in a healthy
    transformer, queries and keys have 7e-4.

    Args:
        ratio: ratio of gradient norms.
        spoilt: share of silent or saturated units of a layer that explains the symptom.
    """

    name: ClassVar[str] = "vanishing gradient"
    cause: ClassVar[Cause] = "initialisation"
    source: ClassVar[str] = "AutoTrainer, vanishing gradient"
    explained_by: ClassVar[tuple[str, ...]] = ("learning rate too high",)

    ratio: float = 1e-3
    spoilt: float = 0.5

    def watch(self, trace: Trace) -> Finding | None:
        """Compare the early gradients of the layers."""
        layers = trace.layer_gradients
        if trace.private or layers.shape[-1] < 2 or not trace.finite:
            return None
        first = trace.probes[0].layers
        if any(x > self.spoilt for x in (*first.silent.values(), *first.saturated.values())):
            return None
        early = layers[: trace.early].median(0).values
        ratios = early / early[-1].clamp(min=1e-30)
        half = ratios[: max(1, len(ratios) // 2)]
        largest = float(half.max())
        if largest >= self.ratio:
            return None
        return self.finding(
            f"gradients of {trace.layer_names[0]} to {trace.layer_names[len(half) - 1]} are at "
            f"most {largest:.1g} of the head's",
            measured=largest,
            threshold=self.ratio,
            remedy=Remedy(
                advice="skip connections: model.skip = true; or model.activation = 'relu'",
                changes={"model.skip": True, "model.activation": "relu"},
            ),
            series=ratios.tolist(),
            series_name="gradient norm of each layer, relative to the head's",
            experience=trace.experience,
            step=trace.done,
        )
