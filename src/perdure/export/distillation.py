"""Distillation: train a small model (student) on the outputs of a trained predictor (teacher)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from perdure.contract.state import State
from perdure.contract.strategy import Strategy
from perdure.errors import ConfigError, RunawayError
from perdure.export.predictor import Predictor
from perdure.tasks import Task
from perdure.utils.checked_fields import check_fields
from perdure.utils.modules import begin_training, end_training
from perdure.utils.seeding import generator


@dataclass(frozen=True, kw_only=True, eq=False)
class Distillation:
    """Settings of distillation: the student, its inputs and its training.

    Args:
        student: untrained module with outputs like the model's; it is trained in place.
        inputs: (n, ...) public inputs; needed for a private model. None for the training inputs.
        steps: number of steps.
        batch_size: records in a step.
        learning_rate: learning rate of Adam.
        temperature: number by which the outputs of student and teacher are divided.
        seed: seed of the choice of batches.

    Source: Hinton, Vinyals and Dean, Distilling the knowledge in a neural network, 2015, section 2.
    """

    student: nn.Module
    inputs: Tensor | None = None
    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = 1e-3
    temperature: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("steps", "batch_size", "learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise ConfigError.of(name, getattr(self, name), "above 0")


def distil(
    settings: Distillation, teacher: Predictor, inputs: Sequence[Tensor], task: Task
) -> Predictor:
    """Train the student and return its predictor, with the classes of the teacher's.

    Guarantee: the teacher's, if `inputs` are public, because the student is computed from the
    teacher's outputs alone.

    Args:
        settings: student and training.
        teacher: the trained predictor.
        inputs: (n, ...) inputs for each task; one tensor if the outputs do not depend on the task.
        task: task of the records.

    Raises:
        ConfigError: for a student with outputs of another shape.
        RunawayError: if its training diverged.
    """
    student = Predictor(settings.student, Strategy(), State(), teacher.contexts)
    optimizer = torch.optim.Adam(student.model.parameters(), lr=settings.learning_rate)
    rng = generator(settings.seed, "distillation", 0)
    _check_outputs(student.model, teacher.model, inputs[0][:1])
    begin_training(student.model)
    for step in range(settings.steps):
        number = step % len(inputs)
        rows = inputs[number]
        picked = rows[torch.randint(len(rows), (settings.batch_size,), generator=rng)]
        losses = partial(_losses, settings, task, teacher.contexts[number].allowed)
        given = (torch.full((len(picked),), number),) if teacher.by_task else ()
        with torch.no_grad():
            answers = teacher(picked, *given)
        loss = losses(student.model(picked), answers).mean()
        if not torch.isfinite(loss):
            raise RunawayError(
                f"the student's loss is {loss.item()} at step {step}; use a lower learning_rate"
            )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    end_training(student.model)
    return student


def _losses(
    settings: Distillation, task: Task, allowed: Tensor, outputs: Tensor, answers: Tensor
) -> Tensor:
    return task.distillation(
        outputs,
        answers,
        task.predictions(answers, allowed),
        known=allowed,
        allowed=allowed,
        temperature=settings.temperature,
    )


def _check_outputs(student: nn.Module, teacher: nn.Module, row: Tensor) -> None:
    with torch.no_grad():
        found, wanted = student(row).shape[1:], teacher(row).shape[1:]
    if found != wanted:
        raise ConfigError.of(
            "student", f"outputs of shape {tuple(found)}", f"outputs of shape {tuple(wanted)}"
        )
