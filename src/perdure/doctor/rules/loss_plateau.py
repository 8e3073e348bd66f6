"""Rule: the loss stays near chance."""

from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace, rounded


@dataclass(frozen=True, kw_only=True)
class LossPlateau(Rule):
    """Find a loss that stays near chance, where no other rule says why.

    Symptom: at the end of an experience the recent loss is not below nine tenths of its start and
    of chance.

    Remedy: train longer, with a schedule that restarts, or use a larger model.

    Source: SageMaker Debugger, LossNotDecreasing, which compares raw losses 10 steps apart;
    smoothed and relative to chance here.
    """

    name: ClassVar[str] = "loss plateau"
    cause: ClassVar[Cause] = "fit"
    source: ClassVar[str] = "SageMaker Debugger, LossNotDecreasing"
    explained_by: ClassVar[tuple[str, ...]] = (
        "dead units",
        "exploding gradient",
        "learning rate too high",
        "learning rate too low",
        "initial variance",
        "saddle point",
        "saturated activation",
        "shuffled labels",
        "signal below noise",
        "unchanged parameters",
        "vanishing gradient",
    )

    def watch(self, trace: Trace) -> Finding | None:
        """Look at the loss at the end of an experience."""
        now = trace.loss_now
        start = trace.chance or trace.public_start
        if trace.share < 1 or now is None or start is None or trace.is_learning:
            return None
        rate = rounded(3 * trace.learning_rate)
        return self.finding(
            f"the loss is {now:.3g} at the end of the experience; chance is {start:.3g}",
            measured=now / start,
            threshold=0.9,
            remedy=Remedy(
                advice=f"train longer, or raise training.learning_rate to {rate:g}",
                changes={"training.learning_rate": rate},
            ),
            series=trace.smoothed_losses(50) or trace.public_losses,
            series_name="loss",
            experience=trace.experience,
            step=trace.done,
        )
