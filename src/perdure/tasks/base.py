"""Base class of the tasks, and helpers that they share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perdure.errors import ConfigError, DataError
from perdure.utils.checked_fields import CheckedFields

MASKED = -1e9
"""Output for a class that may not be predicted: its probability underflows to exactly zero."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Name and direction of the number by which a model is measured on a task.

    Args:
        name: as it is printed, such as "accuracy".
        unit: of the number, such as "%".
        higher_is_better: False for an error, such as a root mean squared error.
    """

    name: str
    unit: str
    higher_is_better: bool = True


@dataclass(frozen=True, kw_only=True)
class Task(CheckedFields, ABC):
    """Meaning of the targets of a record: loss, prediction, metric and shape.

    A task is a frozen dataclass without state. `Records(task=...)` carries it, and every part of
    the library that looks at targets asks it. Loss, distillation and measures give one row per
    record, and row i depends on record i alone: under privacy that row is what is clipped.

    Class attributes:
        name: as tables print it.
        metric: by which models are measured.

    In what follows n is the number of records and C the width of the head.
    """

    name: ClassVar[str]
    metric: ClassVar[Metric]

    @abstractmethod
    def losses(self, outputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute one loss per record.

        Args:
            outputs: (n, ..., C) of the model.
            targets: of the records, in the shape of the task.
            mask: (C,) or (n, C) bool, the outputs that count for a record; None for all.

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
            outputs: (n, ..., C) of the model.
            teacher: (n, ..., C) of the model that is imitated.
            targets: of the records; they say which positions are padding, and nothing else.
            known: (C,) bool, the outputs that the teacher answers with; None for all.
            allowed: (C,) bool, the outputs that the model answers with; None for all.
            temperature: both outputs are divided by it.

        Returns:
            (n,) distances.
        """

    @abstractmethod
    def predictions(self, outputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Turn outputs (n, ..., C) into predicted targets, of the shape and dtype of targets.

        Args:
            outputs: of the model.
            mask: (C,) or (n, C) bool, the outputs that may be predicted; None for all.
        """

    @abstractmethod
    def measures(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the numbers (n, k) of each record whose sum over records gives the metric.

        Args:
            outputs: (n, ..., C), `MASKED` where an output may not be predicted.
            targets: of the records.
        """

    @abstractmethod
    def score(self, totals: Tensor, records: int) -> float:
        """Compute the metric.

        Args:
            totals: (k,) float64, the sum of `measures` over the records.
            records: number of records, at least 1.
        """

    @abstractmethod
    def check(self, targets: Tensor) -> None:
        """Refuse targets of another dtype or shape, at the door.

        Args:
            targets: one row per record.

        Raises:
            DataError: in one plain line.
        """

    @abstractmethod
    def undeclared(self, targets: Tensor, classes: Sequence[int]) -> str:
        """Say what targets have that the declared outputs do not allow; "" for nothing.

        Args:
            targets: one row per record, of the shape of the task.
            classes: the declared outputs.

        Returns:
            Such as "labels [7]", for a message that goes on with what is declared.
        """

    @abstractmethod
    def synthetic(self, targets: Tensor, classes: Sequence[int], numbers: Tensor) -> Tensor:
        """Make targets that depend on no record.

        Args:
            targets: (m, ...) of which shape of a row, dtype and device are taken, and no value.
            classes: the declared outputs.
            numbers: (n,) int64 from 0; other numbers give other targets, as far as there are any.

        Returns:
            (n, ...) targets.
        """

    def balance_groups(self, targets: Tensor) -> Tensor | None:
        """Return the group (n,) int64 of each record that a memory keeps in balance.

        None, the default, means that targets give no groups: all records are one.
        """
        return None

    def head_width(self, num_classes: int) -> int:
        """Number of outputs of a model for this number of classes, labels, targets or tokens."""
        return num_classes

    def output_shape(self, targets: Tensor, width: int) -> tuple[int, ...]:
        """Shape of the outputs for these targets (n, ...) by a head of this width."""
        return (len(targets), width)


def mask_outputs(outputs: Tensor, mask: Tensor | None) -> Tensor:
    """Set outputs (n, ..., C) outside of the mask to `MASKED`.

    Args:
        outputs: of the model.
        mask: (C,) or (n, C) bool; None changes nothing.
    """
    return outputs if mask is None else torch.where(fitted(mask, outputs), outputs, MASKED)


def fitted(mask: Tensor, outputs: Tensor) -> Tensor:
    """Shape a mask (C,) or (n, C) so that it broadcasts to outputs (n, ..., C)."""
    if mask.dim() < 2:
        return mask
    return mask.view(len(mask), *[1] * (outputs.dim() - 2), mask.shape[-1])


def check_shape(targets: Tensor, *, dtype: torch.dtype, dims: int, needed: str, fix: str) -> None:
    """Refuse targets of another dtype or number of dimensions.

    Args:
        targets: one row per record.
        dtype: that is allowed.
        dims: number of dimensions that is allowed.
        needed: the allowed shape and dtype, in words.
        fix: the call that converts them.

    Raises:
        DataError: when they do not fit.
    """
    if targets.dtype != dtype:
        raise DataError(f"labels are {targets.dtype}; {fix}")
    if targets.dim() != dims:
        raise DataError(f"labels have shape {tuple(targets.shape)}; allowed: {needed}")


def refuse_other_tasks(task: Task, kinds: Sequence[type[Task]], user: str, reason: str) -> None:
    """Refuse a task that is none of these kinds.

    Args:
        task: of the records.
        kinds: classes of tasks that are served.
        user: of the records, as the message names it.
        reason: a clause that says why others are not served.

    Raises:
        ConfigError: in one line, with the task, the tasks that are served, and the reason.
    """
    if not isinstance(task, tuple(kinds)):
        served = ", ".join(kind.name for kind in kinds)
        raise ConfigError(
            f"{user} does not serve {task.name} records: {reason}; allowed: {served} records"
        )
