"""Robust distillation: a student answers under attack as its robust teacher does without."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from perdure.adversarial.defences.base import MOVED, Defence, TaskLosses, plain
from perdure.adversarial.defences.trades import divergence
from perdure.contract.context import Context
from perdure.contract.forward import Forward
from perdure.data.records import Batch
from perdure.errors import ConfigError
from perdure.tasks import SingleLabel, Task, refuse_other_tasks
from perdure.utils.modules import evaluating


@dataclass(frozen=True, kw_only=True)
class RobustDistillation(Defence):
    """Divergence of the student's answers under attack from those of a robust teacher.

        loss_i = (1 - alpha) * strategy's loss(x_i)
                 + alpha * t^2 * KL(softmax(T(x_i) / t) || softmax(z(x'_i) / t))

    T are the logits of the teacher, z those of the student, t is the temperature, and x'_i raises
    the strategy's loss. With `alpha` 1 the strategy's loss is left out. In the paper a small
    student becomes more robust than by adversarial training of its own. On the embedded digits it
    does not with the defaults, and equals it with `alpha` 0.5 and `temperature` 5 (own
    measurement).

    Privacy: refused, because the ledger does not count the training of the teacher.

    Args:
        teacher: trained model of the same classes, on the device of the training; robust, or there
            is no robustness to pass on. It is not changed. Without one, as in a config, which
            cannot name a model, a training is refused.
        alpha: weight of the teacher, above 0 and at most 1.
        temperature: number by which logits are divided, from 1.
        memory: perturb rows from memory, too; False for new rows only.

    Source: Goldblum, Fowl, Feizi, Goldstein 2020, "Adversarially robust distillation", AAAI. The
    defaults of `alpha` and `temperature` are theirs.
    """

    PRIVATE_REFUSAL: ClassVar[str] = (
        "the ledger does not count the training of its teacher; use adversary=PGD(...), alone or "
        "with defence=TRADES()"
    )

    teacher: nn.Module | None = None
    alpha: float = 1.0
    temperature: float = 30.0

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ConfigError.of("alpha", self.alpha, "a number above 0, at most 1")
        if not 1 <= self.temperature <= 1e4:
            raise ConfigError.of("temperature", self.temperature, "a number from 1 to 10000")

    def losses(
        self, losses: TaskLosses, forward: Forward, batch: Batch, context: Context
    ) -> Tensor:
        """Return (n,) losses of the rows, and divergences of their perturbed versions."""
        rows = plain(batch)
        logits = forward(batch.stored[MOVED])
        teacher = self._known_teacher()
        with torch.no_grad(), evaluating(teacher):
            answers = teacher(rows.inputs)
        if answers.shape != logits.shape:
            given = f"a model with outputs of shape {tuple(answers.shape)}"
            raise ConfigError.of("teacher", given, f"outputs of shape {tuple(logits.shape)}")
        taught = (
            self.alpha
            * self.temperature**2
            * divergence(
                context.mask(answers / self.temperature, rows),
                context.mask(logits / self.temperature, rows),
            )
        )
        return taught if self.alpha == 1 else taught + (1 - self.alpha) * losses(rows)

    def _known_teacher(self) -> nn.Module:
        if self.teacher is None:
            allowed = "a trained torch.nn.Module of the same classes, given in Python"
            raise ConfigError.of("defence.teacher", None, allowed)
        return self.teacher

    def refuse_task(self, task: Task) -> None:
        """Refuse a task without one class for each record, and a defence without a teacher."""
        self._known_teacher()
        refuse_other_tasks(task, (SingleLabel,), "defence", "it distils probabilities of classes")
