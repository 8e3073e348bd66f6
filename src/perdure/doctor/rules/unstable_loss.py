"""Rule: the loss surface is unstable around the trained weights."""

import statistics
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace


@dataclass(frozen=True, kw_only=True)
class UnstableLoss(Rule):
    """Find trained weights around which the loss rises steeply.

    Symptom: at the end of an experience, a random change of the weights by 1 % of their norm raises
    the public loss by more than `rise` times chance. One fixed direction is measured, a proxy of
    the mean curvature that needs one forward pass and no second seed. Or, in the second half, the
    public loss of a model that has learnt rises by more than `swing` times chance from probe to
    probe, in the mean, with 0 for a fall.

    Remedy: average the weights over steps, or lower the learning rate at the end.

    Source: Keskar et al. 2017, "On large-batch training", sharpness; limits from runs on digits,
    where healthy models have at most 0.002.

    Args:
        rise: rise of the loss, relative to chance.
        swing: mean rise of the public loss between two probes, relative to chance.
    """

    name: ClassVar[str] = "unstable loss"
    cause: ClassVar[Cause] = "fit"
    source: ClassVar[str] = "Keskar et al. 2017, On large-batch training for deep learning"
    explained_by: ClassVar[tuple[str, ...]] = ("learning rate too high", "initial variance")

    rise: float = 0.05
    swing: float = 0.03

    def watch(self, trace: Trace) -> Finding | None:
        """Look at the sharpness that was measured at the end, and at the public losses."""
        unit = trace.chance or trace.public_start
        if trace.sharpness is None or unit is None:
            return None
        rise = trace.sharpness / unit
        swing = self._swing(trace) / unit
        if rise > self.rise:
            problem = f"a random change of the weights by 1 % raises the loss by {rise * unit:.2g}"
        elif swing > self.swing:
            problem = (
                f"the public loss swings up by {swing * unit:.2g} from probe to probe, in the mean"
            )
        else:
            return None
        return self.finding(
            problem,
            measured=rise if rise > self.rise else swing,
            threshold=self.rise if rise > self.rise else self.swing,
            series=trace.public_losses,
            series_name="public loss",
            remedy=Remedy(
                advice="an average of the weights, EMA",
                changes={"training.averaging": {"name": "ema"}},
            ),
            experience=trace.experience,
            step=trace.done,
        )

    def _swing(self, trace: Trace) -> float:
        """Return the mean rise of the public loss in the second half; 0 with few probes."""
        late = [p.loss for p in trace.probes if p.loss is not None and p.step >= trace.steps / 2]
        if len(late) < 4 or not trace.is_learning:
            return 0.0
        return statistics.mean(max(0.0, after - before) for before, after in pairwise(late))
