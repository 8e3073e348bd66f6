"""Tables `[training]` and `[private_training]` of a config, and the tables inside them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from perdure.data.groups import GroupWeights
from perdure.errors import ConfigError
from perdure.experiment.attack_config import AttackConfig
from perdure.experiment.averaging_config import AveragingConfig
from perdure.experiment.calls import arguments, of_module, parameters
from perdure.experiment.defence_config import DefenceConfig
from perdure.experiment.field_checks import COUNTS, check, counts
from perdure.experiment.from_tables import named_option
from perdure.experiment.loss_config import LossConfig
from perdure.experiment.mixing_config import MixingConfig
from perdure.experiment.validation_config import ValidationConfig
from perdure.experiment.views_config import OWN, ViewsConfig
from perdure.learner.optimizers import MakeOptimizer, first_line, made_optimizer
from perdure.learner.schedules import MakeSchedule, WarmUp, refuse_schedule
from perdure.learner.share_of_steps import STEPS_OR_SHARE, are_steps, steps_of
from perdure.learner.step_changes import SAM
from perdure.utils.checked_fields import CheckedFields

NEED_MORE = ("LBFGS", "SparseAdam", "Muon")
"""Optimisers of torch that a config may not name.

They need several gradients per step, sparse gradients, or models with matrices only.
"""
OPTIMIZERS = tuple(
    name
    for name, value in vars(torch.optim).items()
    if isinstance(value, type)
    and issubclass(value, Optimizer)
    and value is not Optimizer
    and name not in NEED_MORE
)
OF_OPTIMIZERS = ("params", "lr", "momentum", "capturable", "differentiable")
"""Parameters of optimisers that may not be in `optimizer_options`.

Other keys or perdure set them, or they have no use in the training loop.
"""
NEED_OBJECTS = (
    "LRScheduler",
    "LambdaLR",
    "MultiplicativeLR",
    "SequentialLR",
    "ChainedScheduler",
    "ReduceLROnPlateau",
)
"""Schedules of torch that a config may not name: they need functions, schedules or a loss."""
SCHEDULES = tuple(
    name
    for name, value in vars(lr_scheduler).items()
    if isinstance(value, type)
    and issubclass(value, LRScheduler)
    and not name.startswith("_")
    and name not in NEED_OBJECTS
)
STEPS = ("T_max", "T_0", "total_steps", "total_iters", "step_size", "step_size_up", "milestones")
"""Parameters of schedules that are numbers of steps."""
WHOLE = ("T_max", "total_steps")
"""Parameters of schedules that default to the number of steps of the experience."""
OF_SCHEDULES = ("optimizer", "last_epoch", "epochs", "steps_per_epoch", "scale_fn", "verbose")
"""Parameters of schedules that a config may not give."""
OF_PACKAGE = '"module:name" of a class, such as "pytorch_optimizer:SOAP" of perdure[optimizers]'


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(CheckedFields):
    """Schedule of the learning rate, made for every experience from its number of steps.

    A number of steps that is no whole number is a share of the steps of the experience: `T_max =
    1.0` means all of them, `milestones = [0.5, 0.75]` half and three quarters.

    Args:
        name: class of torch.optim.lr_scheduler, or "module:name" of a function of optimiser, steps
            and further arguments.
        options: the schedule's own arguments, which are keys of the same table.
    """

    TABLE: ClassVar[str] = "a table with name = NAME and the schedule's own arguments"

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_table(cls, table: Mapping[str, Any], where: str) -> "ScheduleConfig":
        """Find the schedule by its name, and check the other keys against its signature."""
        name, options = named_option("name", table, where, SCHEDULES)
        function = cls(name=name).function(f"{where}.name")
        without = (*OF_SCHEDULES, "steps")
        lengths = {} if ":" in name else {k: v for k, v in options.items() if k in STEPS}
        for key, value in lengths.items():
            each = value if isinstance(value, list) and key == "milestones" else [value]
            if not all(map(are_steps, each)):
                raise ConfigError.of(f"{where}.{key}", value, STEPS_OR_SHARE)
        # numbers of steps are checked; a stand-in has the type of all of them
        known = parameters(function, without)
        checked = {key: 1 for key in (*WHOLE, *lengths) if key in known}
        values = arguments(function, options | checked, where, without=without)
        return cls(name=name, options={k: lengths.get(k, values[k]) for k in options})

    def __call__(self, optimizer: Optimizer, *, steps: int) -> LRScheduler:
        """Make the learning-rate schedule of an experience that has `steps` optimiser steps."""
        function = self.function("name")
        if ":" in self.name:
            made: LRScheduler = function(optimizer, steps=steps, **self.options)
            return made
        known = parameters(function)
        given = {key: 1.0 for key in WHOLE if key in known} | dict(self.options)
        whole = {
            key: _steps_of(value, steps) if key in STEPS else value for key, value in given.items()
        }
        made = function(optimizer, **whole)
        return made

    def function(self, field: str) -> Callable[..., LRScheduler]:
        """Return the class or function that makes the schedule.

        Args:
            field: key of the config that has the name, for messages.
        """
        if ":" in self.name:
            return of_module(self.name, field, f"{OWN} that returns a schedule of torch.optim")
        if self.name not in SCHEDULES:
            raise ConfigError.of(field, self.name, f"{', '.join(SCHEDULES)}, or {OWN}")
        chosen: Callable[..., LRScheduler] = getattr(lr_scheduler, self.name)
        return chosen


def _steps_of(value: Any, steps: int) -> Any:
    """Convert shares of an experience's steps, also in a list, into numbers of steps."""
    if isinstance(value, list | tuple):
        return [_steps_of(each, steps) for each in value]
    return steps_of(value, steps) if isinstance(value, int | float) else value


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(CheckedFields):
    """Length, optimiser and precision of training on an experience.

    Args:
        optimizer: name of a class of torch.optim, or "module:name" of a class or function of
            parameters and lr, such as "pytorch_optimizer:SOAP" (perdure[optimizers]).
        learning_rate: first learning rate of the schedule, or the constant rate without one.
        momentum: momentum of the optimiser, if it has one; left out for the optimiser's default.
        optimizer_options: further arguments of the optimiser, such as {weight_decay = 1e-4}.
        schedule: schedule of the learning rate; left out for a constant one.
        epochs: passes over the records of an experience, in a federation spread over its rounds;
            give this or `iterations`.
        iterations: steps of an experience, in a federation spread over its rounds.
        blocks: parts of an experience with a checkpoint after each, so that a stopped run loses a
            part only; under privacy each is one charge. In a federation, rounds are the blocks.
        batch_size: records per step.
        micro_batch_size: rows in one pass through the model, to limit memory; left out for all.
        evaluate_every: number of pieces (`chunk`) of an experience after which the model is
            measured, too.
        reset_optimizer: start every experience with a fresh optimiser.
        precision: number format of the passes through the model during training.
        compile: compile the model by `torch.compile`; not for private arms.
        adversary: attack that moves every batch before its gradient (adversarial training).
        views: random versions of every record (augmentation).
        mixing: mixed pairs of records (mixup or CutMix); not for private arms.
        defence: losses of rows and their perturbed versions, such as trades; left out for the loss
            of the perturbed rows.
        warmup: first steps of every experience, a number or a share of all, in which the learning
            rate rises linearly; then `schedule` begins.
        averaging: average of the parameters, by which the model answers.
        sharpness: sharpness-aware gradients, at the worst parameters nearby.
        l1: factor of the sum of absolute values of the trained parameters, added to the loss.
        l2: factor of half the sum of their squares, added to the loss.
        gradient_noise: variance of noise on the gradient in the first step of an experience,
            divided by (1 + t)^0.55 in step t.
        weight_noise: standard deviation of noise on the parameters while a gradient is computed.
        validation: measurements on held-out records, early stopping and the best model; only
            without privacy and without a federation.
        loss: loss of every record; left out for the loss of the task. An arm may have its own.
        max_grad_norm: largest L2 norm of the whole gradient of a step, after penalty and
            projection; left out for no bound. Under privacy it costs nothing.
        group_weights: factors of the losses of groups of records, from declared counts.
        fine_tune: parameters to train: `all`, `head`, or a list of beginnings of names, such as
            ["head.", "body.2."]; left out to train what the model says.
    """

    optimizer: str = "Adam"
    learning_rate: float = 1e-3
    momentum: float | None = None
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    schedule: ScheduleConfig | None = None
    epochs: int | None = None
    iterations: int | None = None
    blocks: int = 1
    batch_size: int = 32
    micro_batch_size: int | None = None
    evaluate_every: int | None = None
    reset_optimizer: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    adversary: AttackConfig | None = None
    views: ViewsConfig | None = None
    mixing: MixingConfig | None = None
    defence: DefenceConfig | None = None
    warmup: int | float | None = None
    averaging: AveragingConfig | None = None
    sharpness: SAM | None = None
    l1: float = 0.0
    l2: float = 0.0
    gradient_noise: float = 0.0
    weight_noise: float = 0.0
    validation: ValidationConfig | None = None
    loss: LossConfig | None = None
    max_grad_norm: float | None = None
    group_weights: GroupWeights | None = None
    fine_tune: Literal["all", "head"] | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if ":" not in self.optimizer:
            allowed = f"{', '.join(OPTIMIZERS)}, or {OF_PACKAGE}"
            check(self, "optimizer", OPTIMIZERS.__contains__, allowed)
        check(
            self,
            "learning_rate",
            lambda value: 0 < value <= 1e6,
            "a number above 0 and at most 1e6",
        )
        check(self, "momentum", lambda value: 0 <= value < 1, "a number from 0 to below 1")
        check(
            self,
            "max_grad_norm",
            lambda value: 0 < value <= 1e9,
            "a number above 0 and at most 1e9",
        )
        names = "epochs iterations blocks batch_size micro_batch_size evaluate_every"
        check(self, names, counts, COUNTS)
        allowed = "all, head, or a list of beginnings of names, at least one"
        check(self, "fine_tune", bool, allowed)
        if self.momentum is not None and "momentum" not in parameters(self._class):
            known = [
                name for name in OPTIMIZERS if "momentum" in parameters(vars(torch.optim)[name])
            ]
            raise ConfigError.of(
                "momentum",
                self.momentum,
                f"no momentum for {self.optimizer}; only {', '.join(known)} have momentum",
            )
        if (self.epochs is None) == (self.iterations is None):
            given = f"epochs = {self.epochs} with iterations = {self.iterations}"
            raise ConfigError(
                f"{given} is not allowed; allowed: exactly one of epochs and iterations"
            )
        check(self, "warmup", are_steps, STEPS_OR_SHARE)
        not_negative = "l1 l2 gradient_noise weight_noise"
        check(self, not_negative, lambda value: 0 <= value <= 1e6, "a number from 0 to 1e6")
        if self.optimizer_options or self.schedule or ":" in self.optimizer:
            self._try_out()

    def _try_out(self) -> None:
        """Refuse options that the optimiser's class refuses, before any data are loaded."""
        arguments(self._class, self.optimizer_options, "optimizer_options", without=OF_OPTIMIZERS)
        try:
            made_optimizer(self.factory(), {"weight": nn.Parameter(torch.zeros(1))})
        except ConfigError as error:
            if not self.optimizer_options:
                raise
            raise _of_torch("optimizer_options", dict(self.optimizer_options), error) from error
        if self.schedule:
            try:
                refuse_schedule(self.factory(), self.schedule, self.iterations)
            except ConfigError as error:
                given = {"name": self.schedule.name, **self.schedule.options}
                raise _of_torch("schedule", given, error) from error

    @property
    def scheduler(self) -> MakeSchedule | None:
        """Schedule as the argument `scheduler` of `Learner`: warm-up, then `schedule`."""
        if self.warmup is None:
            return self.schedule
        return WarmUp(steps=self.warmup, then=self.schedule)

    def factory(self) -> MakeOptimizer:
        """Return a function that makes the optimiser for given parameters."""
        options: dict[str, Any] = {"lr": self.learning_rate}
        if self.momentum is not None:
            options["momentum"] = self.momentum
        checked = arguments(
            self._class, self.optimizer_options, "optimizer_options", without=OF_OPTIMIZERS
        )
        return partial(self._class, **options, **checked)

    @property
    def _class(self) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
        if ":" in self.optimizer:
            return of_module(self.optimizer, "optimizer", OF_PACKAGE)
        chosen: Callable[..., Optimizer] = getattr(torch.optim, self.optimizer)
        return chosen


def _of_torch(field: str, given: dict[str, Any], error: ConfigError) -> ConfigError:
    """Return the error for arguments that torch refused, with torch's reason."""
    cause = error.__cause__
    if not isinstance(cause, Exception):
        return ConfigError(f"{field}: {error}")
    return ConfigError.of(field, given, f"arguments that torch takes ({first_line(cause)})")
