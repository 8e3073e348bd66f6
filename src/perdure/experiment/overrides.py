"""Replacement of a config's keys by options of the command line, and writing of TOML text."""

import datetime
import json
import re
from collections.abc import Mapping
from typing import Any

from perdure.errors import ConfigError
from perdure.experiment.config import table_of


def overridden(
    text: str,
    *,
    source: str,
    seeds: str | None = None,
    engine: str | None = None,
    device: str | None = None,
    processes: int | None = None,
) -> str:
    """Return the text of a config with some keys replaced; unchanged if no new value is given.

    Args:
        text: TOML text of the config.
        source: name of the file, for messages.
        seeds: new seeds: one number, or several with commas, such as "0,1,2"; None to keep.
        engine: new engine of the federation; None to keep.
        device: new device of models and records; None to keep.
        processes: new number of processes that divide every batch; None to keep.

    Raises:
        ConfigError: for seeds that are no numbers, and for an engine without a federation.
    """
    if all(each is None for each in (seeds, engine, device, processes)):
        return text
    table = table_of(text, source)
    if seeds is not None:
        table.pop("seed", None)
        table["seeds"] = _numbers(seeds)
    if device is not None:
        table["device"] = device
    if processes is not None:
        table["processes"] = processes
    if engine is not None:
        federation = table.get("federation")
        if not isinstance(federation, dict):
            allowed = f"a config with a [federation] table, which {source} lacks"
            raise ConfigError.of("--engine", engine, allowed)
        federation["engine"] = engine
    return toml_text(table)


def set_path(table: dict[str, Any], path: str, value: object) -> None:
    """Set the value at a path of a config, such as training.learning_rate or arms.0.strength.

    Tables on the way that the config lacks are made. The place of an arm in the list is a number.

    Raises:
        ConfigError: if the path leads through a value that is no table.
    """
    *places, last = path.split(".")
    inner: Any = table
    for place in places:
        if isinstance(inner, list) and place.isdigit() and int(place) < len(inner):
            inner = inner[int(place)]
        elif isinstance(inner, dict):
            inner = inner.setdefault(place, {})
        else:
            raise ConfigError.of("path", path, f"a path of a setting; {place!r} is in no table")
    if not isinstance(inner, dict):
        raise ConfigError.of("path", path, f"a path of a setting; {last!r} is in no table")
    inner[last] = value


def _numbers(seeds: str) -> list[int]:
    parts = seeds.split(",")
    if not all(re.fullmatch(r"\s*\d{1,10}\s*", part) for part in parts):
        raise ConfigError.of("--seeds", seeds, "whole numbers with commas, such as 0,1,2")
    return list(map(int, parts))


def toml_text(table: Mapping[str, Any]) -> str:
    """Write a table as TOML: plain keys, then a section for each table and list of tables."""
    lines = [
        f"{_key(name)} = {toml_value(value)}" for name, value in table.items() if _is_plain(value)
    ]
    for name, value in table.items():
        if isinstance(value, dict):
            lines += ["", f"[{_key(name)}]", *_body(value)]
        elif not _is_plain(value):
            for each in value:
                lines += ["", f"[[{_key(name)}]]", *_body(each)]
    return "\n".join(lines) + "\n"


def changes_in_words(changes: Mapping[str, object]) -> str:
    """Write changed settings as `path = value`, with values of TOML and commas between."""
    return ", ".join(f"{path} = {toml_value(value)}" for path, value in changes.items())


def short_values(values: Mapping[str, object]) -> str:
    """Write settings as `changes_in_words` does, with four digits of every number."""
    rounded = {
        path: float(f"{value:.4g}") if isinstance(value, float) else value
        for path, value in values.items()
    }
    return changes_in_words(rounded)


def _is_plain(value: object) -> bool:
    tables = isinstance(value, list) and value and all(isinstance(each, dict) for each in value)
    return not (isinstance(value, dict) or tables)


def _body(table: Mapping[str, Any]) -> list[str]:
    return [f"{_key(name)} = {toml_value(value)}" for name, value in table.items()]


def _key(name: str) -> str:
    return name if re.fullmatch("[A-Za-z0-9_-]+", name) else toml_value(name)


def toml_value(value: object) -> str:
    """Write one value of TOML; tables inside of values are inline ones."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # the escapes of JSON are those of TOML, which also wants one for the delete character
        return json.dumps(value).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(_body(value))}}}"
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return repr(value)
