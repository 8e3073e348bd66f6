"""Learning-rate schedules: one per experience, made from its number of steps."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler, SequentialLR

from perdure.errors import ConfigError
from perdure.learner.optimizers import (
    FAULTS,
    MakeOptimizer,
    called,
    first_line,
    needs_argument,
    step_optimizer,
)
from perdure.learner.share_of_steps import STEPS_OR_SHARE, are_steps, steps_of
from perdure.utils.checked_fields import CheckedFields
from perdure.utils.hashing import canonical_text

EXAMPLE = "lambda optimizer, steps: CosineAnnealingLR(optimizer, T_max=steps)"


STEPS_TRIED = 100
"""Number of steps with which a schedule is tested if the length of an experience is unknown."""


class MakeSchedule(Protocol):
    """Function from an optimiser and the number of steps of an experience to a schedule."""

    def __call__(self, optimizer: Optimizer, /, *, steps: int) -> LRScheduler:
        """Return the schedule of one experience, which is updated after every step.

        Args:
            optimizer: optimiser with its initial options.
            steps: number of steps of the experience, 1 or more.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class WarmUp(CheckedFields):
    """Schedule whose rate first rises linearly to the rate of the optimiser.

        rate in step t = rate * (t + 1) / n    for t < n;  then `then` begins at its first step

    >>> Learner(..., scheduler=WarmUp(steps=0.1, then=cosine))

    Args:
        steps: number n of steps of the warm-up, or a share of the steps of an experience as a
            fraction: 0.1 for a tenth, 1.0 for all.
        then: schedule of the other steps, a function as `scheduler` of `Learner`, which gets their
            number; None for the constant rate.

    Source: Goyal et al. 2017, section 2.2; `torch.optim.lr_scheduler.SequentialLR`.
    """

    steps: int | float
    then: MakeSchedule | None = None

    def __post_init__(self) -> None:
        if not are_steps(self.steps):
            raise ConfigError.of("steps", self.steps, STEPS_OR_SHARE)

    def __call__(self, optimizer: Optimizer, /, *, steps: int) -> LRScheduler:
        """Return the schedule of one experience."""
        count = min(steps, steps_of(self.steps, steps))
        rising = LinearLR(optimizer, start_factor=1 / count, total_iters=max(1, count - 1))
        if self.then is None or count == steps:
            return rising
        following = self.then(optimizer, steps=steps - count)
        return SequentialLR(optimizer, [rising, following], milestones=[count])


def made_schedule(make: MakeSchedule, optimizer: Optimizer, steps: int) -> LRScheduler:
    """Make the schedule of an experience; refuse one that the loop cannot use.

    Raises:
        ConfigError: if the function does not take `steps`, or does not return a schedule of this
            optimiser that depends only on the number of the step.
    """
    try:
        made: object = make(optimizer, steps=steps)
    except FAULTS as error:
        raise ConfigError(
            f"scheduler(optimizer, steps={steps}) fails: {first_line(error)}; allowed: a function "
            f"from optimiser and number of steps of an experience, such as {EXAMPLE}"
        ) from error
    name = type(made).__name__
    if not isinstance(made, LRScheduler):
        raise ConfigError.of(
            "scheduler(optimizer, steps=...)", name, f"a schedule of torch.optim, such as {EXAMPLE}"
        )
    if needs_argument(made.step):
        raise ConfigError.of(
            "scheduler",
            name,
            "a schedule that needs no measured loss, because the loop measures no loss, such as "
            f"{EXAMPLE}",
        )
    if made.optimizer is not optimizer:
        raise ConfigError.of(
            "scheduler",
            f"{name} of another optimiser",
            f"a schedule of the optimiser in its first argument, such as {EXAMPLE}",
        )
    return made


def refuse_schedule(
    optimizer: MakeOptimizer, scheduler: MakeSchedule, steps: int | None = None
) -> None:
    """Refuse a schedule that the loop cannot use, before a run begins.

    Args:
        optimizer: function from parameters to the optimiser.
        scheduler: function from the optimiser and the number of steps to its schedule.
        steps: number of steps of an experience; None for `STEPS_TRIED`.
    """
    own = called(optimizer, [nn.Parameter(torch.zeros(1))])
    made_schedule(scheduler, own, steps or STEPS_TRIED)


def take_step(optimizer: Optimizer, schedule: LRScheduler | None) -> None:
    """Take a step of the optimiser, and set the learning rate of the next one.

    Raises:
        ConfigError: if either of them fails.
    """
    step_optimizer(optimizer)
    if schedule is not None:
        step_schedule(schedule)


def step_schedule(schedule: LRScheduler) -> None:
    """Set the learning rate of the next step.

    Raises:
        ConfigError: if the schedule ends before the experience.
    """
    try:
        schedule.step()
    except FAULTS as error:
        raise ConfigError(
            f"scheduler {type(schedule).__name__} fails after a step: {first_line(error)}; make "
            f"it from the number of steps of an experience, as in {EXAMPLE}"
        ) from error


# --------------------------------------------------------------------------- what it will do


def _rates(optimizer: MakeOptimizer, scheduler: MakeSchedule, steps: int) -> Iterator[float]:
    """Yield the learning rate of every step of an experience of `steps` steps.

    Raises:
        ConfigError: if the loop cannot use the schedule, or the schedule ends before the steps.
    """
    own = called(optimizer, [nn.Parameter(torch.zeros(1))])
    schedule = made_schedule(scheduler, own, steps)
    for _ in range(steps):
        yield float(own.param_groups[0]["lr"])
        own.step()
        step_schedule(schedule)


def first_rates(optimizer: MakeOptimizer, scheduler: MakeSchedule, steps: int) -> list[float]:
    """Return the learning rates of the first `steps` steps, or fewer if the schedule ends earlier.

    A schedule of fixed length, such as `OneCycleLR(optimizer, 0.1, total_steps=20)`, has no more.

    Args:
        optimizer: function from parameters to the optimiser.
        scheduler: function from the optimiser and the number of steps to its schedule.
        steps: largest number of rates.

    Raises:
        ConfigError: if the loop cannot use the schedule.
    """
    found: list[float] = []
    try:
        for rate in _rates(optimizer, scheduler, steps):
            found.append(rate)
    except ConfigError:
        if not found:
            raise
    return found


class ReplayedRates:
    """Learning rates of all steps of an experience under a schedule.

    A schedule may be any function, so it is run in advance, once for all blocks.

    Args:
        optimizer: function from parameters to the optimiser.
        scheduler: function from the optimiser and the number of steps to its schedule.
        steps: number of steps of the experience.

    Raises:
        ConfigError: if the loop cannot use the schedule.
    """

    def __init__(self, optimizer: MakeOptimizer, scheduler: MakeSchedule, steps: int) -> None:
        self._made_from = (optimizer, scheduler, steps)
        self.rates = list(_rates(optimizer, scheduler, steps))
        self.text = canonical_text(self.rates)

    def are_of(self, optimizer: object, scheduler: object, steps: int) -> bool:
        """Return True if these rates belong to the same two functions and number of steps."""
        known = self._made_from
        return optimizer is known[0] and scheduler is known[1] and steps == known[2]


def replayed(
    known: ReplayedRates | None,
    optimizer: MakeOptimizer,
    scheduler: MakeSchedule | None,
    steps: int,
) -> ReplayedRates | None:
    """Return the learning rates of all steps of an experience, which are `known` if possible.

    Args:
        known: rates that were computed last; None if there are none.
        optimizer: function from parameters to the optimiser.
        scheduler: function from the optimiser and the number of steps to its schedule; None for a
            constant rate, of which no rates are computed.
        steps: number of steps of the experience.
    """
    if scheduler is None:
        return None
    if known is not None and known.are_of(optimizer, scheduler, steps):
        return known
    return ReplayedRates(optimizer, scheduler, steps)
