"""Base class of losses, and shared helper functions."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.utils.checked_fields import CheckedFields

PerClass = tuple[float, ...] | Literal["balanced"]
"""One declared number for each class, or "balanced" for numbers from counted labels."""


@dataclass(frozen=True, kw_only=True)
class Loss(CheckedFields, ABC):
    """Base class of losses: one number for each record, from its outputs and its target.

    A loss is a frozen dataclass without state. A task applies it, so strategies, privacy and
    federations use it without changes. Metrics and evaluation do not change.

    Guarantee: row i depends on record i alone, so under privacy a loss costs nothing: each record's
    gradient is clipped, and the bound does not depend on the loss.

    Class attributes:
        name: name in messages.
        tasks: names of the tasks that can use the loss.
        resists_wrong_labels: True if the loss bounds what a wrong label can do.
        balances_classes: True if the loss makes up for rare classes.

    In the methods, m is the number of rows (records, or tokens) and C the width of the head.
    """

    name: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]] = ("single-label", "next-token")
    resists_wrong_labels: ClassVar[bool] = False
    balances_classes: ClassVar[bool] = False

    @abstractmethod
    def losses(self, logits: Tensor, labels: Tensor, allowed: Tensor | None) -> Tensor:
        """Compute (m,) losses for targets that are one class each.

        Args:
            logits: (m, C) logits; they are `perdure.tasks.MASKED` for classes that are not allowed.
            labels: (m,) int64 classes.
            allowed: (C,) or (m, C) bool, the classes that a row may have; None for all.
        """

    def label_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute (m, C) losses for targets of any number of labels.

        A loss implements this method if its `tasks` contain "multi-label".

        Args:
            logits: (m, C) logits.
            targets: (m, C) float of 0 and 1.

        Raises:
            ConfigError: if the loss does not implement the method.
        """
        raise ConfigError(
            f"the loss {self.name} has no method label_losses; allowed: one, because its `tasks` "
            "contain multi-label; implement it, or leave multi-label out of `tasks`"
        )

    def refuse_task(self, name: str) -> None:
        """Refuse a task that cannot use the loss.

        Args:
            name: name of the task.

        Raises:
            ConfigError: names the loss and the tasks that can use it.
        """
        if name not in self.tasks:
            raise ConfigError(
                f"the loss {self.name} does not support {name} records; allowed: "
                f"{' and '.join(self.tasks)} records; leave the loss out to use the task's own"
            )

    def refuse_classes(self, num_classes: int) -> None:
        """Refuse a width of the head for which the loss has no declared numbers.

        Args:
            num_classes: width of the head.

        Raises:
            ConfigError: if numbers of the loss do not fit.
        """
        return

    @property
    def counts_labels(self) -> bool:
        """True if the loss needs `with_counts` before it is computed; refused under privacy."""
        return False

    def with_counts(self, counts: Sequence[float]) -> Self:
        """Return the loss with numbers from counted labels.

        Args:
            counts: number of records of each class, over this and all earlier experiences.
        """
        return self


def log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Return (m,) log probability of each label, from logits (m, C) and labels (m,)."""
    return torch.log_softmax(logits, dim=1).gather(1, labels[:, None]).squeeze(1)


def refuse_per_class(field: str, values: PerClass, num_classes: int) -> None:
    """Refuse declared numbers that are not one for each class.

    Raises:
        ConfigError: names the field, and the number of classes.
    """
    if not isinstance(values, str) and len(values) != num_classes:
        raise ConfigError.of(
            field, f"{len(values)} numbers", f"one number for each of the {num_classes} classes"
        )


def check_per_class(field: str, values: PerClass) -> None:
    """Refuse numbers of classes that are not above 0.

    Raises:
        ConfigError: names the field.
    """
    if isinstance(values, str):
        return
    if not (values and all(0 < value < 1e12 for value in values)):
        raise ConfigError.of(
            field, values, 'one declared number above 0 for each class, or "balanced"'
        )


def declared(values: PerClass, field: str, like: Tensor) -> Tensor:
    """Return declared numbers (C,) as a tensor of the dtype and device of `like`.

    Raises:
        ConfigError: if they still have to be counted.
    """
    if isinstance(values, str):
        raise ConfigError(
            f'{field} = "balanced" needs a learner or session, which counts the labels of its '
            "stream; give declared numbers here"
        )
    return torch.tensor(values, dtype=like.dtype, device=like.device)
