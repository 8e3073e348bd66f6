"""Base class of tasks, and shared helper functions."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perdure.errors import ConfigError, DataError
from perdure.tasks.losses.base import Loss
from perdure.utils.checked_fields import CheckedFields

MASKED = -1e9
"""Output for a class that may not be predicted; its probability is exactly 0 in float32."""

EXTREME = 2**40
"""Smallest of the `numbers` for which `Task.synthetic` makes extreme targets."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Metric of a task: name, unit and direction.

    Args:
        name: printed name, such as "accuracy".
        unit: unit of the metric, such as "%".
        higher_is_better: False for an error, such as a root mean squared error.
    """

    name: str
    unit: str
    higher_is_better: bool = True


@dataclass(frozen=True, kw_only=True)
class Task(CheckedFields, ABC):
    """Base class of tasks: the meaning of targets, with loss, prediction, metric and shape.

    A task is a frozen dataclass without state. `Records(task=...)` has the task, and every part of
    the library that uses targets calls its methods. Loss, distillation and measures return one row
    per record, and row i depends on record i alone; under privacy this row is clipped.

    Args:
        loss: loss that replaces the task's own (see `perdure.tasks.losses`); None for its own.

    Class attributes:
        name: name in tables.
        metric: metric of models on this task.

    In the methods, n is the number of records and C the width of the head.
    """

    name: ClassVar[str]
    metric: ClassVar[Metric]

    loss: Loss | None = None

    def __post_init__(self) -> None:
        if self.loss is not None:
            self.loss.refuse_task(self.name)

    @abstractmethod
    def losses(self, outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute one loss per record.

        Args:
            outputs: (n, ..., C) outputs of the model.
            targets: targets of the records, in the shape of the task.
            mask: (C,) or (n, C) bool, the outputs that are used for a record; None for all.

        Returns:
            (n,) losses.
        """

    @abstractmethod
    def distillation(
        self,
        outputs: Tensor,
        teacher: Tensor,
        targets: Tensor,
        *,
        known: Tensor | None = None,
        allowed: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Compute the distance of the outputs from a teacher's, one number per record.

        Args:
            outputs: (n, ..., C) outputs of the model.
            teacher: (n, ..., C) outputs of the teacher.
            targets: targets of the records, used only to find positions of padding.
            known: (C,) bool, the outputs that the teacher was trained on; None for all.
            allowed: (C,) bool, the outputs that the model may predict; None for all.
            temperature: number by which both outputs are divided.

        Returns:
            (n,) distances.
        """

    @abstractmethod
    def predictions(self, outputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Turn outputs (n, ..., C) into predicted targets, of the shape and dtype of targets.

        Args:
            outputs: (n, ..., C) outputs of the model.
            mask: (C,) or (n, C) bool, the outputs that may be predicted; None for all.
        """

    @abstractmethod
    def measures(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the numbers (n, k) of each record whose sum over records gives the metric.

        Args:
            outputs: (n, ..., C) outputs, `MASKED` for classes that may not be predicted.
            targets: targets of the records.
        """

    @abstractmethod
    def score(self, totals: Tensor, records: int) -> float:
        """Compute the metric from sums over records.

        Args:
            totals: (k,) float64, the sum of `measures` over the records.
            records: number of records, at least 1.
        """

    @abstractmethod
    def check(self, targets: Tensor) -> None:
        """Refuse targets with a wrong dtype or shape, when `Records` are made.

        Args:
            targets: one row per record.

        Raises:
            DataError: if the targets are not allowed.
        """

    @abstractmethod
    def undeclared(self, targets: Tensor, classes: Sequence[int]) -> str:
        """Describe targets that the declared outputs do not allow; "" if there are none.

        Args:
            targets: one row per record, of the shape of the task.
            classes: the declared outputs.

        Returns:
            A text such as "labels [7]", which becomes the beginning of a message.
        """

    @abstractmethod
    def synthetic(self, targets: Tensor, classes: Sequence[int], numbers: Tensor) -> Tensor:
        """Make synthetic targets, which depend on no record.

        Args:
            targets: (m, ...) targets; only the shape of a row, the dtype and the device are used.
            classes: the declared outputs.
            numbers: (n,) int64 from 0; different numbers give different targets, as far as
                possible. Numbers of at least `EXTREME` give extreme targets, such as large numbers
                or only padding, because a loss may couple records only for these.

        Returns:
            (n, ...) synthetic targets.
        """

    def balance_groups(self, targets: Tensor) -> Tensor | None:
        """Return the group (n,) int64 of each record, for memories that balance groups.

        None, the default, means that all records belong to one group.
        """
        return None

    def class_counts(self, targets: Tensor, num_classes: int) -> Tensor:
        """Count the records (or tokens) of each class, for losses that count labels.

        Args:
            targets: (n, ...) targets of the records.
            num_classes: width of the head.

        Returns:
            (num_classes,) counts.

        Raises:
            ConfigError: if targets of the task are no classes.
        """
        raise ConfigError(
            f"{self.name} records have no classes to count; allowed: declared numbers, or no loss"
        )

    def head_width(self, num_classes: int) -> int:
        """Number of outputs of a model for this number of classes, labels, targets or tokens."""
        return num_classes

    def output_shape(self, targets: Tensor, width: int) -> tuple[int, ...]:
        """Shape of the outputs for targets (n, ...), with a head of the given width."""
        return (len(targets), width)


def mask_outputs(outputs: Tensor, mask: Tensor | None) -> Tensor:
    """Set outputs (n, ..., C) outside the mask to `MASKED`.

    Args:
        outputs: outputs of the model.
        mask: (C,) or (n, C) bool, True for allowed outputs; None for no change.
    """
    return outputs if mask is None else torch.where(fitted(mask, outputs), outputs, MASKED)


def fitted(mask: Tensor, outputs: Tensor) -> Tensor:
    """Return a mask (C,) or (n, C) reshaped so that it broadcasts to outputs (n, ..., C)."""
    if mask.dim() < 2:
        return mask
    return mask.view(len(mask), *[1] * (outputs.dim() - 2), mask.shape[-1])


def check_shape(targets: Tensor, *, dtype: torch.dtype, dims: int, needed: str, fix: str) -> None:
    """Refuse targets of another dtype or number of dimensions.

    Args:
        targets: one row per record.
        dtype: allowed dtype.
        dims: allowed number of dimensions.
        needed: description of the allowed shape and dtype.
        fix: advice with the call that converts the targets.

    Raises:
        DataError: if dtype or number of dimensions differs.
    """
    if targets.dtype != dtype:
        raise DataError(f"labels are {targets.dtype}; {fix}")
    if targets.dim() != dims:
        raise DataError(f"labels have shape {tuple(targets.shape)}; allowed: {needed}")


def refuse_other_tasks(task: Task, kinds: Sequence[type[Task]], user: str, reason: str) -> None:
    """Refuse a task of another class than the allowed ones.

    Args:
        task: task of the records.
        kinds: allowed classes of tasks.
        user: name of the part of the library that uses the records, for the message.
        reason: reason why other tasks are not supported, as a clause.

    Raises:
        ConfigError: if the task is not allowed; the message has the task, the allowed tasks and the
            reason.
    """
    if not isinstance(task, tuple(kinds)):
        served = ", ".join(kind.name for kind in kinds)
        raise ConfigError(
            f"{user} does not support {task.name} records: {reason}; allowed: {served} records"
        )
