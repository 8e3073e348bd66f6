"""Files of a Flower app that trains a config: `perdure app new`."""

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from perdure.deployment.config_checks import refuse_undeployable
from perdure.errors import RunError
from perdure.experiment.config import parse, table_of
from perdure.experiment.overrides import toml_text
from perdure.utils.atomic_files import private_folder, write_atomically

FILES = {
    "pyproject.toml": "pyproject.toml.txt",
    "LICENSE": "license.txt",
    "README.md": "readme.txt",
    ".gitignore": "gitignore.txt",
    "scripts/make_certificates.py": "make_certificates.py.txt",
    "scripts/make_node_key.py": "make_node_key.py.txt",
    "scripts/register_site.py": "register_site.py.txt",
    "scripts/start_run.py": "start_run.py.txt",
    "scripts/start_superlink.py": "start_superlink.py.txt",
    "scripts/start_supernode.py": "start_supernode.py.txt",
    "{package}/__init__.py": "init.py.txt",
    "{package}/client_app.py": "client_app.py.txt",
    "{package}/server_app.py": "server_app.py.txt",
}
"""File of the app to its template."""
PRIVATE = ("server", "site/state", "site/data", "site/keys")
"""Folders of the app for keys, data and state, which only their owner can enter."""
RUN_FOLDER = "run-folder"
"""Key of Flower's run config with the folder of the run on the server."""
NO_SETTINGS = ("threads", "device", "processes", "loggers", "search")
"""Keys of a config that belong to a machine or to a command, and not to a run of the app."""


def new_app(folder: Path | str, text: str, *, source: str = "config") -> list[Path]:
    """Write a Flower app that trains a config, and return its files.

    Args:
        folder: folder of the app, which must be new or empty.
        text: TOML text of the config, with a table [federation].
        source: name of the config, for messages.

    Raises:
        ConfigError: if the config is wrong, or has no federation.
        RunError: if the folder has files.
    """
    place = Path(folder)
    config = parse(text, source=source)
    refuse_undeployable(config, source)
    assert config.federation is not None
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise RunError(f"{place} has files; give a new folder, or an empty one")
    package = package_name(config.name)
    values = {
        "name": package.replace("_", "-"),
        "package": package,
        "clients": str(config.federation.clients),
        "last": str(config.federation.clients - 1),
        "settings": settings(table_of(text, source)),
    }
    templates = resources.files("perdure.deployment") / "template"
    written = []
    for name, template in FILES.items():
        path = place / name.format(package=package)
        content = Template((templates / template).read_text(encoding="utf-8"))
        write_atomically(path, content.substitute(values).encode())
        written.append(path)
    write_atomically(place / package / "config.toml", text.encode())
    for name in PRIVATE:
        private_folder(place / name)
    return [*written, place / package / "config.toml"]


def package_name(name: str) -> str:
    """Return the name of the app's Python package for a run of this name."""
    return "federation_" + re.sub("[^a-z0-9]+", "_", name.lower()).strip("_")


def settings(table: Mapping[str, Any]) -> str:
    """Return the run config of the app: every number, text and truth value of a config.

    So each of them can be replaced with `flwr run --run-config`.
    """
    plain, tables = _replaceable(table)
    sections = {f"tool.flwr.app.config.{name}": inner for name, inner in tables.items() if inner}
    head = toml_text({RUN_FOLDER: "", **plain})
    rest = "".join(f"\n[{name}]\n{toml_text(inner)}" for name, inner in sections.items())
    return head + rest


def setting_names(table: Mapping[str, Any]) -> list[str]:
    """Return the paths of all settings in the run config of the app, such as training.epochs."""
    plain, tables = _replaceable(table)
    return [RUN_FOLDER, *plain, *(f"{name}.{key}" for name in tables for key in tables[name])]


def _replaceable(table: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the settings of a config that a run of the app may replace: keys, and tables."""
    plain = {
        key: value
        for key, value in table.items()
        if isinstance(value, (bool, int, float, str)) and key not in NO_SETTINGS
    }
    tables = {
        name: {k: v for k, v in inner.items() if isinstance(v, (bool, int, float, str))}
        for name, inner in table.items()
        if isinstance(inner, Mapping) and name not in NO_SETTINGS
    }
    return plain, tables
