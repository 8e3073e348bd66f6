"""Task of a run: the task of the records, with the loss that the user chose."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch

from perdure.data.experience import Stream
from perdure.errors import ConfigError, PrivacyError
from perdure.planning.training_plan import TrainingPlan
from perdure.tasks import Task
from perdure.tasks.losses import Loss


def task_of_run(training: TrainingPlan, loss: Loss | None) -> Task:
    """Return the task of a stream with the chosen loss; refuse a loss that cannot be used.

    Args:
        training: plan with stream, strategy and privacy.
        loss: chosen loss; None for the loss of the records' task.

    Raises:
        ConfigError: if task, strategy or number of classes do not fit the loss.
        PrivacyError: under privacy, if the loss counts labels.
    """
    stream = training.stream
    task = stream.task if loss is None else replace(stream.task, loss=loss)
    chosen = task.loss
    if chosen is None:
        return task
    strategy = training.strategy
    own = strategy.own_loss_because
    if not own and not any(training.of(experience).train for experience in stream):
        own = "it uses no gradient"
    if own:
        raise ConfigError.of("loss", chosen.name, f"None with {strategy.name}, because {own}")
    chosen.refuse_classes(stream.num_classes)
    if chosen.counts_labels and training.privacy:
        raise PrivacyError(
            f'the loss {chosen.name} with "balanced" counts private labels, which no ledger entry '
            "covers; give declared numbers, or numbers from counts that you released"
        )
    return task


def tasks_by_experience(stream: Stream, task: Task) -> Callable[[int], Task]:
    """Return a function from an experience's index to the task, with counts where it needs some.

    Counts are over the training records of this and all earlier experiences, so that none uses a
    later experience.

    Args:
        stream: stream whose labels are counted.
        task: task of the run, with its loss.
    """
    loss = task.loss
    if loss is None or not loss.counts_labels:
        return lambda index: task

    @cache
    def counts_of(index: int) -> torch.Tensor:
        own = task.class_counts(stream[index].train.labels, stream.num_classes)
        return own if index == 0 else own + counts_of(index - 1)

    @cache
    def task_at(index: int) -> Task:
        return replace(task, loss=loss.with_counts(counts_of(index).tolist()))

    return task_at
