"""Attacks that change inputs to raise each record's loss, for training and for evaluation.

    from perdure.adversarial import find    # find("pgd") is PGD

To add an attack, add a file `my_attack.py` with one class `MyAttack(Attack)`.
"""

from typing import TYPE_CHECKING, TypeGuard

from perdure.adversarial.auto_attack import AutoAttack
from perdure.adversarial.backdoor import Backdoor, robustness_by_client
from perdure.adversarial.balls import Norm
from perdure.adversarial.base import Attack, InputLosses, Logits
from perdure.adversarial.corruptions import (
    STRENGTHS,
    Corruption,
    CorruptionCard,
    corrupted,
    measure_corruptions,
)
from perdure.adversarial.fgsm import FGSM
from perdure.adversarial.masking import MaskingCheck, check_masking
from perdure.adversarial.objectives import (
    OBJECTIVES,
    Objective,
    margin,
    rescaled_cross_entropy,
    towards,
)
from perdure.adversarial.pgd import PGD
from perdure.adversarial.robust_accuracy import (
    ThreatModelCard,
    measure_robustness,
    robust_accuracy,
)
from perdure.adversarial.rs_fgsm import RSFGSM
from perdure.utils.extensions import Extensions, is_proper_subclass

__all__ = [
    "FGSM",
    "OBJECTIVES",
    "PGD",
    "RSFGSM",
    "STRENGTHS",
    "Attack",
    "AutoAttack",
    "Backdoor",
    "Corruption",
    "CorruptionCard",
    "InputLosses",
    "Logits",
    "MaskingCheck",
    "Norm",
    "Objective",
    "ThreatModelCard",
    "check_masking",
    "corrupted",
    "find",
    "margin",
    "measure_corruptions",
    "measure_robustness",
    "names",
    "rescaled_cross_entropy",
    "robust_accuracy",
    "robustness_by_client",
    "towards",
]


def _is_attack(value: object) -> TypeGuard[type[Attack]]:
    return is_proper_subclass(value, Attack)


_EXTENSIONS = Extensions(
    kind="attack",
    package=__name__,
    group="perdure.attacks",
    fits=_is_attack,
    wanted="a subclass of perdure.adversarial.Attack",
    helpers=(
        "backdoor",
        "balls",
        "base",
        "bounds",
        "corruptions",
        "masking",
        "objectives",
        "robust_accuracy",
    ),
)


def names() -> tuple[str, ...]:
    """Return the sorted names of all attacks: files of this package, and entry points."""
    return _EXTENSIONS.names()


def find(name: str, *, field: str = "attack") -> type[Attack]:
    """Return the class of an attack.

    Args:
        name: one of `names()`, or "my_package.my_module:MyAttack".
        field: name of the setting or argument with this value, for the error message.

    Raises:
        ConfigError: if there is no such attack, or it cannot be imported.
    """
    return _EXTENSIONS.find(name, field=field)


# Hidden from type checkers: they would take every name for one that exists.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> type[Attack]:
        return _EXTENSIONS.attribute(name)
