"""Check of the settings of a run of an app, before they are given to Flower."""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from perdure.deployment.config_checks import refuse_undeployable
from perdure.deployment.template import RUN_FOLDER, setting_names
from perdure.errors import ConfigError
from perdure.experiment.config import from_table, read_text, table_of
from perdure.experiment.overrides import set_path
from perdure.utils.near_names import did_you_mean


def check_settings(config: Path | str, settings: Sequence[str]) -> None:
    """Refuse settings that a run of an app cannot have, where Flower shows a traceback.

    Args:
        config: TOML file of the app's config.
        settings: settings to replace, each as KEY=VALUE of TOML, such as "training.epochs=3".

    Raises:
        ConfigError: names the setting, and the allowed ones.
    """
    source = str(config)
    table = table_of(read_text(Path(config)), source)
    known = setting_names(table)
    for word in settings:
        try:
            given = dict(_leaves(tomllib.loads(word)))
        except tomllib.TOMLDecodeError:
            allowed = "KEY=VALUE of TOML, such as training.epochs=3 or 'name=\"second\"'"
            raise ConfigError.of("--set", word, allowed) from None
        for key, value in given.items():
            if key not in known:
                allowed = f"{', '.join(known)}{did_you_mean(key, known)}; others are in {source}"
                raise ConfigError.of("--set", key, allowed)
            if key != RUN_FOLDER:
                set_path(table, key, value)
    refuse_undeployable(from_table(table, source), source)


def _leaves(table: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and the value of every setting in nested tables."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{place}{name}.")
        else:
            yield f"{place}{name}", value
