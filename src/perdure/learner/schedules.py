"""Learning-rate schedules: one for every experience, made from its number of steps."""

from typing import Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from perdure.errors import ConfigError
from perdure.learner.optimizers import (
    FAULTS,
    MakeOptimizer,
    called,
    first_line,
    needs_argument,
    step_optimizer,
)
from perdure.utils.hashing import canonical_text

EXAMPLE = "lambda optimizer, steps: CosineAnnealingLR(optimizer, T_max=steps)"


STEPS_TRIED = 100
"""Steps for which a schedule is tried before the length of an experience is known."""


class MakeSchedule(Protocol):
    """From an optimiser and the number of steps of an experience to a schedule."""

    def __call__(self, optimizer: Optimizer, /, *, steps: int) -> LRScheduler:
        """Return the schedule of one experience, which is stepped after every step.

        Args:
            optimizer: with the options that it was made with.
            steps: of the experience, 1 or more.
        """
        ...


def made_schedule(make: MakeSchedule, optimizer: Optimizer, steps: int) -> LRScheduler:
    """Return the schedule of an experience; refuse one that the loop cannot use.

    Raises:
        ConfigError: where the maker does not take `steps`, or returns no schedule of this optimiser
            that follows from the number of the step alone.
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
        optimizer: from parameters to the optimiser.
        scheduler: from the optimiser and the number of steps to its schedule.
        steps: of an experience; None for `STEPS_TRIED`.
    """
    own = called(optimizer, [nn.Parameter(torch.zeros(1))])
    made_schedule(scheduler, own, steps or STEPS_TRIED)


def take_step(optimizer: Optimizer, schedule: LRScheduler | None) -> None:
    """Take a step of the optimiser, and set the learning rate of the next one.

    Raises:
        ConfigError: where either of them fails.
    """
    step_optimizer(optimizer)
    if schedule is not None:
        step_schedule(schedule)


def step_schedule(schedule: LRScheduler) -> None:
    """Set the learning rate of the next step.

    Raises:
        ConfigError: where the schedule is over before the experience.
    """
    try:
        schedule.step()
    except FAULTS as error:
        raise ConfigError(
            f"scheduler {type(schedule).__name__} fails after a step: {first_line(error)}; make "
            f"it from the number of steps of an experience, as in {EXAMPLE}"
        ) from error


# --------------------------------------------------------------------------- what it will do


class ReplayedRates:
    """Learning rates of the steps of an experience under a schedule.

    A schedule may be a function that no state holds, so it is run, once for all blocks.

    Args:
        optimizer: from parameters to the optimiser.
        scheduler: from the optimiser and the number of steps to its schedule.
        steps: of the experience.

    Raises:
        ConfigError: for a schedule that the loop cannot use.
    """

    def __init__(self, optimizer: MakeOptimizer, scheduler: MakeSchedule, steps: int) -> None:
        self._made_from = (optimizer, scheduler, steps)
        own = called(optimizer, [nn.Parameter(torch.zeros(1))])
        schedule = made_schedule(scheduler, own, steps)
        self.rates: list[float] = []
        for _ in range(steps):
            self.rates.append(float(own.param_groups[0]["lr"]))
            own.step()
            step_schedule(schedule)
        self.text = canonical_text(self.rates)

    def are_of(self, optimizer: object, scheduler: object, steps: int) -> bool:
        """Return whether these very makers are replayed here, for as many steps."""
        known = self._made_from
        return optimizer is known[0] and scheduler is known[1] and steps == known[2]
