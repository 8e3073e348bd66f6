"""Defences: how the loss of a training step uses a row and its perturbed version.

    Learner(adversary=PGD(epsilon=0.1), defence=TRADES(beta=6.0), ...)

    [training.defence]
    name = "trades"
    beta = 6.0

To add a defence, add a file `my_defence.py` with one class `MyDefence(Defence)`.
"""

from typing import TYPE_CHECKING, TypeGuard

from perdure.adversarial.defences.base import MOVED, PROGRESS, Defence, TaskLosses, plain
from perdure.adversarial.defences.defensive_distillation import DefensiveDistillation
from perdure.adversarial.defences.interval_bounds import IntervalBounds
from perdure.adversarial.defences.madry import Madry
from perdure.adversarial.defences.robust_distillation import RobustDistillation
from perdure.adversarial.defences.trades import TRADES
from perdure.utils.extensions import Extensions, is_proper_subclass

__all__ = [
    "MOVED",
    "PROGRESS",
    "TRADES",
    "Defence",
    "DefensiveDistillation",
    "IntervalBounds",
    "Madry",
    "RobustDistillation",
    "TaskLosses",
    "find",
    "names",
    "plain",
]


def _is_defence(value: object) -> TypeGuard[type[Defence]]:
    return is_proper_subclass(value, Defence)


_EXTENSIONS = Extensions(
    kind="defence",
    package=__name__,
    group="perdure.defences",
    fits=_is_defence,
    wanted="a subclass of perdure.adversarial.defences.Defence",
    helpers=("base",),
)


def names() -> tuple[str, ...]:
    """Return the sorted names of all defences: files of this package, and entry points."""
    return _EXTENSIONS.names()


def find(name: str, *, field: str = "defence") -> type[Defence]:
    """Return the class of a defence.

    Args:
        name: one of `names()`, or "my_package.my_module:MyDefence".
        field: name of the setting or argument with this value, for the error message.

    Raises:
        ConfigError: if there is no such defence, or it cannot be imported.
    """
    return _EXTENSIONS.find(name, field=field)


# Hidden from type checkers: they would take every name for one that exists.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> type[Defence]:
        return _EXTENSIONS.attribute(name)
