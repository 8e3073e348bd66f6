"""Checks of values that several dataclasses of a config use."""

from collections.abc import Callable
from typing import Any

from perdure.errors import ConfigError


def check(config: object, names: str, good: Callable[[Any], bool], allowed: str) -> None:
    """Check that fields of a dataclass have allowed values; None is always allowed.

    Args:
        config: instance of the dataclass.
        names: names of the fields to check, separated by spaces.
        good: function that returns True if a value is allowed.
        allowed: description of the allowed values, for the message.

    Raises:
        ConfigError: for the first field with another value.
    """
    for name in names.split():
        value = getattr(config, name)
        if value is not None and not good(value):
            raise ConfigError.of(name, value, allowed)


def counts(value: int) -> bool:
    """Return True if a count is at least 1, and small enough that a run can end."""
    return 1 <= value <= 10**9


COUNTS = "1 to 1000000000"
"""The numbers that `counts` allows."""
