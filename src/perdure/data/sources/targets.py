"""Conversion of a user's targets, words or numbers, to the shape of the task.

Guarantee: none, as in `perdure.data.sources.values`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from perdure.data.sources.values import TEXT_KINDS, array_of, as_float32, numbers_of
from perdure.errors import ConfigError, DataError
from perdure.tasks import MultiLabel, NextToken, Regression, SingleLabel, Task
from perdure.utils.listing import shown


@dataclass(frozen=True, kw_only=True)
class Classes:
    """Classes of a data set: their number and names.

    Args:
        number: number of classes.
        names: names of the classes as in the targets, in the order of their numbers; empty if the
            targets are numbers.
        declared: True if the user gave them, False if they were found in the training part.
    """

    number: int
    names: tuple[object, ...] = ()
    declared: bool = False


MOST_CLASSES = 2**24
"""Largest number of classes of a data set, because a model has an output for each."""
TaskName = Literal["single-label", "multi-label", "regression", "next-token"]
TASKS: Mapping[str, type[Task]] = {
    kind.name: kind for kind in (SingleLabel, MultiLabel, Regression, NextToken)
}
"""Tasks that can be given by name."""


def task_of(task: object) -> Task:
    """Return the task for a name; an object of a task is returned unchanged.

    Args:
        task: value given by the user.

    Raises:
        ConfigError: if the name is not known, or the type is wrong.
    """
    if isinstance(task, Task):
        return task
    if not isinstance(task, str) or task not in TASKS:
        allowed = f"{', '.join(TASKS)}, or an object of a task, such as Regression()"
        raise ConfigError.of("task", task, allowed)
    return TASKS[task]()


def converted(
    value: object, task: Task, classes: Classes | None, name: str, notes: dict[str, None]
) -> tuple[Tensor, Classes]:
    """Convert a user's targets to the shape of the task; return them with the classes.

    Args:
        value: targets, in a form that `perdure.data.sources.values.array_of` takes.
        task: task of the records.
        classes: classes that are known so far; None to take them from the targets.
        name: name of the argument and its part, for the message.
        notes: notes about changes to the data, to which new ones are added.

    Raises:
        DataError: if a target is not allowed; names the row of the first one.
    """
    if isinstance(task, SingleLabel):
        found = class_numbers(value, name, notes)
        classes = classes or found_classes(found, name)
        return numbered(found, classes, name), classes
    targets = numbers_of(value, name)
    if isinstance(task, Regression) and targets.dim() == 1:
        targets = targets[:, None]
        notes[f"{name} had shape (n,); they now have shape (n, 1)"] = None
    if isinstance(task, NextToken):
        targets = targets if targets.is_floating_point() else targets.long()
    elif isinstance(task, MultiLabel | Regression):
        targets = as_float32(targets, name, notes)
    try:
        task.check(targets)
    except DataError as error:
        raise DataError(str(error).replace("labels", name, 1)) from error
    width = targets.shape[1] if isinstance(task, MultiLabel | Regression) else None
    if classes is None:
        if width is None:
            raise ConfigError.of("num_classes", None, f"the number of outputs, for {task.name}")
        classes = Classes(number=width, declared=True)
    if width not in (None, classes.number):
        raise DataError(
            f"{name} have {width} columns; allowed: {classes.number} columns, one per output"
        )
    strange = task.undeclared(targets, range(classes.number))
    if strange:
        raise DataError(
            f"{name} have {strange}; allowed: 0 .. {classes.number - 1}; give another num_classes"
        )
    return targets, classes


def given_classes(classes: Sequence[object] | None, num_classes: int | None) -> Classes | None:
    """Return the classes that a user declares; None if nothing is declared.

    Args:
        classes: names or numbers, in the order of their numbers 0, 1, 2, ...
        num_classes: number of classes.

    Raises:
        ConfigError: if names occur twice, there are no classes, or the numbers contradict each
            other.
    """
    if num_classes is not None and (
        isinstance(num_classes, bool)
        or not isinstance(num_classes, int)
        or not 1 <= num_classes <= MOST_CLASSES
    ):
        allowed = f"a whole number from 1 to {MOST_CLASSES}, or None"
        raise ConfigError.of("num_classes", num_classes, allowed)
    if classes is None:
        return None if num_classes is None else Classes(number=num_classes, declared=True)
    if isinstance(classes, str) or not classes or len(set(classes)) != len(classes):
        raise ConfigError.of("classes", classes, "names or numbers, each once, at least one")
    if num_classes not in (None, len(classes)):
        allowed = f"{len(classes)}, the number of classes given, or None"
        raise ConfigError.of("num_classes", num_classes, allowed)
    return Classes(number=len(classes), names=tuple(classes), declared=True)


def class_numbers(value: object, name: str, notes: dict[str, None]) -> Tensor | NDArray[Any]:
    """Convert targets to whole numbers (n,) int64, or to an array of words (n,).

    Args:
        value: targets, in a form that `perdure.data.sources.values.array_of` takes.
        name: name of the argument and its part, for the message.
        notes: notes, to which a change of type or shape is added.

    Raises:
        DataError: if the shape is not allowed, or numbers are not whole.
    """
    found = array_of(value, name)
    if len(found.shape) == 2 and found.shape[1] == 1:
        found = found.reshape(-1)
        notes[f"{name} had shape (n, 1); they now have shape (n,)"] = None
    if len(found.shape) != 1:
        fix = "for one-hot rows give targets.argmax(1); for several labels per record, "
        fix += "task='multi-label'"
        shape = tuple(found.shape)
        raise DataError(f"{name} have shape {shape}; allowed: (n,), one class per record; {fix}")
    if isinstance(found, np.ndarray) and found.dtype.kind in TEXT_KINDS:
        return found
    numbers = numbers_of(found, name)
    if numbers.is_floating_point():
        wrong = ((numbers != numbers.round()) | ~numbers.isfinite()).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"{name} have {float(numbers[row])} in row {row}; allowed: whole numbers, one "
                "class per record; for other numbers give task='regression'"
            )
        was = str(numbers.dtype).removeprefix("torch.")
        notes[f"{name} were {was}; they are converted to int64"] = None
    return numbers.long()


def found_classes(targets: Tensor | NDArray[Any], name: str) -> Classes:
    """Find the classes in a training part if none were declared.

    Words are numbered in alphabetical order. Numbers must be 0, 1, 2, ... without a gap.

    Args:
        targets: (n,) numbers or words.
        name: name of the argument and its part, for the message.

    Raises:
        DataError: if numbers do not begin at 0, or one is missing.
    """
    if isinstance(targets, np.ndarray):
        _refuse_missing(targets, name)
        words = sorted(set(targets.tolist()), key=str)
        return Classes(number=len(words), names=tuple(words))
    present = torch.unique(targets).tolist()
    if present != list(range(len(present))):
        raise DataError(
            f"{name} take the values {shown(present)}; allowed: 0, 1, 2, ... without a gap; give "
            "num_classes=... if a class has no records, or classes=(...) with all classes in order"
        )
    return Classes(number=len(present))


def numbered(targets: Tensor | NDArray[Any], classes: Classes, name: str) -> Tensor:
    """Return the number (n,) int64 of each record's class.

    Args:
        targets: (n,) numbers or words.
        classes: classes of the data set.
        name: name of the argument and its part, for the message.

    Raises:
        DataError: if a target is not among the classes; names its row.
    """
    if classes.names:
        number = {value: place for place, value in enumerate(classes.names)}
        values = targets.tolist()
        for row, value in enumerate(values):
            if value not in number:
                raise DataError(
                    f"{name} have {value!r} in row {row}; allowed classes: "
                    f"{shown(classes.names)}; add it to classes=..., or leave out the row"
                )
        return torch.tensor([number[value] for value in values], dtype=torch.int64)
    if isinstance(targets, np.ndarray):
        raise DataError(
            f"{name} are words, such as {targets[0]!r}; give classes=(...) with all words, whose "
            "order decides the class numbers"
        )
    outside = ((targets < 0) | (targets >= classes.number)).nonzero()
    if len(outside):
        row = int(outside[0])
        raise DataError(
            f"{name} have {int(targets[row])} in row {row}; allowed: 0 .. {classes.number - 1}; "
            "classes are numbered from 0"
        )
    return targets


def _refuse_missing(words: NDArray[Any], name: str) -> None:
    for row, value in enumerate(words.tolist()):
        if value is None or (isinstance(value, float) and math.isnan(value)):
            raise DataError(
                f"{name} have {value} in row {row}; allowed: a class; leave out the row"
            )
