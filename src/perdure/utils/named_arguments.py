"""Arguments that have to be named: one plain line where they are given by position."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from perdure.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")


def named_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Refuse more arguments by position than a function takes, and name the others.

    Args:
        function: with arguments that are given by name only.

    Returns:
        The function, which raises `ConfigError` where Python would raise a `TypeError`.
    """
    parameters = inspect.signature(function).parameters.values()
    first = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    others = [f"{each.name}=..." for each in parameters if each.kind is each.KEYWORD_ONLY]

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if len(args) > len(first):
            allowed = " and ".join(first) or "none"
            raise ConfigError(
                f"{function.__name__} was given {len(args)} arguments without a name; allowed "
                f"without one: {allowed}; give the others by name: {', '.join(others)}"
            )
        return function(*args, **kwargs)

    return called
