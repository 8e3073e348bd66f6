"""Rule: the learning rate is too low."""

import statistics
from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace, rounded

AIM = 0.003
"""Update ratio that the remedy aims at: about the median of a healthy run."""


@dataclass(frozen=True, kw_only=True)
class LearningRateTooLow(Rule):
    """Find a learning rate at which the loss hardly moves.

    Symptom: early in training the median update is less than `ratio` of the norm of all weights,
    and after half of the experience the loss is not below its start and chance.

    Remedy: a higher `training.learning_rate`.

    Source: Karpathy's rule of thumb, updates of about 0.001 of the weights; SageMaker Debugger,
    WeightUpdateRatio below 1e-8, is too small to matter.

    Args:
        ratio: update ratio below which updates are small.
    """

    name: ClassVar[str] = "learning rate too low"
    cause: ClassVar[Cause] = "learning rate"
    source: ClassVar[str] = "Karpathy, CS231n notes: updates of about 1e-3 of the weights"
    explained_by: ClassVar[tuple[str, ...]] = (
        "dead units",
        "exploding gradient",
        "initial variance",
        "saturated activation",
        "vanishing gradient",
    )

    ratio: float = 1e-4

    def watch(self, trace: Trace) -> Finding | None:
        """Compare the early updates with the weights, and look at the loss."""
        if not trace.at or trace.share < 0.5 or trace.is_learning:
            return None
        ratio = statistics.median(trace.update_ratios[: trace.early])
        if not 0 < ratio < self.ratio:
            return None
        rate = rounded(trace.learning_rate * AIM / ratio)
        return self.finding(
            f"updates are {ratio:.1g} of the weights, and the loss is {trace.loss_now:.3g}, not "
            "below its start",
            measured=ratio,
            threshold=self.ratio,
            remedy=Remedy(
                advice=f"raise training.learning_rate to {rate:g}",
                changes={"training.learning_rate": rate},
            ),
            series=trace.smoothed_losses(50) or trace.public_losses,
            series_name="loss",
            experience=trace.experience,
            step=trace.done,
        )
