"""Facts about a training that has not begun, for rules that examine it."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from perdure.contract.strategy import Strategy
from perdure.data.domain import InputDomain
from perdure.data.experience import Experience, Stream
from perdure.data.record_identity import ComparedRecords
from perdure.data.records import Records
from perdure.data.row_view import rows_at
from perdure.errors import ConfigError, PerdureError, PrivacyError
from perdure.explain import Explainer
from perdure.learner.chosen_loss import tasks_by_experience
from perdure.learner.optimizers import MakeOptimizer
from perdure.planning.budget import scheduled
from perdure.planning.training_plan import TrainingPlan
from perdure.privacy.guard.probes import domain_of
from perdure.privacy.settings import Privacy
from perdure.strategies import find as find_strategy
from perdure.tasks import Task
from perdure.tasks.losses import Loss as TaskLoss
from perdure.utils.checked_fields import check_fields
from perdure.utils.modules import evaluating, trainable_parameters
from perdure.utils.seeding import drawing_from, generator

Loss = Callable[[Tensor, Tensor], Tensor]
"""Function from outputs (n, ..., C) and targets to a loss, one number or one for each record."""

ROWS = 1_000
"""Most records of a sample that rules read."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """Facts about a training that has not begun.

    Guarantee: under privacy the case holds no training record, only declared facts and the test
    records, which are public.

    Args:
        model: model before training; rules change copies of it only.
        stream: experiences in the order of training. Under privacy the case keeps it without its
            training records.
        loss: loss of the learner (see `perdure.tasks.losses`), or of a training loop of one's own;
            None for the loss of the stream's task.
        optimizer: optimiser of the model's parameters, or function from parameters to one; None if
            it is not known.
        privacy: settings of differential privacy; None for training without privacy.
        strategy: strategy against forgetting, which determines the noise of a budget.
        batch_size: number of new records per step.
        epochs: number of passes over the records of an experience; None if `iterations` is given.
        iterations: number of steps in an experience; None if `epochs` is given.
        micro_batch_size: number of rows in one pass through the model; None for a whole batch.
        explainer: explainer of the trained model; None for none.
        seed: seed of synthetic records and of trial trainings.
        device: device of the model and the records in training.
    """

    model: nn.Module
    stream: Stream
    loss: Loss | TaskLoss | None = None
    optimizer: MakeOptimizer | Optimizer | None = None
    privacy: Privacy | None = None
    strategy: Strategy | None = None
    batch_size: int = 128
    epochs: int | None = None
    iterations: int | None = None
    micro_batch_size: int | None = None
    explainer: Explainer | None = None
    seed: int = 0
    device: str | torch.device = "cpu"
    counted_sizes: tuple[int, ...] = field(init=False, default=())
    """Indices of the experiences whose number of records is neither declared nor published."""

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise ConfigError.of("model", self.model, "a torch.nn.Module")
        if not isinstance(self.stream, Stream):
            raise ConfigError.of("stream", self.stream, "a perdure.data.Stream")
        check_fields(self, prefix="")
        for name in ("batch_size", "epochs", "iterations", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError.of(name, value, "a whole number, 1 or more")
        if self.epochs is not None and self.iterations is not None:
            given = f"{self.epochs}, with iterations={self.iterations}"
            raise ConfigError.of("epochs", given, "one of epochs and iterations")
        counted = tuple(
            each.index
            for each in self.stream
            if each.train.size_counted and not each.train.size_published
        )
        object.__setattr__(self, "counted_sizes", counted)
        if self.privacy is not None:
            object.__setattr__(self, "stream", public_part(self.stream))

    # ------------------------------------------------------------------ records

    @cached_property
    def task(self) -> Task:
        """Task of the records, with the loss of the learner."""
        task = self.stream.task
        loss = self.loss
        if not isinstance(loss, TaskLoss) or (loss.counts_labels and not self._reads_training):
            return task
        return tasks_by_experience(self.stream, replace(task, loss=loss))(0)

    @cached_property
    def domain(self) -> InputDomain:
        """Declared domain of the inputs; for floats without one, numbers from 0 to 1.

        Without privacy, the vocabulary of whole numbers is read from the records if need be.
        """
        first = self.stream[0].train
        dtype = first.inputs.dtype
        if first.domain is None and not dtype.is_floating_point and self.privacy is None:
            largest = max((int(each.train.inputs.max()) for each in self._with_records), default=0)
            shape = tuple(first.inputs.shape[1:])
            return InputDomain(shape=shape, dtype=dtype, vocabulary=largest + 1)
        return domain_of(first.inputs, first.domain)

    @property
    def origin(self) -> str:
        """Kind of the records in `sample`: training records, or public test records."""
        return "training records" if self._reads_training else "public test records"

    @cached_property
    def sample(self) -> Records | None:
        """At most `ROWS` records, evenly from all stages; None if there are none to read."""
        parts = [self.records_of(stage.last) for stage in self.stream.stages]
        share = max(1, ROWS // len(parts))
        taken = [_evenly(part, share) for part in parts if len(part)]
        if not taken:
            return None
        return replace(
            taken[0],
            inputs=torch.cat([part.inputs for part in taken]),
            labels=torch.cat([part.labels for part in taken]),
            ids=torch.cat([part.ids for part in taken]),
            attributes={},
            declared_size=0,
        )

    def records_of(self, index: int) -> Records:
        """Records of an experience that rules may read: training ones, or public test ones."""
        experience = self.stream[index]
        return experience.train if self._reads_training else experience.test

    def some_records(self, index: int, most: int) -> Records | None:
        """At most `most` records of an experience that rules may read; None if it has none."""
        records = self.records_of(index)
        return _evenly(records, most) if len(records) else None

    @property
    def _reads_training(self) -> bool:
        return bool(self._with_records)

    @property
    def _with_records(self) -> list[Experience]:
        return [experience for experience in self.stream if len(experience.train)]

    def random_inputs(self, rows: int) -> Tensor:
        """Draw random inputs (rows, ...) from the declared domain."""
        return self.domain.random(rows, generator(self.seed, "doctor", "inputs"))

    def random_targets(self, rows: int) -> Tensor:
        """Make synthetic targets (rows, ...), with the classes of the first experience."""
        first = self.stream[0]
        numbers = torch.arange(rows)
        return self.task.synthetic(first.train.labels.cpu(), first.classes, numbers)

    def some_inputs(self, rows: int) -> Tensor:
        """Return at most `rows` inputs (n, ...) of the sample; random ones without a sample."""
        if self.sample is None:
            return self.random_inputs(rows)
        return _evenly(self.sample, rows).inputs

    # ------------------------------------------------------------------ model

    def fresh_model(self) -> nn.Module:
        """Copy the model, on the CPU and in training mode, for a trial."""
        return deepcopy(self.model).cpu().train()

    def outputs(self, inputs: Tensor) -> Tensor:
        """Outputs (n, ..., C) of a copy of the model in evaluation mode, without gradients."""
        model = self.fresh_model()
        with torch.no_grad(), evaluating(model), drawing_from(self.seed):
            found: Tensor = model(inputs)
        return found

    def mean_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss () of outputs (n, ..., C) and their targets."""
        own = self.loss
        losses = self.task.losses if own is None or isinstance(own, TaskLoss) else own
        return losses(outputs, targets).mean()

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer | None:
        """Make an optimiser with the settings of the case for other parameters; None if unknown."""
        if isinstance(self.optimizer, Optimizer):
            return type(self.optimizer)(parameters, **self.optimizer.defaults)
        return None if self.optimizer is None else self.optimizer(parameters)

    @property
    def learning_rate(self) -> float | None:
        """Learning rate of the optimiser; None if it is not known."""
        made = self.make_optimizer([nn.Parameter(torch.zeros(1))])
        return None if made is None else float(made.param_groups[0].get("lr", 0.0)) or None

    @property
    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that require gradients, by name."""
        return trainable_parameters(self.model)

    @property
    def trained_numbers(self) -> int:
        """Number of trained numbers: the total length of all parameters that require gradients."""
        return sum(value.numel() for value in self.trained_parameters.values())

    # ------------------------------------------------------------------ length and noise

    @property
    def plan(self) -> TrainingPlan:
        """Plan of training, from declared facts only."""
        return TrainingPlan(
            stream=self.stream,
            strategy=self.strategy or find_strategy("naive")(),
            batch_size=self.batch_size,
            epochs=self.epochs if self.epochs or self.iterations else 1,
            iterations=self.iterations,
            privacy=self.privacy,
        )

    @property
    def steps(self) -> int:
        """Number of steps in the first experience, at least 1."""
        return max(1, self.plan.steps_of(self.stream.upto(0)))

    @cached_property
    def noise_multiplier(self) -> float | None:
        """Noise of a step in units of the clip norm; None without privacy or if nothing fits."""
        if self.privacy is None:
            return None
        if self.privacy.noise_multiplier is not None:
            return self.privacy.noise_multiplier
        try:
            return max(scheduled(self.plan).noise)
        except PerdureError:  # the learner refuses the plan, with the reason
            return None

    @property
    def records_per_step(self) -> float:
        """Expected number of records in a step of the first experience, from declared sizes."""
        return float(self.plan.exposure(self.stream.upto(0)).expected)


def public_part(stream: Stream) -> Stream:
    """Return the stream without training records; declared facts and test records remain.

    Raises:
        PrivacyError: if a test record is a training record, so that it is not public.
    """
    found = ComparedRecords().find_learnt((stream,), [stage.test for stage in stream.stages])
    if found is not None:
        number = next(stage.number for stage in stream.stages if stage.test is found)
        raise PrivacyError(
            f"test records of stage {number} are training records, which an examination under "
            "privacy does not read; use public test records, or ids that no training record has"
        )
    return replace(stream, experiences=tuple(map(Experience.without_records, stream)))


def _evenly(records: Records, most: int) -> Records:
    """Take at most `most` records, evenly spread over all, and copy them to the CPU."""
    n = len(records)
    places = torch.arange(min(n, most)) * n // max(1, min(n, most))
    return records.map(lambda rows: rows_at(rows, places.to(rows.device)).cpu())
