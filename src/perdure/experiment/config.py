"""Configuration of a run: a TOML file read into frozen dataclasses, every value checked once.

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

[training.adversary]           # optional: train on each record's worst case
name = "fgsm"
epsilon = 0.05

[attack]                       # optional: measure robust accuracy
name = "pgd"                   # a file in adversarial/, an entry point, or "my_package.module:Mine"
epsilon = 0.1                  # and its own fields

[explain]                      # optional
method = "kernel_shap"         # a file in explain/, and so on
records = 6

[[arms]]
strategy = "ewc"               # a file in strategies/, and so on
strength = 100.0               # and its own fields
private = false
"""

import inspect
import re
import tomllib
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from perdure.adversarial import Attack
from perdure.adversarial import find as find_attack
from perdure.adversarial import names as attack_names
from perdure.contract.strategy import Strategy
from perdure.data.datasets.registry import find as find_dataset
from perdure.data.experience import Stream
from perdure.errors import ConfigError
from perdure.experiment.from_tables import build, checked_value, extension, leaves, placed
from perdure.explain import Explainer
from perdure.explain import find as find_explainer
from perdure.explain import names as explainer_names
from perdure.models.config import ModelConfig
from perdure.privacy.settings import Privacy
from perdure.strategies import find as find_strategy
from perdure.strategies import names as strategy_names
from perdure.types import Scenario
from perdure.utils.checked_fields import CheckedFields
from perdure.utils.chunking import row_slices

NEED_MORE = ("LBFGS", "SparseAdam", "Muon")
"""Optimisers that need several gradients per step, or sparse gradients, or matrices only."""
OPTIMIZERS = tuple(
    name
    for name, value in vars(torch.optim).items()
    if isinstance(value, type)
    and issubclass(value, Optimizer)
    and value is not Optimizer
    and name not in NEED_MORE
)
LARGEST = 2**63 - 1
"""Largest whole number of TOML; larger numbers are refused."""


def check(config: object, names: str, good: Callable[[Any], bool], allowed: str) -> None:
    """Refuse a field of a config that is given and has a value that is not allowed.

    Args:
        config: config to check.

    Raises:
        ConfigError: names the first such field.
    """
    for name in names.split():
        value = getattr(config, name)
        if value is not None and not good(value):
            raise ConfigError.of(name, value, allowed)


def counts(value: int) -> bool:
    """Return True if a count is positive and small enough that a run can end."""
    return 1 <= value <= 10**9


@dataclass(frozen=True, kw_only=True)
class DataConfig(CheckedFields):
    """Data set and split of a run.

    Args:
        name: name of a data set: digits, breast-cancer, mnist, cifar10, adult, or "module:name".
        root: folder of the data; None for the default folders.
        scenario: task, domain or class.
        experiences: number of experiences, if `increments` is not given.
        increments: number of new classes in each experience; None for equal numbers.
        chunk: number of records of the pieces into which every experience is cut, each trained once
            (online); under privacy their declared size. None for whole experiences.
        shuffle_classes: True to order the classes at random, by the run's seed.
        declared_size: public number of training records; None to declare the actual number.
    """

    name: str = "digits"
    root: str | None = None
    scenario: Scenario = "class"
    experiences: int = 5
    increments: tuple[int, ...] | None = None
    chunk: int | None = None
    shuffle_classes: bool = False
    declared_size: int | None = None

    def __post_init__(self) -> None:
        find_dataset(self.name, field="name")
        if self.declared_size is not None:
            check(self, "declared_size", counts, "1 to 1000000000")
        check(self, "experiences chunk", counts, "1 to 1000000000")
        allowed = "numbers of new classes, each from 1, and at least one of them"
        check(self, "increments", lambda each: bool(each) and all(map(counts, each)), allowed)


@dataclass(frozen=True, kw_only=True)
class AttackConfig(CheckedFields):
    """Attack in a config: its name and its settings.

    Args:
        name: one of `perdure.adversarial.names()`, or "my_package.my_module:MyAttack".
        attack: the attack with its own fields.
        bounds_given: True if the table gives bounds. If not, inputs are limited to [0, 1] if all
            (public) test inputs are in that range, and have no limits otherwise.
    """

    TABLE: ClassVar[str] = "a table with name = NAME and the attack's own fields"

    name: str
    attack: Attack
    bounds_given: bool = True

    @classmethod
    def from_table(cls, table: Mapping[str, Any], where: str) -> "AttackConfig":
        """Find the attack by its name, and build it from the other fields of the table."""
        name, attack = extension(find_attack, attack_names, "name", table, where)
        return cls(name=name, attack=attack, bounds_given="bounds" in table)

    def on(self, stream: Stream) -> Attack:
        """Return the attack with the bounds for a stream's inputs."""
        if self.bounds_given:
            return self.attack
        unit = all(
            bool(((rows >= 0) & (rows <= 1)).all())
            for e in stream
            for rows in (e.test.inputs[piece] for piece in row_slices(e.test.inputs))
        )
        return replace(self.attack, bounds=(0.0, 1.0) if unit else None)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(CheckedFields):
    """Length, optimiser and precision of training on an experience.

    Args:
        optimizer: name of a class of torch.optim.
        learning_rate: learning rate of the optimiser.
        momentum: momentum, for optimisers that have it; None for their default.
        epochs: number of passes over the records of an experience, in a federation divided over its
            rounds; give this or `iterations`.
        iterations: number of steps of an experience, in a federation divided over its rounds.
        batch_size: number of records per step.
        reset_optimizer: True to start every experience with a new optimiser.
        precision: precision of the passes through the model in training.
        adversary: attack on every batch before its gradient (adversarial training); None for none.
    """

    optimizer: str = "Adam"
    learning_rate: float = 1e-3
    momentum: float | None = None
    epochs: int | None = None
    iterations: int | None = None
    batch_size: int = 32
    reset_optimizer: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    adversary: AttackConfig | None = None

    def __post_init__(self) -> None:
        check(self, "optimizer", OPTIMIZERS.__contains__, ", ".join(OPTIMIZERS))
        check(
            self,
            "learning_rate",
            lambda value: 0 < value <= 1e6,
            "a number above 0 and at most 1e6",
        )
        check(self, "momentum", lambda value: 0 <= value < 1, "a number from 0 to below 1")
        check(self, "epochs iterations batch_size", counts, "1 to 1000000000")
        if (
            self.momentum is not None
            and "momentum" not in inspect.signature(self._class).parameters
        ):
            known = [
                name
                for name in OPTIMIZERS
                if "momentum" in inspect.signature(vars(torch.optim)[name]).parameters
            ]
            raise ConfigError.of(
                "momentum",
                self.momentum,
                f"no momentum for {self.optimizer}; only {', '.join(known)} have momentum",
            )
        if (self.epochs is None) == (self.iterations is None):
            given = f"epochs = {self.epochs} with iterations = {self.iterations}"
            raise ConfigError(f"{given} is not allowed; allowed: exactly one of the two")

    def factory(self) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
        """Return a function from parameters to the optimiser."""
        options = {"lr": self.learning_rate} | (
            {} if self.momentum is None else {"momentum": self.momentum}
        )
        return partial(self._class, **options)

    @property
    def _class(self) -> Callable[..., Optimizer]:
        chosen: Callable[..., Optimizer] = getattr(torch.optim, self.optimizer)
        return chosen


@dataclass(frozen=True, kw_only=True)
class FederationConfig(CheckedFields):
    """Clients, rounds and split of a federation.

    Args:
        clients: number of clients.
        rounds: number of rounds per experience.
        fraction: share of the clients that train in a round.
        alpha: concentration of the Dirichlet split by class; a small number gives uneven clients.
        min_size: smallest number of records of a client in an experience.
        engine: `inprocess`, or `ray` for Flower's simulation engine.
    """

    clients: int = 10
    rounds: int = 3
    fraction: float = 1.0
    alpha: float = 1.0
    min_size: int = 10
    engine: Literal["inprocess", "ray"] = "inprocess"

    def __post_init__(self) -> None:
        check(self, "clients rounds min_size", counts, "1 to 1000000000")
        check(self, "fraction", lambda value: 0 < value <= 1, "a number above 0 and at most 1")
        check(self, "alpha", lambda value: 0 < value <= 1e9, "a number above 0 and at most 1e9")


@dataclass(frozen=True, kw_only=True)
class ExplainConfig(CheckedFields):
    """Explanations of predictions after the first and the last experience.

    Args:
        method: one of `perdure.explain.names()`, or "my_package.my_module:MyExplainer".
        explainer: the explainer with its own fields.
        records: number of test records of the first experience that are explained.
    """

    TABLE: ClassVar[str] = "a table with method = NAME, records, and the explainer's own fields"

    method: str
    explainer: Explainer
    records: int = 6

    def __post_init__(self) -> None:
        check(self, "records", counts, "1 to 1000000000")

    @classmethod
    def from_table(cls, table: Mapping[str, Any], where: str) -> "ExplainConfig":
        """Find the explainer by its name, and build it from the other fields of the table."""
        options = dict(table)
        records = checked_value(options.pop("records", cls.records), int, f"{where}.records")
        method, explainer = extension(find_explainer, explainer_names, "method", options, where)
        try:
            return cls(method=method, explainer=explainer, records=typing.cast(int, records))
        except ConfigError as error:
            raise ConfigError(placed(str(error), where, ("records",))) from None


@dataclass(frozen=True, kw_only=True)
class Arm(CheckedFields):
    """One model of the run: a strategy, with or without privacy.

    Args:
        strategy: the strategy with its own fields.
        file: name of the strategy: one of `perdure.strategies.names()`, or
            "my_package.my_module:MyMethod".
        private: True to train it with the run's privacy.
    """

    TABLE: ClassVar[str] = (
        "a table with strategy = NAME, its own fields, and private = true or false"
    )

    strategy: Strategy
    file: str
    private: bool = False

    @classmethod
    def from_table(cls, table: Mapping[str, Any], where: str) -> "Arm":
        """Find the strategy by its name, and build it from the other fields of the table."""
        options = dict(table)
        private = checked_value(options.pop("private", False), bool, f"{where}.private")
        file, strategy = extension(find_strategy, strategy_names, "strategy", options, where)
        return cls(strategy=strategy, file=file, private=typing.cast(bool, private))

    @property
    def name(self) -> str:
        """Name of the arm, used for its folder and its row of the result."""
        return arm_name(self.file, private=self.private)


def arm_name(file: str, *, private: bool) -> str:
    """Name an arm: "my_package.my_module:Mine" gives my_package.my_module.Mine-private."""
    safe = re.sub(r"[^A-Za-z0-9._-]", ".", file)
    return f"{safe}-{'private' if private else 'plain'}"


@dataclass(frozen=True, kw_only=True)
class Config(CheckedFields):
    """Configuration of a whole run; the start of this module has an example.

    Args:
        name: name of the run's folder: letters, digits, dots, dashes and underscores; the first
            character is a letter or digit.
        seed: seed of all random numbers except secret noise.
        threads: number of torch threads; results are bit-identical for the same number.
        private_training: training settings of private arms; they replace all of `training`. None to
            use `training`.
        attack: attack for robust accuracy.
        explain: explainer, and number of test records to explain.
    """

    name: str
    seed: int = 0
    threads: int = 1
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(epochs=10))
    private_training: TrainingConfig | None = None
    federation: FederationConfig | None = None
    privacy: Privacy | None = None
    attack: AttackConfig | None = None
    explain: ExplainConfig | None = None
    arms: tuple[Arm, ...] = ()

    def __post_init__(self) -> None:
        plain = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}").fullmatch
        check(
            self,
            "name",
            lambda value: plain(value) is not None,
            "letters, digits, . - _, at most 100",
        )
        check(self, "seed", lambda value: 0 <= value < 2**32, "0 to 4294967295")
        check(self, "threads", lambda value: 1 <= value <= 1024, "1 to 1024")
        if not self.arms:
            raise ConfigError(
                "arms is missing; allowed: one or more [[arms]] tables, each with strategy = NAME"
            )
        if any(arm.private for arm in self.arms) and self.privacy is None:
            raise ConfigError(
                "an arm has private = true, but there is no [privacy] table; add one with epsilon "
                "and delta"
            )
        twice = {arm.name for arm in self.arms if [a.name for a in self.arms].count(arm.name) > 1}
        if twice:
            raise ConfigError.of(
                "arms", sorted(twice), "every strategy once with and once without private = true"
            )


def read(path: Path | str) -> Config:
    """Read and check a TOML file.

    Raises:
        ConfigError: if the file is not a valid config; the message names the file, the field, its
            value and the allowed values.
    """
    return parse(read_text(Path(path)), source=str(path))


def read_text(path: Path) -> str:
    """Read the text of a config file.

    Raises:
        ConfigError: if the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or str(error)
    except ValueError as error:
        reason = f"not UTF-8 text: {error}"
    raise ConfigError(f"config {path} cannot be read ({reason}); give the path of a TOML file")


def parse(text: str, source: str = "config") -> Config:
    """Parse and check the text of a TOML file.

    Raises:
        ConfigError: if the text is not a valid config; the message names the field, its value and
            the allowed values.
    """
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is not TOML: {error}") from None
    for where, value in leaves(table):
        if type(value) is int and abs(value) > LARGEST:
            raise ConfigError(
                f"{where} is a whole number of {value.bit_length()} bits; allowed: up to 63"
            )
    return build(Config, table, "")
