"""Facts of a run's config that are needed to read its ledgers.

They are read from the TOML file directly: a config may name strategies of any module, and checking
a ledger must neither need nor run this code.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perdure.errors import ConfigError
from perdure.experiment.config import read_text
from perdure.experiment.federation_table import FederationConfig
from perdure.experiment.trial_names import arm_name, trial_name


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Facts of a run's config about its privacy.

    Args:
        delta: delta of the table `[privacy]`; None if the config does not have it.
        seed: seed of simulated noise; None if noise is secret.
        plain_arms: names of the arms that are trained without privacy, one for every seed.
        private_arms: names of the arms that are trained with privacy, one for every seed.
        clients: number of clients of the federation; 0 without a federation.
    """

    delta: float | None
    seed: int | None
    plain_arms: tuple[str, ...]
    private_arms: tuple[str, ...]
    clients: int


def read_facts(path: Path) -> RunFacts:
    """Read the facts of a config; no module that it names is imported.

    Raises:
        ConfigError: if the file cannot be read, or its fields are not those of a config.
    """
    try:
        table = tomllib.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML ({error}); correct that line") from None
    privacy = _table(table.get("privacy", {}), f"{path}: privacy")
    arms = table.get("arms", [])
    if not isinstance(arms, list):
        raise ConfigError.of(f"{path}: arms", arms, "[[arms]] tables")
    rows = [_table(arm, f"{path}: arms") for arm in arms]
    given = table.get("seeds", [])
    if not isinstance(given, list):
        raise ConfigError.of(f"{path}: seeds", given, "a list of whole numbers")
    seeds = [_number(seed, int, f"{path}: seeds") for seed in given] or [None]
    federation = table.get("federation")
    clients = 0
    if federation is not None:
        own = _table(federation, f"{path}: federation").get("clients")
        clients = _number(own, int, f"{path}: federation.clients") or FederationConfig.clients
    return RunFacts(
        delta=_number(privacy.get("delta"), float, f"{path}: privacy.delta"),
        seed=_number(privacy.get("seed"), int, f"{path}: privacy.seed"),
        plain_arms=_names(rows, seeds, private=False),
        private_arms=_names(rows, seeds, private=True),
        clients=clients,
    )


def _names(
    rows: list[dict[str, Any]], seeds: Sequence[int | None], *, private: bool
) -> tuple[str, ...]:
    return tuple(
        trial_name(_arm(row, private), seed)
        for seed in seeds
        for row in rows
        if bool(row.get("private", False)) == private
    )


def _arm(row: Mapping[str, Any], private: bool) -> str:
    return str(row.get("name") or arm_name(str(row.get("strategy", "")), private=private))


def _table(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError.of(where, value, "a table")
    return value


def _number(value: object, kind: type, where: str) -> Any:
    """Return a number of the wanted type; None if the field is missing."""
    if value is not None and type(value) is not kind:
        raise ConfigError.of(where, value, "a number")
    return value
