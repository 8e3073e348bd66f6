"""Rule: new experiences are learnt less well than the first."""

from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace


@dataclass(frozen=True, kw_only=True)
class LostPlasticity(Rule):
    """Find an experience that is learnt much less well than the first one was.

    Symptom: right after it was trained, the accuracy of the newest experience above a guess is
    below `share` of the same number of the first. Only the classes of an experience are compared:
    in class-incremental learning, stored records of earlier classes take outputs away from new
    ones, which is no loss of plasticity. The experiences should be about equally hard.

    Remedy: a weaker penalty, a new start of the optimiser, or units that do not die.

    Source: Dohare et al. 2024, "Loss of plasticity in deep continual learning".

    Args:
        share: accuracy above chance, relative to that of the first experience.
    """

    name: ClassVar[str] = "lost plasticity"
    cause: ClassVar[Cause] = "memory"
    source: ClassVar[str] = "Dohare et al. 2024, Loss of plasticity in deep continual learning"

    share: float = 0.6

    def watch(self, trace: Trace) -> Finding | None:
        """Compare the accuracies right after training with the first one."""
        learnt = [
            (accuracy - guess) / max(1e-9, 100 - guess)
            for accuracy, guess in zip(trace.learnt, trace.guesses, strict=False)
        ]
        if len(learnt) < 2 or not learnt[0] > 0.2:
            return None
        share = learnt[-1] / learnt[0]
        if not share < self.share:
            return None
        return self.finding(
            f"experience {len(learnt)} reached {trace.learnt[-1]:.0f} % among its own classes, the "
            f"first {trace.learnt[0]:.0f} %",
            measured=share,
            threshold=self.share,
            remedy=Remedy(
                advice="weaken the strategy's penalty, or training.reset_optimizer = true",
                changes={"training.reset_optimizer": True},
            ),
            series=tuple(learnt),
            series_name="accuracy above a guess after training, by experience",
            experience=trace.experience,
        )
