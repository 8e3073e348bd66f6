"""Base class of defences: losses of a training step that see a row and its perturbed version."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from perdure.adversarial.base import Attack, InputLosses
from perdure.contract.context import Context
from perdure.contract.forward import Forward
from perdure.data.records import Batch
from perdure.errors import ConfigError, PrivacyError
from perdure.tasks import Task
from perdure.utils.checked_fields import CheckedFields

MOVED = "defence.moved"
"""Name, among the stored tensors of a row, of its inputs after the attack."""
PROGRESS = "defence.progress"
"""Name of the share of the steps of the experience that are done."""

TaskLosses = Callable[[Batch], Tensor]
"""Function from rows to the strategy's losses (n,)."""


@dataclass(frozen=True, kw_only=True)
class Defence(CheckedFields, ABC):
    """Base class of defences: how the loss of a row uses its perturbed version.

    Args:
        memory: perturb rows from memory, too (adversarial replay); False for new rows only.

    Class attributes:
        NEEDS_ATTACK: True if the training needs an `adversary`.
        PRIVATE_REFUSAL: reason why the defence is refused under privacy; "" if it is allowed.
    """

    NEEDS_ATTACK: ClassVar[bool] = True
    PRIVATE_REFUSAL: ClassVar[str] = ""

    memory: bool = True

    @abstractmethod
    def losses(
        self, losses: TaskLosses, forward: Forward, batch: Batch, context: Context
    ) -> Tensor:
        """Return (n,) losses of the rows; row i depends on row i, parameters and context only.

        Args:
            losses: losses of the strategy.
            forward: model.
            batch: rows with `stored[MOVED]`, the perturbed inputs, if an attack has run, and with
                `stored[PROGRESS]`, the share of the steps of the experience that are done.
            context: public facts.
        """

    def objective(
        self,
        losses: TaskLosses,
        forward: Forward,
        batch: Batch,
        context: Context,
    ) -> InputLosses:
        """Return the loss that the attack raises: the strategy's, unless a defence has its own.

        Args:
            losses: losses of the strategy.
            forward: model with fixed parameters.
            batch: rows as they are.
            context: public facts.
        """
        return lambda inputs: losses(replace(batch, inputs=inputs))

    def attach(self, batch: Batch, moved: Tensor | None, progress: float) -> Batch:
        """Return the rows with their perturbed inputs and the progress of the experience.

        Args:
            batch: rows as they are.
            moved: (n, ...) inputs after the attack; None without an attack.
            progress: share of the steps of the experience that are done.
        """
        shares = torch.full((len(batch),), progress, device=batch.inputs.device)
        stored = {**batch.stored, PROGRESS: shares}
        if moved is not None:
            if not self.memory:
                kept = batch.from_memory.view(-1, *[1] * (moved.ndim - 1))
                moved = torch.where(kept, batch.inputs, moved)
            stored[MOVED] = moved
        return replace(batch, stored=stored)

    def refuse_task(self, task: Task) -> None:
        """Refuse a task whose losses the defence cannot use.

        Raises:
            ConfigError: names the task.
        """

    def refuse_attack(self, attack: Attack) -> None:
        """Refuse an attack that does not fit the defence.

        Raises:
            ConfigError: names the attack.
        """

    def refuse_misfits(self, task: Task, attack: Attack | None, *, private: bool) -> None:
        """Refuse a run that the defence does not fit.

        Args:
            task: task of the run.
            attack: attack on every batch; None for none.
            private: True if the run has privacy.

        Raises:
            ConfigError: if task or attack do not fit, or the attack is missing or not used.
            PrivacyError: under privacy, if a record's influence cannot be bounded.
        """
        name = type(self).__name__
        if private and self.PRIVATE_REFUSAL:
            raise PrivacyError(
                f"the defence {name} is not allowed under privacy: {self.PRIVATE_REFUSAL}"
            )
        self.refuse_task(task)
        if self.NEEDS_ATTACK and attack is None:
            given = f"None with the defence {name}"
            raise ConfigError.of("adversary", given, "an attack, such as PGD(epsilon=0.1)")
        if attack is not None and not self.NEEDS_ATTACK:
            given = f"{type(attack).__name__} with the defence {name}"
            raise ConfigError.of("adversary", given, "None: the defence uses no attack")
        if attack is not None:
            self.refuse_attack(attack)


def plain(batch: Batch) -> Batch:
    """Return the rows without the tensors of a defence."""
    own = {name: value for name, value in batch.stored.items() if name not in (MOVED, PROGRESS)}
    return replace(batch, stored=own)
