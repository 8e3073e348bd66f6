"""Task of a run: the task of the records, with the loss that the user chose."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch

from perdure.data.experience import Stream
from perdure.errors import ConfigError, PerdureError, PrivacyError
from perdure.learner.loss_path import is_own_loss
from perdure.learner.optimizers import first_line
from perdure.planning.training_plan import TrainingPlan
from perdure.tasks import Task
from perdure.tasks.losses import Loss

ROWS = 3
"""Number of synthetic records on which a loss of the user is tried."""


def task_of_run(training: TrainingPlan, loss: Loss | None) -> Task:
    """Return the task of a stream with the chosen loss; refuse a loss that cannot be used.

    Args:
        training: plan with stream, strategy and privacy.
        loss: chosen loss; None for the loss of the records' task.

    Raises:
        ConfigError: if task, strategy or number of classes do not fit the loss, or if a loss of the
            user does not give one number for each record, with a gradient.
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
    if not is_own_loss(chosen):
        _refuse_broken(task, chosen, stream)
    if chosen.counts_labels and training.privacy:
        raise PrivacyError(
            f'the loss {chosen.name} with "balanced" counts private labels, which no ledger entry '
            "covers; give declared numbers, or numbers from counts that you released"
        )
    return task


def refuse_unused_weights(training: TrainingPlan, stream: Stream) -> None:
    """Refuse weights of records if the strategy takes no gradient, because it would ignore them.

    Args:
        training: plan with strategy and privacy.
        stream: stream whose training records may have weights.

    Raises:
        ConfigError: names the strategy.
    """
    weights = any(each.train.weights is not None for each in stream)
    if weights and not any(training.of(each).train for each in training.stream):
        name = training.strategy.name
        raise ConfigError.of(
            "weights of records", f"given with {name}", "a strategy with gradients"
        )


def _refuse_broken(task: Task, chosen: Loss, stream: Stream) -> None:
    """Refuse a loss of the user that fails on synthetic records, or has no number for each."""
    width = task.head_width(stream.num_classes)
    first = stream[0]
    targets = task.synthetic(first.train.labels, first.classes, torch.arange(ROWS))
    shape = task.output_shape(targets, width)
    outputs = torch.linspace(-1.0, 1.0, math.prod(shape), device=targets.device).view(shape)
    counted = chosen.with_counts([1.0] * width) if chosen.counts_labels else chosen
    name = f"loss {type(chosen).__name__}"
    needed = f"a tensor of one number for each record, ({ROWS},) for {ROWS} records"
    mask = torch.ones(width, dtype=torch.bool, device=targets.device)
    try:
        with torch.enable_grad():
            found: object = replace(task, loss=counted).losses(
                outputs.requires_grad_(), targets, mask
            )
    except PerdureError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(
            f"the {name} fails on {ROWS} synthetic records ({reason}); allowed: {needed}"
        ) from error
    if not isinstance(found, torch.Tensor) or found.shape != (ROWS,):
        given = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise ConfigError.of(f"result of the {name}", given, f"{needed}, with reduction='none'")
    if not found.requires_grad:
        given = "a tensor without gradient"
        raise ConfigError.of(f"result of the {name}", given, "a differentiable tensor, no detach()")


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
