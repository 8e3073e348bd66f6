"""Remedies of findings, applied to a config: a new config, never a change of a live model."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from perdure.doctor import Finding
from perdure.doctor.finding import in_order
from perdure.errors import ConfigError
from perdure.experiment.config import Config, from_table, table_of
from perdure.experiment.model_config import BuiltModel
from perdure.experiment.overrides import set_path, toml_text
from perdure.utils.checked_fields import CheckedFields

AGGREGATOR = "federation.aggregator"


@dataclass(frozen=True, kw_only=True)
class Healed(CheckedFields):
    """Config with the remedies of one cause.

    Args:
        config: TOML text of the new config, or a `Config`, as it was given.
        cause: cause of the findings whose remedies were applied; "" if no remedy could be applied.
        rules: rules of these findings.
        changes: changed settings, from the path of a setting to its new value.
        refused: findings whose remedies were not applied, from the rule to the reason.
    """

    config: str | Config
    cause: str
    rules: tuple[str, ...]
    changes: Mapping[str, object]
    refused: Mapping[str, str]


def healed(config: str | Config, findings: Iterable[Finding], *, source: str = "") -> Healed:
    """Apply the remedies of the first cause that has any to a config, and check the result.

    A remedy that the config does not allow, or that changes nothing, is left out with its reason.
    Findings of later causes wait, because the repair of the first one may remove them.

    Args:
        config: TOML text of the config, or the config.
        findings: findings of one or several arms.
        source: name of the file, for messages.

    Raises:
        ConfigError: if the text is not a valid config.
    """
    current = table_of(config, source) if isinstance(config, str) else config
    if isinstance(current, dict):
        from_table(current, source)
    cause = ""
    rules: list[str] = []
    changes: dict[str, object] = {}
    refused: dict[str, str] = {}
    for finding in in_order(list(findings)):
        if cause and finding.cause != cause:
            refused.setdefault(finding.rule, f"waits for the repair of {cause!r}")
            continue
        new = {p: v for p, v in finding.remedy.changes.items() if p not in changes}
        if not new:
            told = "no setting of a config applies it" if not finding.remedy.changes else "done"
            refused.setdefault(finding.rule, told)
            continue
        try:
            after = _applied(current, new, source)
        except ConfigError as error:
            refused.setdefault(finding.rule, str(error))
            continue
        if after == current:
            refused.setdefault(finding.rule, "the config has these settings already")
            continue
        current = after
        cause = finding.cause
        rules.append(finding.rule)
        changes |= new
    new_config = toml_text(current) if isinstance(current, dict) else current
    return Healed(
        config=new_config if cause else config,
        cause=cause,
        rules=tuple(dict.fromkeys(rules)),
        changes=changes,
        refused={rule: told for rule, told in refused.items() if told != "done"},
    )


def _applied(
    config: dict[str, Any] | Config, changes: Mapping[str, object], source: str
) -> dict[str, Any] | Config:
    """Return a changed copy of a config, after a check of all its values."""
    if isinstance(config, Config):
        config = _with_own_training(config, changes)
        config = _with_other_aggregator(config, changes)
        for path, value in changes.items():
            config = _replaced(config, path.split("."), value, path)
        return config
    table = copy.deepcopy(config)
    arms = table.get("arms", [])
    if _divides(changes, [bool(arm.get("private")) for arm in arms]):
        table.setdefault("private_training", copy.deepcopy(table.get("training", {"epochs": 10})))
    federation = table.get("federation", {})
    if changes.get(AGGREGATOR) not in (None, federation.get("aggregator")):
        # options belong to one aggregator, and another one would refuse them
        federation.pop("aggregator_options", None)
    for path, value in changes.items():
        set_path(table, path, value)
    from_table(table, source)
    return table


def _with_own_training(config: Config, changes: Mapping[str, object]) -> Config:
    if config.private_training or not _divides(changes, [arm.private for arm in config.arms]):
        return config
    return replace(config, private_training=config.training)


def _with_other_aggregator(config: Config, changes: Mapping[str, object]) -> Config:
    """Return the config with a changed aggregator, without the options of the former one."""
    federation = config.federation
    name = changes.get(AGGREGATOR)
    if federation is None or name in (None, federation.aggregator):
        return config
    changed = replace(federation, aggregator=str(name), aggregator_options={})
    return replace(config, federation=changed)


def _divides(changes: Mapping[str, object], private: list[bool]) -> bool:
    """Return True if changes of the training are for some arms only: the private, or the others."""
    tables = {path.partition(".")[0] for path in changes}
    return len(set(private)) == 2 and bool(tables & {"training", "private_training"})


def _replaced(config: Any, places: list[str], value: object, path: str) -> Any:
    """Return a copy of a nested setting with another value at a path."""
    name, *rest = places
    if isinstance(config, BuiltModel):
        return replace(config, options={**config.options, name: value})
    if isinstance(config, Mapping):
        return {**config, name: _replaced(config[name], rest, value, path) if rest else value}
    if not is_dataclass(config) or name not in {field.name for field in fields(config)}:
        raise ConfigError.of("path of a remedy", path, "a path of a setting in this config")
    inner = _replaced(getattr(config, name), rest, value, path) if rest else value
    return replace(config, **{name: inner})  # type: ignore[type-var]
