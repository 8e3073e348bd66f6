"""Public facts that a strategy may use: shapes, declared sizes and declared classes."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from perdure.data.experience import Stream
from perdure.data.records import Batch
from perdure.errors import StrategyError
from perdure.tasks import SingleLabel, Task, mask_outputs
from perdure.types import Params, Scenario
from perdure.utils.modules import statistics_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Spec:
    """Shapes and public sizes, from which a strategy builds its first state.

    Args:
        params: parameters of the model by name (for their shapes, device and initial values).
        num_classes: width of the head.
        num_experiences: declared length of the stream.
        feature_size: width of `model.features`.
        scenario: task-, domain- or class-incremental.
        statistics: running means and variances of the model's layers by name; a teacher keeps them
            together with its parameters.
        task: meaning of the records' targets.
    """

    params: Params
    num_classes: int
    num_experiences: int
    feature_size: int
    scenario: Scenario
    statistics: Params = field(default_factory=dict)
    task: Task = field(default_factory=SingleLabel)

    def require_features(self) -> None:
        """Refuse a model that does not declare the number of its features.

        Raises:
            StrategyError: if the model has no `feature_size`.
        """
        if self.feature_size < 1:
            raise StrategyError(
                "the model has no feature_size; add the attribute feature_size and the method "
                "features, as in perdure.models.Classifier, or name the layer that gets the "
                "features, as in perdure.models.wrap(model, head=LAYER)"
            )

    @property
    def teacher(self) -> Params:
        """All tensors that decide the outputs of the model: parameters and running statistics."""
        return {**self.params, **self.statistics}


@dataclass(frozen=True, kw_only=True, eq=False)
class Context:
    """Public facts about the current experience; no fact was computed from private data.

    Args:
        scenario: task-, domain- or class-incremental.
        experience: index of the experience (in the evaluation of a task-incremental stream: index
            of the evaluated task).
        task_classes: (T, C) bool, the declared classes of every experience.
        seen: (C,) bool, the classes of this and all earlier experiences.
        declared_size: public number of records of this experience.
        memory_share: share of the rows of the current batch that come from memory, if stored rows
            are drawn as a batch of their own; 0 without memory, and 0 if new and stored records are
            one pool, as under privacy.
        task: meaning of the records' targets.
    """

    scenario: Scenario
    experience: int
    task_classes: Tensor
    seen: Tensor
    declared_size: int = 1
    memory_share: float = 0.0
    task: Task = field(default_factory=SingleLabel)

    @property
    def current(self) -> Tensor:
        """(C,) bool, the declared classes of this experience."""
        return self.task_classes[self.experience]

    @property
    def earlier(self) -> Tensor:
        """(C,) bool, the classes of earlier experiences that are not classes of this one.

        A teacher, trained earlier, can predict them.
        """
        return self.task_classes[: self.experience].any(0) & ~self.current

    @property
    def allowed(self) -> Tensor:
        """(C,) bool, the classes that a record of this experience may be predicted as."""
        if self.scenario == "task":
            return self.current
        return self.seen if self.scenario == "class" else torch.ones_like(self.seen)

    def allowed_for(self, batch: Batch) -> Tensor | None:
        """(C,) or (n, C) bool, the classes that each row may be predicted as; None for all."""
        if self.scenario == "domain":
            return None
        return self.task_classes[batch.tasks] if self.scenario == "task" else self.seen

    def mask(self, logits: Tensor, batch: Batch) -> Tensor:
        """Logits (n, ..., C), with `MASKED` for the classes that a row may not be predicted as."""
        return mask_outputs(logits, self.allowed_for(batch))

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return (n,) loss of the task for each row, over the classes that it may be predicted as.

        Args:
            outputs: (n, ..., C) outputs of the model for the rows.
            batch: n rows.
        """
        return self.task.losses(outputs, batch.labels, self.allowed_for(batch))


def contexts(
    stream: Stream, device: str | torch.device, tasks: Callable[[int], Task] | None = None
) -> Callable[..., Context]:
    """Return a function from an experience's index to its public facts.

    Args:
        stream: the stream.
        device: device of the facts.
        tasks: function from an experience's index to the task with the loss of the run; None for
            the task of the records.
    """
    table = torch.zeros(len(stream), stream.num_classes, dtype=torch.bool, device=device)
    for experience in stream:
        table[experience.index, list(experience.classes)] = True
    so_far = table.cumsum(0) > 0

    def context(index: int, declared_size: int = 1, memory_share: float = 0.0) -> Context:
        return Context(
            scenario=stream.scenario,
            experience=index,
            task_classes=table,
            seen=so_far[index],
            declared_size=declared_size,
            memory_share=memory_share,
            task=stream.task if tasks is None else tasks(index),
        )

    return context


def spec_of(model: nn.Module, params: Params, stream: Stream, *, private: bool = False) -> Spec:
    """Collect the public facts from which a strategy builds its state.

    If records are private, running statistics are left out, because they depend on single records.

    Args:
        model: the model; its buffers give the running statistics.
        params: its parameters by name.
        stream: the stream that will be trained on.
        private: True under differential privacy.
    """
    return Spec(
        params=params,
        num_classes=stream.num_classes,
        num_experiences=len(stream),
        scenario=stream.scenario,
        feature_size=getattr(model, "feature_size", 0),
        statistics={} if private else statistics_of(model),
        task=stream.task,
    )
