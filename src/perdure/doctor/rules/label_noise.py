"""Rule: a part of the training labels is wrong."""

from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.finding import Cause, Finding, Level, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace


@dataclass(frozen=True, kw_only=True)
class LabelNoise(Rule):
    """Find training labels that the model cannot fit, although it fits public records.

    Symptom: once the model has learnt the task, the training loss stays above the public loss by
    more than `gap` times chance for three measurements in a row. A model fits right labels first,
    so the gap is found before it learns the wrong ones by heart. If the public records have wrong
    labels too, the rule is silent. It is also silent where the training loss is raised on purpose,
    by dropout, an attack, views, or memory, and where the loss resists wrong labels already.

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
        """Compare the losses on training and public records over time."""
        if not trace.losses or trace.mixed_loss or trace.robust_loss:
            return None
        unit = trace.chance or trace.public_start
        excess = trace.excess_losses()
        if unit is None or len(excess) < 3:
            return None
        lasting = [min(excess[at : at + 3]) for at in range(len(excess) - 2)]
        gap = max(lasting) / unit
        if gap <= self.gap:
            return None
        return self.finding(
            f"the loss on training records stays {max(lasting):.2g} above the loss on public ones",
            measured=gap,
            threshold=self.gap,
            remedy=Remedy(
                advice="a loss for wrong labels, such as GeneralisedCrossEntropy()",
                changes={"training.loss": {"name": "generalised_cross_entropy"}},
            ),
            series=excess,
            series_name="training loss above the public loss",
            experience=trace.experience,
            step=trace.done,
        )
