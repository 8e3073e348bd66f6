"""Make, check and step the optimiser that a user asked for."""

import copy
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, SparseAdam

from perdure.errors import ConfigError
from perdure.learner.checkpoint import flatten_optimizer
from perdure.types import Params
from perdure.utils.hashing import is_plain
from perdure.utils.optimizer_trial import stepped_copy

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
"""Function from parameters to an optimiser."""

EXAMPLE = "partial(torch.optim.SGD, lr=0.1)"
FAULTS = (TypeError, ValueError, LookupError, ArithmeticError)
"""Errors of torch for options that are not allowed."""


def called(make: MakeOptimizer, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Call the user's function for an optimiser, and map errors of torch.

    Raises:
        ConfigError: if the function fails.
    """
    try:
        return make(parameters)
    except FAULTS as error:
        raise ConfigError(
            f"optimizer(parameters) fails: {first_line(error)}; allowed: a function from "
            f"parameters to an optimiser, such as {EXAMPLE}"
        ) from error


def refuse_unusable(optimizer: object) -> None:
    """Refuse an optimiser that the loop cannot step.

    Raises:
        ConfigError: if the object is no optimiser, or is one that needs losses inside a step, or
            gradients of another kind, or that has tensors as options, which no checkpoint holds.
    """
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise ConfigError.of("optimizer(parameters)", name, "a torch.optim.Optimizer; return one")
    for group in optimizer.param_groups:
        for option, value in group.items():
            if isinstance(value, Tensor):
                allowed = f"a number, {float(value)}"
                raise ConfigError.of(f"optimizer option {option}", value, allowed)
    again = needs_argument(optimizer.step) or hasattr(optimizer, "first_step")
    if again or isinstance(optimizer, SparseAdam):
        raise ConfigError.of(
            "optimizer",
            name,
            "an optimiser that needs one dense gradient per step, such as SGD or Adam",
        )
    if not type(optimizer).__module__.startswith("torch.optim."):
        _try_step(optimizer)


def _try_step(optimizer: Optimizer) -> None:
    """Step a copy of an optimiser of another package, and look at what a checkpoint must hold.

    Raises:
        ConfigError: if it needs more than one gradient, or keeps objects that no checkpoint holds.
    """
    try:
        trial = stepped_copy(optimizer)
    except Exception as error:  # any error of a package
        raise ConfigError(
            f"optimizer {type(optimizer).__name__} cannot step from one gradient: "
            f"{first_line(error)}; allowed: an optimiser that needs one dense gradient per step, "
            f"such as {EXAMPLE}"
        ) from error
    flatten_optimizer(trial)
    for group in trial.param_groups:
        for option, value in group.items():
            if option != "params" and not is_plain(value):
                raise ConfigError.of(
                    f"optimizer option {option}", value, "numbers, text, None and lists of them"
                )


def made_optimizer(make: MakeOptimizer, params: Params) -> Optimizer:
    """Make the optimiser of these parameters; refuse one that the loop cannot use.

    Raises:
        ConfigError: if the result is no optimiser, cannot be stepped by the loop, or has none of
            the parameters.
    """
    made = called(make, params.values())  # type: ignore[arg-type]
    refuse_unusable(made)
    own = {id(value) for value in params.values()}
    held = {id(value) for group in made.param_groups for value in group["params"]}
    if own and not own & held:  # a model without parameters may have any optimiser
        raise ConfigError.of(
            "optimizer",
            f"{type(made).__name__} of other parameters",
            f"an optimiser of the parameters in its argument, such as {EXAMPLE}",
        )
    return made


def step_optimizer(optimizer: Optimizer) -> None:
    """Take one step of the optimiser.

    Raises:
        ConfigError: if the optimiser cannot step with dense gradients on this device.
    """
    try:
        optimizer.step()
    except (TypeError, RuntimeError, AssertionError) as error:
        if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
            raise
        raise ConfigError(
            f"optimizer {type(optimizer).__name__} fails in a step: {first_line(error)}; allowed: "
            f"an optimiser that works with dense gradients on this device, such as {EXAMPLE}"
        ) from error


def needs_argument(step: Callable[..., object]) -> bool:
    """Return True if a method `step` needs arguments, such as a closure or a measured loss."""
    return any(
        each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        for each in inspect.signature(step).parameters.values()
    )


def first_line(error: Exception) -> str:
    """First line of an error's text; the name of its type if it has no text."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


# --------------------------------------------------------------------------- options

Options = list[dict[str, Any]]
"""Options of each group of parameters, such as the learning rate."""


def options_of(optimizer: Optimizer) -> Options:
    """Copy the options of each group of parameters."""
    return [
        {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]


def put_options(optimizer: Optimizer, options: Options) -> None:
    """Give every group exactly these options; momentum and other state do not change.

    This removes the last rate of a schedule, and `initial_lr`, where the next schedule would start.
    """
    for group, wanted in zip(optimizer.param_groups, copy.deepcopy(options), strict=False):
        # other packages count the steps in an option, which goes on with the state
        for name in group.keys() - wanted.keys() - {"params", "step"}:
            del group[name]
        group.update(wanted)
