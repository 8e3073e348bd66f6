"""Losses of records, by name: for noisy labels, imbalanced classes and calibration.

    Learner(model=model, strategy=EWC(), loss=Focal(gamma=2.0), ...)

    [training.loss]
    name = "focal"
    gamma = 2.0

The task computes the loss of each record, so strategies, privacy and federations use it. Without
one, a task has its own loss, such as the cross entropy of `SingleLabel`. To add a loss, add a file
`my_loss.py` with one class `MyLoss(Loss)`.
"""

from typing import TYPE_CHECKING, TypeGuard

from perdure.tasks.losses.balanced_softmax import BalancedSoftmax
from perdure.tasks.losses.base import Loss, PerClass
from perdure.tasks.losses.bootstrapping import Bootstrapping
from perdure.tasks.losses.class_weights import ClassWeights
from perdure.tasks.losses.cross_entropy import CrossEntropy
from perdure.tasks.losses.focal import Focal
from perdure.tasks.losses.generalised_cross_entropy import GeneralisedCrossEntropy
from perdure.tasks.losses.symmetric_cross_entropy import SymmetricCrossEntropy
from perdure.utils.extensions import Extensions, is_proper_subclass

__all__ = [
    "BalancedSoftmax",
    "Bootstrapping",
    "ClassWeights",
    "CrossEntropy",
    "Focal",
    "GeneralisedCrossEntropy",
    "Loss",
    "PerClass",
    "SymmetricCrossEntropy",
    "find",
    "names",
]


def _is_loss(value: object) -> TypeGuard[type[Loss]]:
    return is_proper_subclass(value, Loss)


_EXTENSIONS = Extensions(
    kind="loss",
    package=__name__,
    group="perdure.losses",
    fits=_is_loss,
    wanted="a subclass of perdure.tasks.losses.Loss",
    helpers=("base",),
)


def names() -> tuple[str, ...]:
    """Return the sorted names of all losses: files of this package, and entry points."""
    return _EXTENSIONS.names()


def find(name: str, *, field: str = "loss") -> type[Loss]:
    """Return the class of a loss.

    Args:
        name: one of `names()`, or "my_package.my_module:MyLoss".
        field: name of the setting or argument with this value, for the error message.

    Raises:
        ConfigError: if there is no such loss, or it cannot be imported.
    """
    return _EXTENSIONS.find(name, field=field)


# Hidden from type checkers: they would take every name for one that exists.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> type[Loss]:
        return _EXTENSIONS.attribute(name)
