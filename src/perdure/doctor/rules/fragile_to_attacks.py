"""Rule: small changes of the inputs mislead the model."""

from dataclasses import dataclass
from typing import ClassVar

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

    Remedy: adversarial training, `training.adversary`.

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
        attack = {
            "name": "pgd",
            "epsilon": trace.attack_epsilon,
            "steps": STEPS,
            "step_size": 2 * trace.attack_epsilon / STEPS,
        }
        return self.finding(
            f"accuracy on public records falls from {trace.clean:.0f} to {trace.attacked:.0f} % "
            "under the attack",
            measured=share,
            threshold=self.share,
            remedy=Remedy(
                advice=f"adversarial training: training.adversary = {attack}",
                changes={"training.adversary": attack},
            ),
            experience=trace.experience,
        )
