"""Rule: the initial weights are too large, or all units start alike."""

from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace


@dataclass(frozen=True, kw_only=True)
class PoorInitialisation(Rule):
    """Find initial weights that are too large, or with which all units of a layer are alike.

    Symptom: before the first step of the first experience, the public loss is above `loss` times
    chance, so the model is sure of what it cannot know; or the outputs of a layer differ by less
    than `spread` between rows and units.

    Remedy: initialise by He et al. for rectifiers, by Glorot for tanh.

    Source: SageMaker Debugger, PoorWeightInitialization, compares the variances of layers by a
    factor of 10, which healthy layers of PyTorch's own initialisation pass; so the loss is read.

    Args:
        loss: initial loss, relative to chance.
        spread: smallest standard deviation of the outputs of a layer.
    """

    name: ClassVar[str] = "poor initialisation"
    cause: ClassVar[Cause] = "initialisation"
    source: ClassVar[str] = "SageMaker Debugger, PoorWeightInitialization"

    loss: float = 3.0
    spread: float = 1e-4

    def watch(self, trace: Trace) -> Finding | None:
        """Look at the first probe of the first experience."""
        start = trace.public_start
        if trace.experience > 0 or not trace.probes or trace.probes[0].step > 0:
            return None
        spreads = trace.probes[0].layers.spread
        least = min(spreads, key=lambda name: spreads[name], default="")
        if start is not None and trace.chance is not None and start > self.loss * trace.chance:
            measured = start / trace.chance
            problem = f"the loss before training is {start:.3g}, {measured:.2g} times chance"
            threshold = self.loss
        elif least and spreads[least] < self.spread:
            measured = spreads[least]
            problem = f"all outputs of {least} are alike: their deviation is {measured:.1g}"
            threshold = self.spread
        else:
            return None
        return self.finding(
            problem,
            measured=measured,
            threshold=threshold,
            remedy=Remedy(
                advice="model.initialisation = 'he'", changes={"model.initialisation": "he"}
            ),
            series=tuple(spreads.values()),
            series_name="standard deviation of the outputs of each layer",
            experience=trace.experience,
            step=trace.done,
        )
