"""Imports of packages that belong to an extra of perdure and may be missing."""

import importlib
from typing import Any

from perdure.errors import ConfigError


def imported(package: str, extra: str, user: str) -> Any:
    """Return a package that an extra installs.

    Args:
        package: name of the package to import.
        extra: name of the extra.
        user: part of perdure that needs the package, for the message.

    Raises:
        ConfigError: if the package is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"{user} needs the package {package}, which cannot be imported ({error}); "
            f"pip install 'perdure[{extra}]'"
        ) from None
