"""Loggers: callbacks of a learner that write its curves for TensorBoard, MLflow and others.

    from perdure.loggers import TensorBoard
    Learner(..., callbacks=[TensorBoard(folder="runs/curves")])

To add a logger, add a file `my_logger.py` with one class `MyLogger(Logger)`.
"""

from typing import TYPE_CHECKING, TypeGuard

from perdure.loggers.base import Logger, step_of
from perdure.loggers.mlflow import MLflow
from perdure.loggers.run_log import LoggedRun, Value, Writer
from perdure.loggers.tensorboard import TensorBoard
from perdure.loggers.wandb import WandB
from perdure.utils.extensions import Extensions, is_proper_subclass

__all__ = [
    "LoggedRun",
    "Logger",
    "MLflow",
    "TensorBoard",
    "Value",
    "WandB",
    "Writer",
    "find",
    "names",
    "step_of",
]


def _is_logger(value: object) -> TypeGuard[type[Logger]]:
    return is_proper_subclass(value, Logger)


_EXTENSIONS = Extensions(
    kind="logger",
    package=__name__,
    group="perdure.loggers",
    fits=_is_logger,
    wanted="a subclass of perdure.loggers.Logger",
    helpers=("base", "run_log"),
)


def names() -> tuple[str, ...]:
    """Return the sorted names of all loggers: files of this package, and entry points."""
    return _EXTENSIONS.names()


def find(name: str, *, field: str = "logger") -> type[Logger]:
    """Return the class of a logger.

    Args:
        name: one of `names()`, or "my_package.my_module:MyLogger".
        field: name of the setting or argument with this value, for the error message.

    Raises:
        ConfigError: if there is no such logger, or it cannot be imported.
    """
    return _EXTENSIONS.find(name, field=field)


# Hidden from type checkers: they would take every name for one that exists.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> type[Logger]:
        return _EXTENSIONS.attribute(name)
