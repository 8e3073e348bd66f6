"""Rule: a part of the training labels is wrong."""

from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.finding import Cause, Finding, Level, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace


@dataclass(frozen=True, kw_only=True)
class LabelNoise(Rule):
    """Find training labels that the model cannot fit, although it fits public records.

    Symptom: the training loss is above the public loss by more than `gap` times chance, late in the
    experience: the model has learnt the task, and the training records have a loss that it cannot
    lower. If the public records have wrong labels too, the rule is silent. It is also silent where
    the training loss is raised on purpose: by dropout, an attack, views, or memory.

    Remedy: a loss that bounds the loss of a wrong label.

    Source: Arpit et al. 2017, "A closer look at memorization in deep networks": a model fits right
    labels first.

    Args:
        gap: difference of the losses, relative to chance.
    """

    name: ClassVar[str] = "label noise"
    cause: ClassVar[Cause] = "data"
    level: ClassVar[Level] = "debug"
    source: ClassVar[str] = "Arpit et al. 2017, A closer look at memorization in deep networks"

    gap: float = 0.1

    def watch(self, trace: Trace) -> Finding | None:
        """Compare the recent losses on training and public records."""
        public = trace.public_losses
        train = trace.loss_now
        if not trace.losses or len(public) < 4 or train is None or trace.mixed_loss:
            return None
        if trace.share < 0.5 or not trace.is_learning:
            return None
        unit = trace.chance or public[0]
        recent = sorted(public[-3:])[1]
        gap = (train - recent) / unit
        if gap <= self.gap:
            return None
        return self.finding(
            f"the loss is {train:.2g} on training records, but {recent:.2g} on public ones",
            measured=gap,
            threshold=self.gap,
            remedy=Remedy(
                advice="a loss for wrong labels, such as GeneralisedCrossEntropy()",
                changes={"training.loss": {"name": "generalised_cross_entropy"}},
            ),
            series=trace.smoothed_losses(50),
            series_name="training loss",
            experience=trace.experience,
            step=trace.done,
        )
