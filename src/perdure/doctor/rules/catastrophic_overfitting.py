"""Rule: fast adversarial training has collapsed."""

from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace

LEAST = 20.0
"""Accuracy under attack, in percent, below which a model has not become robust yet."""


@dataclass(frozen=True, kw_only=True)
class CatastrophicOverfitting(Rule):
    """Find adversarial training whose robustness breaks down while it goes on.

    Training with attacks of one step may collapse within an epoch to models that only this attack
    cannot fool; the accuracy on clean records rises meanwhile, so nothing else shows it. The rule
    needs measurements under an attack of several steps, `Validation(attack=PGD(...))`.

    Symptom: the accuracy under the attack on validation records is below `share` of the best one
    of the experience.

    Remedy: stop early and keep the best parameters (`training.validation` with `patience`), a lower
    learning rate, or an attack of several steps.

    Source: Wong, Rice, Kolter 2020, "Fast is better than free", section 5.4; Andriushchenko and
    Flammarion 2020, "Understanding and improving fast adversarial training".

    Args:
        share: accuracy under attack, relative to the best.
    """

    name: ClassVar[str] = "catastrophic overfitting"
    cause: ClassVar[Cause] = "fit"
    source: ClassVar[str] = "Wong, Rice, Kolter 2020, Fast is better than free"

    share: float = 0.6

    def watch(self, trace: Trace) -> Finding | None:
        """Compare the last accuracy under attack with the best."""
        if len(trace.robust) < 2 or trace.adversary is None:
            return None
        best = max(trace.robust)
        last = trace.robust[-1]
        if best < LEAST or last >= self.share * best:
            return None
        name = type(trace.adversary).__name__
        return self.finding(
            f"accuracy under attack has fallen from {best:.0f} to {last:.0f} % in training with "
            f"{name}",
            measured=last / best,
            threshold=self.share,
            remedy=Remedy(
                advice="early stopping by the accuracy under attack, a lower learning rate, or "
                "an attack of several steps",
                changes={"training.validation.patience": 1, "training.validation.keep_best": True},
            ),
            experience=trace.experience,
        )
