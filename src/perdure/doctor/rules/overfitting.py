"""Rule: the model has learnt its training records better than the task."""

from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.finding import Cause, Finding, Level, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Overfitting(Rule):
    """Find a gap between the loss on training records and the loss on public records.

    Symptom: the smoothed public loss is above the smoothed training loss by more than `gap` times
    chance, and above its own minimum by more than `rise` of that minimum.

    Remedy: dropout, weight decay, early stopping, or augmentation.

    Source: SageMaker Debugger, Overfit, compares (validation - train) / train with 0.1, which every
    model exceeds that fits its training records; so the gap is relative to chance here.

    Args:
        gap: difference of the losses, relative to chance.
        rise: rise of the public loss above its minimum, relative to the minimum.
    """

    name: ClassVar[str] = "overfitting"
    cause: ClassVar[Cause] = "fit"
    level: ClassVar[Level] = "debug"
    source: ClassVar[str] = "SageMaker Debugger, Overfit"
    explained_by: ClassVar[tuple[str, ...]] = (
        "dead memory",
        "initial variance",
        "learning rate too high",
    )

    gap: float = 0.25
    rise: float = 0.1

    def watch(self, trace: Trace) -> Finding | None:
        """Compare the recent losses on training and public records."""
        public = trace.public_losses
        train = trace.loss_now
        if not trace.losses or len(public) < 4 or train is None or trace.share <= 0.5:
            return None
        if trace.mixed_loss and trace.experience > 0:
            return None  # rows from memory are learnt by heart, and are no rows of this experience
        unit = trace.chance or public[0]
        recent = sorted(public[-3:])[1]
        gap = (recent - train) / unit
        lowest = min(public)
        if gap <= self.gap or recent <= (1 + self.rise) * lowest:
            return None
        return self.finding(
            f"the loss is {train:.2g} on training records and {recent:.2g} on public ones, whose "
            f"lowest was {lowest:.2g}",
            measured=gap,
            threshold=self.gap,
            remedy=Remedy(
                advice="model.dropout = 0.3, or early stopping on training.validation",
                changes={"model.dropout": 0.3},
            ),
            series=public,
            series_name="public loss",
            experience=trace.experience,
            step=trace.done,
        )
