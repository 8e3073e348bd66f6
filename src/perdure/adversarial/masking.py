"""Checks for hidden gradients: a robust accuracy that stronger attacks should lower, and do not."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perdure.adversarial.balls import Norm, uniform_in_ball
from perdure.adversarial.base import Attack, InputLosses, Logits
from perdure.adversarial.bounds import PerFeature
from perdure.adversarial.pgd import PGD
from perdure.adversarial.robust_accuracy import fixed, measure_robustness

SLACK = 1.0
"""Points by which a stronger attack may leave more records, because attacks are random."""

LEFT = 1.0
"""Percentage of records that an attack without limit may leave."""


@dataclass(frozen=True, kw_only=True)
class MaskingCheck:
    """Check of a robust accuracy.

    Args:
        name: attack that is compared, in words.
        passed: False if the result is a sign of hidden gradients.
        robust_accuracy: percentage of records that this attack leaves.
        reference: percentage of records that the first attack leaves.
    """

    name: str
    passed: bool
    robust_accuracy: float
    reference: float

    def __str__(self) -> str:
        """Return the check as one line."""
        word = "ok" if self.passed else "WARNING"
        return f"{word}: {self.name} leaves {self.robust_accuracy:.1f} %"


@dataclass(frozen=True, kw_only=True)
class _RandomPoints(Attack):
    """The one of several corners of the ball that raises a record's loss most: no gradient."""

    points: int = 50

    def perturb(
        self, losses: InputLosses, inputs: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the best point of each record; it needs `generator`."""
        assert generator is not None
        limits = self._limits(inputs)
        best = inputs
        with torch.no_grad():
            highest = losses(inputs)
            for _ in range(self.points):
                change = self._radius(inputs) * uniform_in_ball(inputs, self.norm, generator)
                change = change.sign() * self._radius(inputs) if self.norm == "linf" else change
                moved = self._feasible(inputs, inputs + change, limits)
                values = losses(moved)
                better = values > highest
                highest = torch.where(better, values, highest)
                best = torch.where(better.view(-1, *[1] * (inputs.ndim - 1)), moved, best)
        return best


def check_masking(
    predict: Logits,
    inputs: Tensor,
    labels: Tensor,
    attack: PGD,
    *,
    generator: torch.Generator,
    surrogate: Logits | None = None,
) -> tuple[MaskingCheck, ...]:
    """Compare an attack with stronger and with blind ones, to find hidden gradients.

    Four times as many steps, three more restarts and twice the epsilon must not leave more records;
    an attack without limit must leave none; random points of the ball, and records that were
    changed against another model, must leave more, because they do not see the gradient.

    Args:
        predict: module, or another differentiable function (k, ...) -> (k, classes) logits.
        inputs: (n, ...) inputs, within the bounds of the attack.
        labels: (n,) int64 labels.
        attack: attack of the robust accuracy that is checked; without bounds, the attack without
            limit may move an input by ten times the range of all inputs.
        generator: CPU generator for the random numbers of the attacks.
        surrogate: another model of the same classes, for the attack by transfer; None for none.

    Raises:
        ConfigError: if arguments do not match.

    Source: Carlini, Athalye, Papernot et al. 2019, "On evaluating adversarial robustness",
    section 4; Athalye, Carlini, Wagner 2018, section 3.1.
    """

    def left(other: Attack) -> float:
        card = measure_robustness(predict, inputs, labels, other, generator=generator)
        return card.robust_accuracy

    common = {"norm": attack.norm, "bounds": attack.bounds, "epsilon": attack.epsilon}
    reference = left(attack)
    stronger: dict[str, Attack] = {
        "four times the steps": replace(attack, steps=4 * attack.steps),
        "twice the epsilon": replace(attack, epsilon=_times(attack.epsilon, 2.0)),
    }
    if attack.random_start:
        stronger["three more restarts"] = replace(attack, restarts=attack.restarts + 3)
    found = []
    for name, other in stronger.items():
        share = left(other)
        found.append(_check(name, share <= reference + SLACK, share, reference))
    free = replace(attack, epsilon=_whole_range(inputs, attack), steps=max(40, attack.steps))
    share = left(free)
    found.append(_check("an attack without limit", share <= LEFT, share, reference))
    share = left(_RandomPoints(**common))  # type: ignore[arg-type]
    found.append(_check("random points of the ball", share >= reference - SLACK, share, reference))
    if surrogate is not None:
        share = _transferred(predict, surrogate, inputs, labels, attack, generator)
        found.append(
            _check("an attack on another model", share >= reference - SLACK, share, reference)
        )
    return tuple(found)


def _check(name: str, passed: bool, share: float, reference: float) -> MaskingCheck:
    return MaskingCheck(name=name, passed=passed, robust_accuracy=share, reference=reference)


def _times(epsilon: PerFeature, factor: float) -> PerFeature:
    return (
        tuple(factor * each for each in epsilon) if isinstance(epsilon, tuple) else factor * epsilon
    )


def _whole_range(inputs: Tensor, attack: Attack) -> float:
    """Return a radius of a ball that contains every allowed input, or far more than all inputs."""
    if attack.bounds is None:
        span = 10 * float(inputs.max() - inputs.min())
    else:
        lows, highs = (bound if isinstance(bound, tuple) else (bound,) for bound in attack.bounds)
        span = max(highs) - min(lows)
    count: int = inputs[0].numel()
    radii: dict[Norm, float] = {"linf": span, "l2": span * count**0.5, "l1": span * count}
    return radii[attack.norm]


def _transferred(
    predict: Logits,
    surrogate: Logits,
    inputs: Tensor,
    labels: Tensor,
    attack: PGD,
    generator: torch.Generator,
) -> float:
    """Return the percentage of records that survive changes made against another model."""
    with fixed(predict), fixed(surrogate):
        with torch.no_grad():
            right = predict(inputs).argmax(1) == labels
        moved = attack.against(
            surrogate, inputs, labels, objectives=("margin",), generator=generator
        )
        with torch.no_grad():
            kept = predict(moved).argmax(1) == labels
    return 100.0 * float((right & kept).float().mean())
