"""Rule: the learning rate is too high."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace, rounded

AIM = 0.01
"""Update ratio at the beginning that the remedy aims at; healthy runs have 0.02 to 0.05."""


@dataclass(frozen=True, kw_only=True)
class LearningRateTooHigh(Rule):
    """Find a learning rate at which training diverges or does not settle.

    Symptom: early in training, the largest update is more than `ratio` of the norm of all weights,
    and the loss is not below its start and chance, or swings by more than `swing` times chance
    between more than `swings` of its windows. A loss or weight that becomes NaN or infinite after a
    finite first step counts, too. Without raw losses, as under privacy, the public loss is read.

    Remedy: a lower `training.learning_rate`, or a warm-up.

    Source: SageMaker Debugger, WeightUpdateRatio (its default, 10, is too large to matter), and
    AutoTrainer for the share of swings; limits from runs on digits.

    Args:
        ratio: update ratio above which an update is large.
        swing: rise of the loss from one window to the next, relative to chance.
        swings: share of windows that may rise so far.
    """

    name: ClassVar[str] = "learning rate too high"
    cause: ClassVar[Cause] = "learning rate"
    source: ClassVar[str] = "SageMaker Debugger, WeightUpdateRatio; AutoTrainer, oscillation"
    explained_by: ClassVar[tuple[str, ...]] = ("exploding gradient", "initial variance")

    ratio: float = 0.15
    swing: float = 0.1
    swings: float = 0.2

    def watch(self, trace: Trace) -> Finding | None:
        """Compare the early updates with the weights, and look at the loss."""
        if not trace.at:
            return None
        early = max(trace.update_ratios[: trace.early])
        first = trace.gradients[0].isfinite().all() and trace.updates[0].isfinite().all()
        if not trace.finite and bool(first):
            problem = "a loss or weight is NaN or infinite"
        elif not early > self.ratio:
            return None
        elif not trace.is_learning:
            problem = f"the loss is {trace.loss_now:.3g}, not below its start"
        elif self._swings(trace) > self.swings:
            problem = f"the loss rises in {self._swings(trace):.0%} of its windows"
        else:
            return None
        advice = "lower training.learning_rate"
        rate = rounded(trace.learning_rate * AIM / max(early, 10 * AIM))
        return self.finding(
            f"updates are up to {early:.2g} of the weights, and {problem}",
            measured=early,
            threshold=self.ratio,
            remedy=Remedy(advice=f"{advice} to {rate:g}", changes={"training.learning_rate": rate}),
            series=trace.smoothed_losses(50) or trace.public_losses,
            series_name="loss",
            experience=trace.experience,
            step=trace.done,
        )

    def _swings(self, trace: Trace) -> float:
        """Return the share of windows whose loss is much higher than that of the window before."""
        losses = trace.smoothed_losses() or trace.public_losses
        unit = trace.chance or (losses[0] if losses else 1.0)
        rises = [after - before > self.swing * unit for before, after in pairwise(losses)]
        return sum(rises) / max(1, len(rises))
