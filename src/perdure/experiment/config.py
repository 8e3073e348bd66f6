"""Configuration of a run: a TOML file read into frozen dataclasses, every value checked once.

name = "hospital"
seeds = [0, 1, 2]              # every arm is trained with every seed; or one: seed = 0

[data]
name = "digits"                # or "my_package.module:function", which returns a Dataset
stream = "split"               # or permuted, rotated, blurry, repetition, by_time, by_domain, joint
scenario = "class"
experiences = 5

[model]
name = "mlp"                   # or lstm, gru, decoder, ..., or "my_package.module:function"
hidden = [64]

[training]
optimizer = "Adam"
learning_rate = 0.001
epochs = 10

[training.schedule]            # optional
name = "CosineAnnealingLR"     # a class of torch.optim.lr_scheduler, with its own arguments

[privacy]                      # optional; used by the arms that say private = true
epsilon = 8.0
delta = 1e-5

[federation]                   # optional
clients = 10
rounds = 3

[training.loss]                # optional: another loss; an arm may have its own, loss = {...}
name = "focal"                 # a file in tasks/losses/, and so on
gamma = 2.0                    # and its own fields

[training.adversary]           # optional: train on each record's worst case
name = "fgsm"
epsilon = 0.05

[attack]                       # optional: measure robust accuracy
name = "pgd"                   # a file in adversarial/, an entry point, or "my_package.module:Mine"
epsilon = 0.1                  # and its own fields

[explain]                      # optional
method = "kernel_shap"         # a file in explain/, and so on
records = 6
drift = true                   # measure the drift of reasons in every arm

[fairness]                     # optional: measure groups of test records
attribute = "sex"              # an attribute of the records, as in adult

[start]                        # optional: begin with the parameters of an earlier run
run = "runs/earlier"
new_head = true

[[loggers]]                    # optional: curves of every training while it runs
name = "tensorboard"           # or mlflow, wandb, a file in loggers/, and so on
every = 50                     # and its own fields

[search]                       # optional: what `perdure tune` searches
trials = 30

[search.space]
"training.learning_rate" = [0.001, 1.0]

[[arms]]
strategy = "ewc"               # a file in strategies/, and so on
strength = 100.0               # and its own fields

[[arms]]
name = "strong-ewc"            # a second setting of a strategy has a name of its own
strategy = "ewc"
strength = 1000.0
private = true

[[arms]]
strategy = "combine"           # several strategies in one
parts = [{strategy = "ewc", strength = 10.0}, {strategy = "replay", memory_size = 200}]
"""

import re
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from perdure.contract.combine import Combine
from perdure.contract.strategy import Strategy
from perdure.data.groups import Groups
from perdure.errors import ConfigError, StrategyError
from perdure.experiment.attack_config import AttackConfig
from perdure.experiment.certified import CertificateConfig
from perdure.experiment.data_config import DataConfig
from perdure.experiment.explain_config import ExplainConfig
from perdure.experiment.federation_table import FederationConfig, with_length
from perdure.experiment.field_checks import check
from perdure.experiment.from_tables import (
    build,
    checked_value,
    extension,
    leaves,
    named_option,
)
from perdure.experiment.logger_config import LoggerConfig
from perdure.experiment.loss_config import LossConfig
from perdure.experiment.model_config import BuiltModel
from perdure.experiment.search_config import SearchConfig
from perdure.experiment.start_config import StartConfig
from perdure.experiment.training_config import TrainingConfig
from perdure.experiment.trial_names import arm_name, trial_name
from perdure.models.config import ModelConfig
from perdure.privacy.settings import Privacy
from perdure.strategies import find as find_strategy
from perdure.strategies import names as strategy_names
from perdure.utils.checked_fields import CheckedFields

PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
ALLOWED_NAMES = "letters, digits, . - _, at most 100"
LARGEST = 2**63 - 1
"""Largest whole number of TOML; larger numbers are refused."""

COMBINE = "combine"
"""Value of `strategy` for an arm that combines the strategies in its key `parts`."""


@dataclass(frozen=True, kw_only=True)
class Arm(CheckedFields):
    """One model of the run: a strategy, with or without privacy.

    Args:
        strategy: strategy with the values of its own fields.
        file: strategy name in the config: one of `perdure.strategies.names()`, "combine", or
            "my_package.my_module:MyMethod".
        private: train with differential privacy, as the table `[privacy]` says.
        given_name: name of the arm in results and folders; "" for the strategy's name with -plain
            or -private.
        loss: loss of every record in this arm; None for `training.loss`.
    """

    TABLE: ClassVar[str] = (
        "a table with strategy = NAME, its own fields, private = true or false, and loss"
    )

    strategy: Strategy
    file: str
    private: bool = False
    given_name: str = ""
    loss: LossConfig | None = None

    def __post_init__(self) -> None:
        if self.given_name and not PLAIN_NAME.fullmatch(self.given_name):
            raise ConfigError.of("name", self.given_name, ALLOWED_NAMES)

    @classmethod
    def from_table(cls, table: Mapping[str, Any], where: str) -> "Arm":
        """Find the strategy by its name, and build it from the other fields of the table."""
        options = dict(table)
        private = checked_value(options.pop("private", False), bool, f"{where}.private")
        name = checked_value(options.pop("name", ""), str, f"{where}.name")
        if "name" in table and not PLAIN_NAME.fullmatch(typing.cast(str, name)):
            raise ConfigError.of(f"{where}.name", name, ALLOWED_NAMES)
        loss = None
        if "loss" in options:
            loss = checked_value(options.pop("loss"), LossConfig, f"{where}.loss")
        file, strategy = strategy_of(options, where)
        return cls(
            strategy=strategy,
            file=file,
            private=typing.cast(bool, private),
            given_name=typing.cast(str, name),
            loss=typing.cast(LossConfig | None, loss),
        )

    @property
    def name(self) -> str:
        """Name of the arm in folders and results; see `arm_name`."""
        return self.given_name or arm_name(self.file, private=self.private)


def strategy_of(table: Mapping[str, Any], where: str) -> tuple[str, Strategy]:
    """Return the name of a strategy, and the strategy built from the table's other keys.

    Args:
        table: key `strategy` with the name, and the strategy's fields; for "combine", the key
            `parts` with a list of such tables.
        where: name of the table, for messages.

    Raises:
        ConfigError: for an unknown strategy, for fields that do not fit, and for parts that exclude
            each other.
    """
    if table.get("strategy") != COMBINE:
        return extension(find_strategy, strategy_names, "strategy", table, where)
    _, options = named_option("strategy", table, where, strategy_names())
    parts = options.pop("parts", None)
    if not (isinstance(parts, list) and parts and all(isinstance(each, dict) for each in parts)):
        raise ConfigError.of(f"{where}.parts", parts, "a list of tables, each with strategy = NAME")
    for name, value in options.items():
        raise ConfigError.of(f"{where}.{name}", value, "no further fields beside parts")
    own = [strategy_of(each, f"{where}.parts[{i}]")[1] for i, each in enumerate(parts)]
    try:
        return COMBINE, Combine(*own)
    except StrategyError as error:
        raise ConfigError(f"{where}.parts: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Config(CheckedFields):
    """Configuration of a whole run; the start of this module has an example.

    Args:
        name: name of the run's folder: letters, digits, dots, dashes and underscores; the first
            character is a letter or digit.
        seed: seed of all random numbers except secret noise.
        seeds: train every arm with each of these seeds instead of one; tables and reports then show
            means and standard errors.
        threads: number of torch threads; results are bit-identical for the same number.
        device: device of models and records, such as "cuda".
        processes: number of processes on this machine that divide every batch of a training; the
            result is that of one process, up to rounding.
        data: data set and stream.
        model: model of every arm.
        training: length, optimiser and precision of training.
        private_training: training settings of private arms; they replace all of `training`. None to
            use `training`.
        federation: clients and rounds; left out for one learner.
        privacy: differential privacy of the private arms.
        attack: attack for robust accuracy.
        certificate: certificate of the accuracy that no attack in a ball can lower.
        explain: explainer, and number of test records to explain.
        fairness: groups of test records that are measured at the end, and compared by the monitor.
        start: earlier run whose parameters the models start from; left out for new models.
        loggers: programs that get the curves of every training while it runs; they may change when
            a stopped run continues.
        search: search of `perdure tune`; a run does not use it.
        arms: strategies to train, each with or without privacy.
    """

    name: str
    seed: int = 0
    seeds: tuple[int, ...] = ()
    threads: int = 1
    device: str = "cpu"
    processes: int = 1
    data: DataConfig = field(default_factory=DataConfig)
    model: BuiltModel | ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(epochs=10))
    private_training: TrainingConfig | None = None
    federation: FederationConfig | None = None
    privacy: Privacy | None = None
    attack: AttackConfig | None = None
    certificate: CertificateConfig | None = None
    explain: ExplainConfig | None = None
    fairness: Groups | None = None
    start: StartConfig | None = None
    loggers: tuple[LoggerConfig, ...] = ()
    search: SearchConfig | None = None
    arms: tuple[Arm, ...] = ()

    def __post_init__(self) -> None:
        check(self, "name", lambda value: bool(PLAIN_NAME.fullmatch(value)), ALLOWED_NAMES)
        check(self, "seed", lambda value: 0 <= value < 2**32, "0 to 4294967295")
        check(
            self,
            "seeds",
            lambda each: all(0 <= s < 2**32 for s in each) and len(set(each)) == len(each),
            "different whole numbers, 0 to 4294967295",
        )
        if self.seeds and self.seed:
            raise ConfigError.of("seed", self.seed, "seed or seeds, not both")
        check(self, "threads", lambda value: 1 <= value <= 1024, "1 to 1024")
        check(self, "device", _is_device, "a device of this machine, such as cpu or cuda")
        check(self, "processes", lambda value: 1 <= value <= 1024, "1 to 1024")
        if self.processes > 1 and self.federation:
            allowed = "1 in a federation, whose clients train one after another"
            raise ConfigError.of("processes", self.processes, allowed)
        for name in ("training", "private_training"):
            chosen = getattr(self, name)
            if self.federation and chosen and chosen.blocks > 1:
                allowed = "1 in a federation, whose rounds are the blocks; set federation.rounds"
                raise ConfigError.of(f"{name}.blocks", chosen.blocks, allowed)
            if self.federation and chosen and chosen.validation:
                allowed = "no validation in a federation, whose clients would stop one by one"
                raise ConfigError.of(f"{name}.validation", chosen.validation, allowed)
        if not self.arms:
            raise ConfigError(
                "arms is missing; allowed: one or more [[arms]] tables, each with strategy = NAME"
            )
        if self._any_private and self.privacy is None:
            raise ConfigError(
                "an arm has private = true, but there is no [privacy] table; add one with epsilon "
                "and delta"
            )
        used = "private_training" if self.private_training else "training"
        if self.data.reads_training_records and self.privacy:
            allowed = '"test" with [privacy], the public test records, for scale and columns'
            raise ConfigError.of("data.fit_on", self.data.fit_on, allowed)
        if self.data.resample and self.privacy:
            allowed = (
                "none with [privacy]: records would depend on others, or stand in several rows"
            )
            raise ConfigError.of("data.resample", self.data.resample, allowed)
        if self._any_private:
            _refuse_for_private(self.private_training or self.training, used)
        twice = {arm.name for arm in self.arms if [a.name for a in self.arms].count(arm.name) > 1}
        if twice:
            raise ConfigError.of(
                "arms", sorted(twice), "arms of different names; give each its own name = NAME"
            )

    @property
    def _any_private(self) -> bool:
        return any(arm.private for arm in self.arms)

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """Seeds of the run, in their order."""
        return self.seeds or (self.seed,)

    def of_seed(self, seed: int) -> "Config":
        """Return the config of one seed of this run."""
        return replace(self, seed=seed, seeds=())

    def trial(self, arm: Arm, seed: int) -> str:
        """Return the folder name of a trial, which is an arm with one seed."""
        return trial_name(arm.name, seed if self.seeds else None)


def _refuse_for_private(training: TrainingConfig, used: str) -> None:
    """Refuse settings of a training that private arms may not have.

    Args:
        training: table of the private arms.
        used: name of that table.

    Raises:
        ConfigError: names the setting and the reason.
    """
    if training.validation:
        allowed = "none for private arms, whose records it would read; give [private_training]"
        raise ConfigError.of(f"{used}.validation", training.validation, allowed)
    if training.mixing:
        allowed = "none for private arms: a record would enter two rows; give [private_training]"
        raise ConfigError.of(f"{used}.mixing", training.mixing, allowed)
    refusal = training.defence.defence.PRIVATE_REFUSAL if training.defence else ""
    if training.defence and refusal:
        allowed = f"none of this kind for private arms: {refusal}"
        raise ConfigError.of(f"{used}.defence", training.defence.name, allowed)


def _is_device(name: str) -> bool:
    """Tell if torch can put a tensor on a device of this machine."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):
        return False
    return name != "meta"


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


def parse(text: str, source: str = "") -> Config:
    """Parse and check the text of a TOML file.

    Args:
        text: content of the TOML file.
        source: name of the file, for messages.

    Raises:
        ConfigError: if the text is not a valid config; the message names the file, the field, its
            value and the allowed values.
    """
    return from_table(table_of(text, source), source)


def table_of(text: str, source: str = "") -> dict[str, Any]:
    """Read the text of a TOML file as a table.

    Raises:
        ConfigError: for text that is not TOML.
    """
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{source or 'config'} is not valid TOML ({error}); correct that line"
        ) from None


def from_table(table: Mapping[str, Any], source: str = "") -> Config:
    """Check the content of a config file, and return the config.

    Args:
        table: content of the TOML file, as `tomllib` parses it.
        source: name of the file, for messages.

    Raises:
        ConfigError: if a value is not allowed; the message names the file, the field, its value
            and the allowed values.
    """
    try:
        for where, value in leaves(table):
            if type(value) is int and abs(value) > LARGEST:
                raise ConfigError(
                    f"{where} is a whole number of {value.bit_length()} bits; allowed: up to 63"
                )
        return build(Config, with_length(table), "")
    except ConfigError as error:
        if not source:
            raise
        raise ConfigError(f"{source}: {error}") from error
