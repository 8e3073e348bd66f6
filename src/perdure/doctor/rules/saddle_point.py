"""Rule: training stays at a saddle point of the loss."""

from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace


@dataclass(frozen=True, kw_only=True)
class SaddlePoint(Rule):
    """Find a saddle point: no slope, and a direction in which the loss falls.

    Symptom: the loss is not below nine tenths of its start and of chance at the end of an
    experience. On public records a step along the gradient could win less than `gain` of the loss,
    and the smallest eigenvalue of the Hessian is below -`bend` times the largest.

    Remedy: noise on the gradient, which leaves a saddle point, or another initialisation.

    Source: Dauphin et al. 2014, "Identifying and attacking the saddle point problem"; Jin et al.
    2017, "How to escape saddle points efficiently".

    Args:
        gain: largest share of the loss that a step along the gradient could win.
        bend: smallest ratio of the negative to the positive curvature.
    """

    name: ClassVar[str] = "saddle point"
    cause: ClassVar[Cause] = "fit"
    source: ClassVar[str] = (
        "Dauphin et al. 2014, Identifying and attacking the saddle point problem"
    )
    explained_by: ClassVar[tuple[str, ...]] = (
        "dead units",
        "exploding gradient",
        "learning rate too high",
        "learning rate too low",
        "initial variance",
        "saturated activation",
        "signal below noise",
        "unchanged parameters",
    )

    gain: float = 0.01
    bend: float = 0.1

    def watch(self, trace: Trace) -> Finding | None:
        """Look at the curvature at the end of an experience without progress."""
        found = trace.curvature
        if found is None or found.largest <= 0 or found.loss <= 0:
            return None
        gain = found.gradient_norm**2 / (2 * found.largest * found.loss)
        bend = -found.smallest / found.largest
        if gain > self.gain or bend < self.bend:
            return None
        return self.finding(
            f"the Hessian's smallest eigenvalue is {found.smallest:.2g}, its largest "
            f"{found.largest:.2g}, and the gradient's norm {found.gradient_norm:.2g}",
            measured=bend,
            threshold=self.bend,
            remedy=Remedy(
                advice="training.gradient_noise = 0.01, or model.init = 'he'",
                changes={"training.gradient_noise": 0.01},
            ),
            experience=trace.experience,
            step=trace.done,
        )
