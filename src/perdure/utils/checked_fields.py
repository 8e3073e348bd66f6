"""Type checks of settings, when they are made in Python or read from TOML.

    @dataclass(frozen=True, kw_only=True)
    class Settings(CheckedFields):
        size: int
        rates: tuple[float, ...] = ()

    Settings(size=2.5)  # settings.size = 2.5 is not allowed; allowed: a whole number

The checks follow from the annotations.
"""

import inspect
import operator
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache, wraps
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

from perdure.errors import ConfigError, PerdureError

WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "True or False",
    Path: "a path",
    type(None): "None",
    Callable: "a function",
    Sequence: "a list",
}

MISFIT = object()
"""Result for a value that does not have the required type."""
Fit = Callable[[object], object]
"""Function that converts a value to the type of a field; `MISFIT` if it has another type."""


class CheckedFields:
    """Base class of dataclasses whose fields are checked against their annotations.

    If `__post_init__` of the class refuses a value too, the message of `__post_init__` is raised. A
    list is accepted for a tuple, and text for a path. Annotations that cannot be read are not
    checked.
    """

    def __init_subclass__(cls) -> None:
        """Wrap the `__post_init__` of a subclass with the check."""
        super().__init_subclass__()
        if "__post_init__" in vars(cls):
            type.__setattr__(cls, "__post_init__", _checked(vars(cls)["__post_init__"]))

    def __post_init__(self) -> None:
        check_fields(self)


def _checked(own: Callable[[Any], None]) -> Callable[[Any], None]:
    @wraps(own)
    def checked(self: Any) -> None:
        fault = _fault(self)
        try:
            own(self)
        except PerdureError:
            raise
        except Exception:
            # most failures are explained by a value of a wrong type
            if fault is not None:
                raise fault from None
            raise
        if fault is not None:
            raise fault

    return checked


def check_fields(
    settings: Any, *, prefix: str | None = None, only: Collection[str] | None = None
) -> None:
    """Refuse fields of a dataclass that have another type than their annotation.

    Args:
        settings: an instance; lists become tuples and text becomes a path, if the annotation asks
            for it.
        prefix: text before a field's name in messages; None for the name of the class.
        only: names of the fields to check; None for all.

    Raises:
        ConfigError: names the field, the given value and the allowed values.
    """
    fault = _fault(settings, prefix, only)
    if fault is not None:
        raise fault


def _fault(
    settings: Any, prefix: str | None = None, only: Collection[str] | None = None
) -> ConfigError | None:
    """Return the error for the first field with a wrong type; None if all fields fit."""
    kind = type(settings)
    where = _name(kind) if prefix is None else prefix
    for name, (hint, fit) in _checks(kind).items():  # type: ignore[arg-type]  # classes are hashable
        value = getattr(settings, name)
        fitted = value if only is not None and name not in only else fit(value)
        if fitted is MISFIT:
            return ConfigError.of(f"{where}{name}", value, described(hint))
        if fitted is not value:
            object.__setattr__(settings, name, fitted)
    return None


@cache
def _checks(kind: type) -> dict[str, tuple[Any, Fit]]:
    """Return the type of each field of a dataclass, and the function that checks its values.

    The type is `Any` if the annotation cannot be read.
    """
    if not is_dataclass(kind):
        return {}
    hints = {field.name: _hint(kind, field.name) for field in fields(kind) if field.init}
    return {name: (hint, _fit_of(hint)) for name, hint in hints.items()}


def _hint(kind: type, name: str) -> Any:
    """Return the type of one field, from the annotation in the class that defines the field."""
    owner = next(base for base in kind.__mro__ if name in inspect.get_annotations(base))
    return type_of(inspect.get_annotations(owner)[name], vars(sys.modules[owner.__module__]))


def type_of(annotation: Any, names: Mapping[str, Any]) -> Any:
    """Return the type that an annotation means; `Any` if it cannot be read at run time.

    Args:
        annotation: a type, or its text.
        names: names of the module where the annotation stands.
    """
    alone = types.SimpleNamespace(__annotations__={"it": annotation})
    try:
        return typing.get_type_hints(alone, dict(names))["it"]
    except Exception:  # a name for type checkers only
        return Any


def _name(kind: type) -> str:
    """Return the prefix of a class's fields in messages: its name in lower case and a dot.

    Underscores are as in the name of the class's file.
    """
    stem = kind.__module__.rpartition(".")[2]
    plain = kind.__name__.lower()
    return f"{stem if stem.replace('_', '') == plain else plain}."


# --------------------------------------------------------------------------- values and types


def _fit_of(hint: Any) -> Fit:
    """Return a function that checks and converts values of a type.

    It is made once for each type, because values are checked in every step.
    """
    checks = [_fit_of_one(option) for option in options(hint)]
    if len(checks) == 1:
        return checks[0]

    def fit(value: object) -> object:
        for check in checks:
            fitted = check(value)
            if fitted is not MISFIT:
                return fitted
        return MISFIT

    return fit


def _fit_of_one(hint: Any) -> Fit:
    """Return a function that checks and converts values of a type that is no union."""
    origin = typing.get_origin(hint)
    kinds = typing.get_args(hint)
    if origin is tuple:
        return _tuple_fit(kinds)
    if origin is Sequence and kinds:
        return _sequence_fit(_fit_of(kinds[0]))
    if hint in SINGLE:
        return SINGLE[hint]
    if origin is Literal:
        return lambda value: value if _is_one_of(value, kinds) else MISFIT
    if Callable in (hint, origin):
        return lambda value: value if callable(value) else MISFIT
    return lambda value: _instance(value, origin or hint)


def _instance(value: object, kind: Any) -> object:
    """Return the value if it is an instance of `kind`, else `MISFIT`."""
    try:
        return value if not isinstance(kind, type) or isinstance(value, kind) else MISFIT
    except TypeError:  # a protocol that does not support isinstance
        return value


def _path(value: object) -> object:
    return Path(value) if isinstance(value, str) else _instance(value, Path)


def _whole(value: object) -> object:
    return MISFIT if isinstance(value, bool) else _instance(value, Integral)


def _real(value: object) -> object:
    """Return the value if it is a number that a float can hold, else `MISFIT`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return MISFIT
    # Python compares whole numbers of any size with infinity, and fails later to convert them
    too_large = isinstance(value, Integral) and abs(int(value)) > sys.float_info.max
    return MISFIT if too_large else value


SINGLE: dict[Any, Fit] = {Path: _path, int: _whole, float: _real}
"""Functions that check and convert values of types without items."""


def _sequence_fit(each: Fit) -> Fit:
    """Return a function that checks the items of a list or tuple, which stays as it is.

    Args:
        each: check of one item.
    """

    def fit(value: object) -> object:
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            return MISFIT
        listed = isinstance(value, list | tuple)
        return MISFIT if listed and any(each(item) is MISFIT for item in value) else value

    return fit


def _is_one_of(value: object, allowed: tuple[object, ...]) -> bool:
    return any(type(value) is type(each) and value == each for each in allowed)


def _tuple_fit(kinds: tuple[Any, ...]) -> Fit:
    """Return a function that checks and converts tuples.

    Args:
        kinds: types of the items, in order; (T, ...) for any number of items of type T. Without
            types, every tuple or list is accepted.
    """
    repeated = Ellipsis in kinds
    each = [_fit_of(kind) for kind in kinds if kind is not Ellipsis]

    def fit(value: object) -> object:
        if not isinstance(value, tuple | list):
            return MISFIT
        if not kinds:
            return value
        if not repeated and len(value) != len(each):
            return MISFIT
        checks = each * len(value) if repeated else each
        items = tuple(check(item) for check, item in zip(checks, value, strict=True))
        if any(item is MISFIT for item in items):
            return MISFIT
        alike = isinstance(value, tuple) and all(map(operator.is_, items, value))
        return value if alike else items

    return fit


def options(hint: Any) -> tuple[Any, ...]:
    """Return the types that an annotation allows: the members of a union, or the type itself."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if union else (hint,)


def described(hint: Any) -> str:
    """Describe a type in words, such as "a whole number or None"."""
    return " or ".join(_words(hint))


def _words(hint: Any) -> Iterator[str]:
    for option in options(hint):
        origin = typing.get_origin(option)
        kinds = typing.get_args(option)
        if origin is Literal:
            yield ", ".join(map(str, kinds))
        elif origin is tuple and kinds:
            each = described(kinds[0]) if len(set(kinds) - {Ellipsis}) == 1 else "values"
            length = "" if Ellipsis in kinds else f"{len(kinds)} of them, "
            yield f"a tuple ({length}each {each})"
        elif option in WORDS:
            yield WORDS[option]
        elif origin is type:
            yield "a class"
        elif origin in WORDS:
            yield WORDS[origin]
        else:
            yield f"an instance of {getattr(origin or option, '__name__', option)}"
