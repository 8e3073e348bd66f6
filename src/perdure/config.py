"""What a run is asked to do: a TOML file read into frozen dataclasses, every value checked once.

    name = "hospital"
    seed = 0

    [data]
    name = "digits"
    scenario = "class"
    experiences = 5

    [model]
    name = "mlp"
    hidden = [64]

    [training]
    optimizer = "Adam"
    learning_rate = 0.001
    epochs = 10

    [privacy]                      # optional; used by the arms that say private = true
    epsilon = 8.0
    delta = 1e-5

    [federation]                   # optional
    clients = 10
    rounds = 3

    [[arms]]
    strategy = "ewc"               # a file in strategies/
    strength = 100.0               # and its options
    private = false
"""

import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from perdure.errors import ConfigError
from perdure.models import ModelConfig
from perdure.privacy.policy import Privacy
from perdure.strategy import Scenario, Strategy

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which stream.

    Args:
        name: digits, breast-cancer, mnist, cifar10 or adult. root: folder of the data; None for the usual places.
        scenario: task, domain or class. experiences: how many. shuffle_classes: order classes by the run's seed.
    """

    name: str = "digits"
    root: str | None = None
    scenario: Scenario = "class"
    experiences: int = 5
    shuffle_classes: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long and with what an experience is trained.

    Args:
        optimizer: any class of torch.optim. momentum: for those that have one; None for its default.
        epochs, iterations: length of an experience; give one. In a federation, spread over its rounds.
        batch_size: records a step. reset_optimizer: start every experience with a fresh optimiser.
    """

    optimizer: str = "Adam"
    learning_rate: float = 1e-3
    momentum: float | None = None
    epochs: int | None = None
    iterations: int | None = None
    batch_size: int = 32
    reset_optimizer: bool = False

    def __post_init__(self) -> None:
        chosen = getattr(torch.optim, self.optimizer, None)
        if not (isinstance(chosen, type) and issubclass(chosen, Optimizer)):
            known = [n for n in dir(torch.optim) if isinstance(getattr(torch.optim, n), type) and n != "Optimizer"]
            raise ConfigError.of("training.optimizer", self.optimizer, known)
        if (self.epochs is None) == (self.iterations is None):
            given = f"epochs={self.epochs}, iterations={self.iterations}"
            raise ConfigError.of("training", given, "exactly one of epochs and iterations")

    def factory(self) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
        """Return a function from parameters to the optimiser."""
        options = {"lr": self.learning_rate} | ({} if self.momentum is None else {"momentum": self.momentum})
        return partial(getattr(torch.optim, self.optimizer), **options)


@dataclass(frozen=True, kw_only=True)
class FederationConfig:
    """Who takes part.

    Args:
        clients: number of parties. rounds: per experience. fraction: share of the clients asked in a round.
        alpha: of the Dirichlet split by class; small is uneven. min_size: fewest records of a client in an experience.
        engine: `inprocess`, or `ray` for Flower's simulation engine.
    """

    clients: int = 10
    rounds: int = 3
    fraction: float = 1.0
    alpha: float = 1.0
    min_size: int = 10
    engine: Literal["inprocess", "ray"] = "inprocess"

    def __post_init__(self) -> None:
        for name in ("clients", "rounds", "min_size"):
            if getattr(self, name) < 1:
                raise ConfigError.of(f"federation.{name}", getattr(self, name), "1 or more")


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """The attack that robust accuracy is measured under.

    Args:
        name: pgd or fgsm. epsilon: radius in units of the inputs (pixels in [0, 1]). norm: linf or l2. steps: of pgd.
    """

    name: Literal["pgd", "fgsm"] = "pgd"
    epsilon: float = 0.1
    norm: Literal["linf", "l2"] = "linf"
    steps: int = 10


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One model of the run: a strategy, with or without privacy."""

    strategy: Strategy
    file: str
    private: bool = False

    @property
    def name(self) -> str:
        """Folder and row name."""
        return f"{self.file}-{'private' if self.private else 'plain'}"


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run; see the example at the head of this module.

    Args:
        name: of the run's folder. seed: of everything but secret noise. threads: torch threads; results are
            bit-identical for the same number. explain: test records explained by SHAP after the first and the last
            experience.
        private_training: training of the private arms, where it differs.
    """

    name: str
    seed: int = 0
    threads: int = 1
    explain: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(epochs=10))
    private_training: TrainingConfig | None = None
    federation: FederationConfig | None = None
    privacy: Privacy | None = None
    attack: AttackConfig | None = None
    arms: tuple[Arm, ...] = ()

    def __post_init__(self) -> None:
        if not self.arms:
            raise ConfigError("arms is missing; allowed: one or more [[arms]] tables, each with strategy = NAME")
        if any(arm.private for arm in self.arms) and self.privacy is None:
            raise ConfigError("an arm says private = true without a [privacy] table; add one with epsilon and delta")
        twice = {arm.name for arm in self.arms if [a.name for a in self.arms].count(arm.name) > 1}
        if twice:
            raise ConfigError.of("arms", sorted(twice), "every strategy once with and once without private = true")


def read(path: Path) -> Config:
    """Read and check a TOML file.

    Raises:
        ConfigError: one line naming file, field, value and what is allowed.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"config {path} cannot be read ({error.strerror}); give the path of a TOML file") from None
    return parse(text, source=str(path))


def parse(text: str, source: str = "config") -> Config:
    """Check the text of a TOML file."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not TOML: {error}") from None
    arms = table.pop("arms", [])
    if not isinstance(arms, list):
        raise ConfigError.of("arms", arms, "[[arms]] tables with strategy = NAME")
    return build(Config, table, "", arms=tuple(_arm(entry, i) for i, entry in enumerate(arms)))


def _arm(entry: object, index: int) -> Arm:
    from perdure.strategies import find

    where = f"arms[{index}]"
    if not isinstance(entry, dict) or not isinstance(entry.get("strategy"), str):
        raise ConfigError.of(where, entry, "a table with strategy = NAME, its options, and private = true or false")
    options = dict(entry)
    name, private = options.pop("strategy"), options.pop("private", False)
    if not isinstance(private, bool):
        raise ConfigError.of(f"{where}.private", private, "true or false")
    return Arm(strategy=build(find(name), options, where), file=name, private=private)


def build(cls: type[T], table: Mapping[str, Any], where: str, **ready: object) -> T:
    """Make a dataclass from a TOML table: unknown fields, missing fields and wrong types are refused by name."""
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls) if f.init}  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    for name in table:
        if name not in known or name in ready:
            raise ConfigError.of(f"{prefix}{name}", table[name], f"one of the fields {', '.join(known)}")
    required = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in required if name not in table and name not in ready]
    if missing:
        raise ConfigError(f"{prefix}{missing[0]} is missing; allowed: {_describe(hints[missing[0]])}")
    values = {name: _value(value, hints[name], f"{prefix}{name}") for name, value in table.items()}
    return cls(**values, **ready)


def _value(value: object, hint: Any, where: str) -> object:
    """Check one TOML value against a type: numbers, text, choices, lists as tuples, tables as dataclasses."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if isinstance(option, type) and hasattr(option, "__dataclass_fields__") and isinstance(value, dict):
            return build(option, value, where)
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if typing.get_origin(option) is tuple and isinstance(value, list):
            return tuple(_value(item, typing.get_args(option)[0], f"{where}[{i}]") for i, item in enumerate(value))
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if option in (int, str, bool) and type(value) is option:
            return value
    raise ConfigError.of(where, value, _describe(hint))


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "nothing"}
    if isinstance(hint, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint) if option is not type(None))
    if typing.get_origin(hint) is Literal:
        return ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"a list of which each is {_describe(typing.get_args(hint)[0])}"
    return names.get(hint, f"a [{getattr(hint, '__name__', hint)}] table")
