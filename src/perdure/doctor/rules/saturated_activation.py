"""Rule: a tanh or sigmoid is at its bounds."""

from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace


@dataclass(frozen=True, kw_only=True)
class SaturatedActivation(Rule):
    """Find layers of tanh or sigmoid most of whose values are at the bounds, without a gradient.

    Symptom: on public rows, more than `share` of the values of a layer are within 1 % of the range
    from a bound.

    Remedy: another activation, or smaller initial weights.

    Source: SageMaker Debugger, SaturatedActivation, whose bounds (tanh beyond 9.5) are so far out
    that the gradient has vanished long before.

    Args:
        share: share of the values of a layer.
    """

    name: ClassVar[str] = "saturated activation"
    cause: ClassVar[Cause] = "activation"
    source: ClassVar[str] = "SageMaker Debugger, SaturatedActivation"
    explained_by: ClassVar[tuple[str, ...]] = (
        "exploding gradient",
        "learning rate too high",
        "initial variance",
        "vanishing gradient",
    )

    share: float = 0.5

    def watch(self, trace: Trace) -> Finding | None:
        """Look at the latest probe."""
        saturated = trace.probes[-1].layers.saturated if trace.probes else {}
        worst = max(saturated, key=lambda name: saturated[name], default="")
        if not worst or saturated[worst] <= self.share:
            return None
        return self.finding(
            f"{saturated[worst]:.0%} of the values of {worst} are at the bounds of the activation",
            measured=saturated[worst],
            threshold=self.share,
            remedy=Remedy(
                advice="another activation and initialisation",
                changes={"model.activation": "relu", "model.init": "xavier"},
            ),
            series=tuple(probe.layers.saturated.get(worst, 0.0) for probe in trace.probes),
            series_name=f"share of saturated values of {worst}",
            experience=trace.experience,
            step=trace.done,
        )
