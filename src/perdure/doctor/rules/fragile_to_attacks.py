"""Rule: small changes of the inputs mislead the model."""

from dataclasses import dataclass
from typing import ClassVar

from perdure.adversarial import Attack
from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace

STEPS = 5
"""Steps of the attack of the remedy; each costs a pass."""


@dataclass(frozen=True, kw_only=True)
class FragileToAttacks(Rule):
    """Find a model whose accuracy falls under an attack that the user wants it to resist.

    Nearly every model falls under an attack if it has not been trained for it, so the rule needs an
    attack: `Monitor(attack=...)`, or the table `[attack]` of a config.

    Symptom: at the end of the stream, the accuracy on public test records under the attack is below
    `share` of the accuracy without it.

    Remedy: adversarial training, `training.adversary`; a stronger one if the training has one: more
    steps, a larger epsilon, or more epochs.

    Source: Madry et al. 2018, "Towards deep learning models resistant to adversarial attacks".

    Args:
        share: accuracy under attack, relative to the accuracy without it.
    """

    name: ClassVar[str] = "fragile to attacks"
    cause: ClassVar[Cause] = "fit"
    source: ClassVar[str] = "Madry et al. 2018, Towards deep learning models resistant to attacks"

    share: float = 0.7

    def watch(self, trace: Trace) -> Finding | None:
        """Compare the accuracies with and without the attack."""
        if trace.attacked is None or trace.attack_epsilon is None or not trace.clean:
            return None
        share = trace.attacked / trace.clean
        if share >= self.share:
            return None
        return self.finding(
            f"accuracy on public records falls from {trace.clean:.0f} to {trace.attacked:.0f} % "
            "under the attack",
            measured=share,
            threshold=self.share,
            remedy=_remedy(trace.attack_epsilon, trace.adversary),
            experience=trace.experience,
        )


def _remedy(epsilon: float, present: Attack | None) -> Remedy:
    """Return adversarial training, or a stronger one than the present one.

    Args:
        epsilon: radius of the attack that misled the model.
        present: attack of the training; None for none.
    """
    steps = STEPS
    advice = "adversarial training"
    if present is not None:
        radius = present.epsilon
        epsilon = max(epsilon, max(radius) if isinstance(radius, tuple) else radius)
        # an attack of one step has no such field
        steps = max(STEPS, 2 * int(getattr(present, "steps", 1)))
        name = type(present).__name__
        advice = (
            f"stronger adversarial training than the present {name}: more steps, a larger epsilon, "
            "or more epochs"
        )
    attack = {"name": "pgd", "epsilon": epsilon, "steps": steps, "step_size": 2 * epsilon / steps}
    return Remedy(advice=advice, changes={"training.adversary": attack})
