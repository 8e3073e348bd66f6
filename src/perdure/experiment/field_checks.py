"""Checks that the dataclasses of a config share."""

from collections.abc import Callable
from typing import Any

from perdure.errors import ConfigError


def check(config: object, names: str, good: Callable[[Any], bool], allowed: str) -> None:
    """Refuse a field that is given but not good.

    Args:
        config: the dataclass.
        names: of the fields, separated by spaces.
        good: tells if a value is allowed.
        allowed: description of the allowed values.

    Raises:
        ConfigError: for the first such field.
    """
    for name in names.split():
        value = getattr(config, name)
        if value is not None and not good(value):
            raise ConfigError.of(name, value, allowed)


def counts(value: int) -> bool:
    """Tell if a count is positive and small enough that a run can end."""
    return 1 <= value <= 10**9


COUNTS = "1 to 1000000000"
"""The numbers that `counts` allows."""
