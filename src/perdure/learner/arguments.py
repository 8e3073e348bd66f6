"""Checks of the arguments of a `Learner`, before anything is built from them."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from torch import device, nn
from torch.optim import Optimizer

from perdure.adversarial.base import Attack
from perdure.adversarial.defences.base import Defence
from perdure.contract.strategy import Strategy
from perdure.data.augmentation import Views
from perdure.data.experience import Stream
from perdure.data.mixing import Mixing
from perdure.errors import ConfigError
from perdure.privacy.settings import Privacy
from perdure.strategies import find, names
from perdure.tasks.losses import Loss

KINDS: dict[str, tuple[type, str]] = {
    "model": (nn.Module, "a torch.nn.Module"),
    "privacy": (Privacy, "None, or perdure.Privacy, such as Privacy(epsilon=3.0)"),
    "adversary": (Attack, "None, or an instance of an attack, such as PGD()"),
    "views": (Views, "None, or perdure.data.Views"),
    "mixing": (Mixing, "None, or perdure.data.Mixup or CutMix, such as Mixup(alpha=0.2)"),
    "defence": (Defence, "None, or a defence, such as TRADES()"),
    "loss": (Loss, "None, or a loss of perdure.tasks.losses, such as Focal(gamma=2.0)"),
}
"""Required type of each argument, and its description for messages."""
OPTIONAL = ("privacy", "adversary", "views", "mixing", "defence", "loss")
PLAIN = (
    "seed",
    "device",
    "reset_optimizer",
    "callbacks",
    "show_progress",
    "client",
    "owner",
    "folder",
    "warm_start",
    "averaging",
    "sharpness",
    "l1",
    "l2",
    "gradient_noise",
    "weight_noise",
    "validation",
    "group_weights",
    "fine_tune",
    "compile",
)
"""Arguments that are checked by their annotations alone; the folder may also be text."""
LARGEST = 1e9
"""Largest factor, deviation and norm; above it, float32 overflows in training."""
NOT_NEGATIVE = ("l1", "l2", "gradient_noise", "weight_noise")
COUNTS = (
    "epochs",
    "iterations",
    "blocks",
    "evaluate_every",
    "batch_size",
    "micro_batch_size",
    "processes",
)


def check_arguments(given: Mapping[str, Any]) -> None:
    """Refuse arguments of a `Learner` that have a wrong type or a value that is not allowed.

    Args:
        given: name to value.

    Raises:
        ConfigError: names the argument, the given value, and the allowed values.
    """
    for name, (kind, allowed) in KINDS.items():
        value = given[name]
        if not isinstance(value, kind) and not (value is None and name in OPTIONAL):
            raise ConfigError.of(name, value, allowed)
    _check_strategy(given["strategy"])
    if isinstance(given["optimizer"], Optimizer) or not callable(given["optimizer"]):
        raise ConfigError.of(
            "optimizer",
            type(given["optimizer"]).__name__,
            "a function from parameters to an optimiser, such as partial(torch.optim.SGD, lr=0.1)",
        )
    scheduler = given.get("scheduler")
    if scheduler is not None and not callable(scheduler):
        raise ConfigError.of(
            "scheduler",
            type(scheduler).__name__,
            "None, or a function from optimiser and number of steps of an experience, such as "
            "lambda optimizer, steps: CosineAnnealingLR(optimizer, T_max=steps)",
        )
    if (given["epochs"] is None) == (given["iterations"] is None):
        raise ConfigError.of(
            "length of an experience",
            f"epochs={given['epochs']}, iterations={given['iterations']}",
            "exactly one of epochs and iterations",
        )
    for name in COUNTS:
        value = given.get(name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (whole and value >= 1):
            raise ConfigError.of(name, value, "a whole number, 1 or more")
    for name in NOT_NEGATIVE:
        value = given.get(name, 0.0)
        if isinstance(value, int | float) and not 0 <= value <= LARGEST:
            raise ConfigError.of(name, value, f"a number from 0 to {LARGEST:g}")
    _check_norm(given.get("max_grad_norm"))
    if given["precision"] not in ("float32", "bfloat16"):
        raise ConfigError.of("precision", given["precision"], ("float32", "bfloat16"))
    if given["views"] and given["adversary"]:
        allowed = "None with an adversary, which changes the record itself"
        raise ConfigError.of("views", given["views"], allowed)
    if given["mixing"] and given["defence"]:
        allowed = "None with a defence, which needs rows of one class"
        raise ConfigError.of("mixing", given["mixing"], allowed)


def _check_norm(value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and 0 < value <= LARGEST):  # type: ignore[operator]
        raise ConfigError.of(
            "max_grad_norm", value, f"None, or a finite number above 0, at most {LARGEST:g}"
        )


def _check_strategy(strategy: object) -> None:
    """Refuse a strategy that is a name, a class or anything else than an instance."""
    # an object that acts as a strategy, as in an audit, may be of another class
    if callable(getattr(strategy, "losses", None)) and not isinstance(strategy, type):
        return
    kind: object = strategy
    if isinstance(strategy, str) and strategy in names():
        kind = find(strategy)
    written = "EWC(strength=100.0)"
    if isinstance(kind, type) and issubclass(kind, Strategy):
        needed = [
            f"{each.name}={getattr(kind.example(), each.name)!r}"
            for each in fields(kind)
            if each.init and each.default is MISSING and each.default_factory is MISSING
        ]
        written = f"{kind.__name__}({', '.join(needed)})"
    raise ConfigError.of("strategy", strategy, f"an instance of a strategy, such as {written}")


def plain_model(
    model: nn.Module, privacy: Privacy | None, place: str | device, *, compiled: bool = False
) -> nn.Module:
    """Return the model on its device, without wrappers of Opacus.

    Raises:
        ConfigError: if this machine does not have the device.
    """
    if type(model).__module__.startswith("opacus."):
        from perdure.privacy.opacus.migration import unwrapped

        model = unwrapped(model, known=not privacy or bool(privacy.spent))
    on_device(model, place)
    if compiled:
        if privacy:
            allowed = (
                "False under privacy: other code is made for another number of rows, which the "
                "guard cannot test"
            )
            raise ConfigError.of("compile", True, allowed)
        model.compile()  # at its first pass; names and values of its parameters stay
    return model


def on_device(model: nn.Module, given: str | device) -> None:
    """Move a model to a device.

    Raises:
        ConfigError: if torch does not know the device, or this machine does not have it.
    """
    try:
        model.to(given)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"device = {str(given)!r} cannot be used: {reason}; allowed: 'cpu', or a device that "
            "torch finds on this machine"
        ) from error


def check_stream(stream: object) -> None:
    """Refuse a value that is not a `Stream`."""
    if not isinstance(stream, Stream):
        raise ConfigError.of(
            "stream",
            type(stream).__name__,
            "a perdure.Stream; perdure.data.split(dataset, experiences=5) makes a stream from a "
            "data set",
        )
