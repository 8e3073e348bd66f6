"""Rule: units of a rectifier are never active."""

from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace


@dataclass(frozen=True, kw_only=True)
class DeadUnits(Rule):
    """Find layers most of whose units are never active, so that they get no gradient.

    Symptom: on public rows, more than `share` of the units of a ReLU, GELU or SiLU are active on
    less than 1 % of the rows.

    Remedy: another activation, or a lower learning rate.

    Source: SageMaker Debugger, DeadRelu.

    Args:
        share: share of the units of a layer.
    """

    name: ClassVar[str] = "dead units"
    cause: ClassVar[Cause] = "activation"
    source: ClassVar[str] = "SageMaker Debugger, DeadRelu"
    # units of a rectifier die when what is learnt changes, so forgetting comes first
    explained_by: ClassVar[tuple[str, ...]] = (
        "bias to new classes",
        "dead memory",
        "diverging server step",
        "forgotten experience",
        "learning rate too high",
        "lost plasticity",
        "initial variance",
    )

    share: float = 0.5

    def watch(self, trace: Trace) -> Finding | None:
        """Look at the latest probe."""
        silent = trace.probes[-1].layers.silent if trace.probes else {}
        worst = max(silent, key=lambda name: silent[name], default="")
        if not worst or silent[worst] <= self.share:
            return None
        return self.finding(
            f"{silent[worst]:.0%} of the units of {worst} are never active",
            measured=silent[worst],
            threshold=self.share,
            remedy=Remedy(
                advice="model.activation = 'leaky_relu'",
                changes={"model.activation": "leaky_relu"},
            ),
            series=tuple(probe.layers.silent.get(worst, 0.0) for probe in trace.probes),
            series_name=f"share of silent units of {worst}",
            experience=trace.experience,
            step=trace.done,
        )
