"""Tasks: the meaning of the targets of a record.

    from perdure.data import Records
    from perdure.tasks import Regression
    Records(inputs=x, labels=y, task=Regression())    # y: (n, k) float32

`SingleLabel` is the default. Strategies, memory, evaluation and the privacy guard use targets
through the task only. To add a task, add a file `my_task.py` with one class `MyTask(Task)`.
"""

from typing import TYPE_CHECKING, TypeGuard

from perdure.tasks.base import EXTREME, MASKED, Metric, Task, mask_outputs, refuse_other_tasks
from perdure.tasks.multi_label import MultiLabel
from perdure.tasks.next_token import NextToken
from perdure.tasks.regression import Regression
from perdure.tasks.single_label import SingleLabel
from perdure.utils.extensions import Extensions, is_proper_subclass

__all__ = [
    "EXTREME",
    "MASKED",
    "Metric",
    "MultiLabel",
    "NextToken",
    "Regression",
    "SingleLabel",
    "Task",
    "find",
    "mask_outputs",
    "names",
    "refuse_other_tasks",
]


def _is_task(value: object) -> TypeGuard[type[Task]]:
    return is_proper_subclass(value, Task)


_EXTENSIONS = Extensions(
    kind="task",
    package=__name__,
    group="perdure.tasks",
    fits=_is_task,
    wanted="a subclass of perdure.tasks.Task",
    helpers=("base",),
)


def names() -> tuple[str, ...]:
    """Return the sorted names of all tasks: files of this package, and entry points."""
    return _EXTENSIONS.names()


def find(name: str, *, field: str = "task") -> type[Task]:
    """Return the class of a task.

    Args:
        name: one of `names()`, or "my_package.my_module:MyTask".
        field: name of the setting or argument with this value, for the error message.

    Raises:
        ConfigError: if there is no such task, or it cannot be imported.
    """
    return _EXTENSIONS.find(name, field=field)


# Hidden from type checkers: they would take every name for one that exists.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> type[Task]:
        return _EXTENSIONS.attribute(name)
