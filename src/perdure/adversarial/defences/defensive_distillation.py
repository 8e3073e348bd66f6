"""Defensive distillation, a historical baseline that is broken."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from perdure.adversarial.defences.base import Defence, TaskLosses, plain
from perdure.contract.context import Context
from perdure.contract.forward import Forward
from perdure.data.records import Batch
from perdure.errors import ConfigError
from perdure.tasks import SingleLabel, Task, refuse_other_tasks


@dataclass(frozen=True, kw_only=True)
class DefensiveDistillation(Defence):
    """Training at a high temperature, which only hides the gradient: BROKEN, for comparison only.

        loss_i = cross entropy of softmax(z(x_i) / temperature)   with the label, for the teacher,
                                                                  with the teacher's softmax then

    The trained model answers at temperature 1, so its logits are `temperature` times as large as
    others, and the cross entropy has a gradient of 0 for most records. Attacks that raise the cross
    entropy fail; attacks on the margin of the logits succeed as ever. Never use it to protect a
    model. The strategy's own terms of the loss are left out.

    Privacy: refused, because the ledger does not count the training of the teacher.

    Args:
        temperature: number by which logits are divided in training.
        teacher: trained model of the same classes; None to train a teacher, on the labels.
        memory: as in `Defence`; without an attack it has no effect.

    Source: Papernot, McDaniel, Wu, Jha, Swami 2016, "Distillation as a defense to adversarial
    perturbations against deep neural networks"; broken by Carlini and Wagner 2017, "Towards
    evaluating the robustness of neural networks".
    """

    NEEDS_ATTACK: ClassVar[bool] = False
    PRIVATE_REFUSAL: ClassVar[str] = (
        "the ledger does not count the training of its teacher, and the defence is broken; use "
        "adversary=PGD(...), alone or with defence=TRADES()"
    )

    temperature: float = 40.0
    teacher: nn.Module | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.temperature <= 1e4:
            raise ConfigError.of("temperature", self.temperature, "a number from 1 to 10000")

    def losses(
        self,
        losses: TaskLosses,
        forward: Forward,
        batch: Batch,
        context: Context,
    ) -> Tensor:
        """Return (n,) losses at the temperature."""
        rows = plain(batch)
        logits = context.mask(forward(rows.inputs) / self.temperature, rows)
        if self.teacher is None:
            return context.losses(logits, rows)
        with torch.no_grad():
            answers = context.mask(self.teacher(rows.inputs) / self.temperature, rows)
        return -(answers.softmax(1) * logits.log_softmax(1)).sum(1)

    def refuse_task(self, task: Task) -> None:
        """Refuse a task without one class for each record."""
        refuse_other_tasks(task, (SingleLabel,), "defence", "it distils probabilities of classes")
