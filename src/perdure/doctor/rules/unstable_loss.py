"""Rule: the loss surface is unstable around the trained weights."""

from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace


@dataclass(frozen=True, kw_only=True)
class UnstableLoss(Rule):
    """Find trained weights around which the loss rises steeply.

    Symptom: at the end of an experience, a random change of the weights by 1 % of their norm raises
    the public loss by more than `rise` times chance. One fixed direction is measured, a proxy of
    the mean curvature that needs one forward pass and no second seed.

    Remedy: average the weights over steps, or lower the learning rate at the end.

    Source: Keskar et al. 2017, "On large-batch training", sharpness; limits from runs on digits,
    where healthy models have at most 0.002.

    Args:
        rise: rise of the loss, relative to chance.
    """

    name: ClassVar[str] = "unstable loss"
    cause: ClassVar[Cause] = "fit"
    source: ClassVar[str] = "Keskar et al. 2017, On large-batch training for deep learning"
    explained_by: ClassVar[tuple[str, ...]] = ("learning rate too high", "initial variance")

    rise: float = 0.05

    def watch(self, trace: Trace) -> Finding | None:
        """Look at the sharpness that was measured at the end."""
        unit = trace.chance or trace.public_start
        if trace.sharpness is None or unit is None:
            return None
        rise = trace.sharpness / unit
        if rise <= self.rise:
            return None
        return self.finding(
            f"a random change of the weights by 1 % raises the loss by {trace.sharpness:.2g}",
            measured=rise,
            threshold=self.rise,
            remedy=Remedy(
                advice="averaging=EMA()", changes={"training.averaging": {"name": "ema"}}
            ),
            experience=trace.experience,
            step=trace.done,
        )
