"""Decorator that checks the arguments of a public function, for error messages of one line."""

import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence, Set, Sized
from functools import wraps
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

from perdure.errors import ConfigError
from perdure.utils.checked_fields import described, options, type_of
from perdure.utils.near_names import did_you_mean

P = ParamSpec("P")
R = TypeVar("R")

LARGEST = 2**63
"""Upper bound of whole numbers: torch's are smaller."""


def checked_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that checks its arguments against the annotations before it runs.

    Numbers, text, lists, mappings and functions are checked; `function` itself checks other types,
    such as data sets.

    Args:
        function: function with annotations; an annotation that cannot be read is not checked.

    Returns:
        Function with the same signature. It raises `ConfigError` for a value of a wrong type, and
        if Python would raise a `TypeError`: for an argument that is missing, unknown, given twice,
        or given without its name.
    """
    parameters = inspect.signature(function).parameters
    first = [name for name, each in parameters.items() if each.kind is each.POSITIONAL_OR_KEYWORD]
    hints: dict[str, Any] = {}

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if not hints:
            hints.update({name: _hint(function, name) for name in parameters})
        _check_names(function.__name__, parameters, len(args), kwargs, hints)
        for name, value in [*zip(first, args, strict=False), *kwargs.items()]:
            hint = hints.get(name, Any)
            if not any(_fits(value, option) for option in options(hint)):
                raise ConfigError.of(name, value, described(hint))
        return function(*args, **kwargs)

    return called


def _check_names(
    function: str,
    parameters: Mapping[str, inspect.Parameter],
    count: int,
    named: Mapping[str, object],
    hints: Mapping[str, Any],
) -> None:
    """Refuse a call that Python would refuse with a `TypeError`.

    Args:
        function: name of the function.
        parameters: its parameters.
        count: number of arguments without a name.
        named: arguments with a name.
        hints: type of each parameter.
    """
    first = [name for name, each in parameters.items() if each.kind is each.POSITIONAL_OR_KEYWORD]
    if count > len(first):
        others = ", ".join(f"{name}=..." for name in parameters if name not in first)
        raise ConfigError(
            f"{function} was given {count} arguments without a name; allowed without one: "
            f"{' and '.join(first) or 'none'}; give the others by name: {others}"
        )
    open_ended = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    for name in named:
        if name in first[:count]:
            raise ConfigError(f"{function} was given {name} twice; give it once, {name}=...")
        if name not in parameters and not open_ended:
            near = did_you_mean(name, parameters)
            raise ConfigError(
                f"{function} has no argument {name}; allowed: {', '.join(parameters)}{near}"
            )
    missing = [
        f"{name}=..., {described(hints[name])}"
        for name, each in parameters.items()
        if each.default is each.empty
        and each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
        and name not in [*first[:count], *named]
    ]
    if missing:
        raise ConfigError(f"{function} was not given all that it needs; add {'; '.join(missing)}")


def _hint(function: Callable[..., object], name: str) -> Any:
    """Return the type of one argument; `Any` if the annotation cannot be read at run time."""
    annotation = inspect.get_annotations(function).get(name, Any)
    return type_of(annotation, vars(sys.modules[function.__module__]))


def _fits(value: object, hint: Any) -> bool:
    """Return True if a value has a type that is no union; also for types that are not checked."""
    kind = typing.get_origin(hint) or hint
    if kind is tuple:
        known = typing.get_args(hint)
        wide = Ellipsis in known or not known
        return isinstance(value, tuple | list) and (wide or len(value) == len(known))
    return CHECKS.get(kind, _anything)(value)


def _anything(value: object) -> bool:
    return True


def _is_whole(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, Integral):
        return False
    return -LARGEST < int(value) < LARGEST


CHECKS: dict[Any, Callable[[object], bool]] = {
    types.NoneType: lambda value: value is None,
    bool: lambda value: isinstance(value, bool),
    str: lambda value: isinstance(value, str),
    int: _is_whole,
    float: lambda value: isinstance(value, Real) and not isinstance(value, bool),
    # arrays as well
    Sequence: lambda value: (
        isinstance(value, Sized) and not isinstance(value, str | bytes | Set | Mapping)
    ),
    Mapping: lambda value: isinstance(value, Mapping),
    Callable: callable,
}
