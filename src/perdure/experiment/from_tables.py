"""Conversion of TOML tables to dataclasses, with type checks.

Values that are not allowed are refused; the message has the place, the value and what is allowed.
"""

import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, Literal, TypeVar

from perdure.errors import ConfigError
from perdure.utils.near_names import did_you_mean

T = TypeVar("T")


def leaves(value: object, where: str = "") -> Iterator[tuple[str, object]]:
    """Yield all values in nested tables and lists, each with its place in the file."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, f"{where}.{key_text(name)}" if where else key_text(name))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from leaves(inner, f"{where}[{i}]")
    else:
        yield where, value


def extension(
    find: Callable[..., type[T]],
    names: Callable[[], tuple[str, ...]],
    key: str,
    table: Mapping[str, Any],
    where: str,
) -> tuple[str, T]:
    """Return the name under `key`, and the extension built from the table's other fields."""
    name, options = named_option(key, table, where, names())
    return name, build(find(name, field=f"{where}.{key}"), options, where)


def named_option(
    key: str, table: Mapping[str, Any], where: str, names: Sequence[str]
) -> tuple[str, dict[str, Any]]:
    """Return the name under `key` of a table of a config, and the table without this key.

    Args:
        key: key that has the name of a strategy, an attack or the like.
        table: table of the config.
        where: name of the table, for messages.
        names: known names, for messages.

    Raises:
        ConfigError: if the name is missing, or is not text.
    """
    options = dict(table)
    field = f"{where}.{key}"
    if key not in options:
        raise ConfigError(f'{field} is missing; allowed: {", ".join(names)}, or "module:name"')
    name = options.pop(key)
    if not isinstance(name, str):
        raise ConfigError.of(field, name, names)
    return name, options


def build(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """Make a dataclass from a TOML table.

    Unknown fields, missing fields and wrong types are refused by name.
    """
    hints = read_hints(cls, where)
    known = {f.name: f for f in fields(cls) if f.init}  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    for name in table:
        if name not in known:
            allowed = f"one of the fields {', '.join(known)}{did_you_mean(name, known)}"
            raise ConfigError.of(f"{prefix}{key_text(name)}", table[name], allowed)
    required = [
        n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING
    ]
    missing = [name for name in required if name not in table]
    if missing:
        raise ConfigError(
            f"{prefix}{missing[0]} is missing; allowed: {described(hints[missing[0]])}"
        )
    values = {
        name: checked_value(value, hints[name], f"{prefix}{name}") for name, value in table.items()
    }
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(placed(str(error), where, known)) from None


def read_hints(cls: type, where: str) -> dict[str, Any]:
    """Return the types of a class's fields by name, from its annotations."""
    try:
        return typing.get_type_hints(cls)
    except Exception as error:
        raise ConfigError(
            f"{where}: the types of {cls.__qualname__} cannot be read ({error}); allowed: types "
            "that are imported at runtime; move their imports out of TYPE_CHECKING"
        ) from error


def placed(message: str, where: str, known: Iterable[str]) -> str:
    """Return a dataclass's error message with the table's name in front, if it has none."""
    if not where or message.startswith((f"{where}.", f"{where} ")):
        return message
    field = re.split(r"[ .:\[]", message, maxsplit=1)[0]
    return f"{where}.{message}" if field in known else f"{where}: {message}"


def key_text(name: str) -> str:
    """Write a key as TOML does.

    It is quoted if it has special characters, so that a message stays on one line.
    """
    return name if re.fullmatch("[A-Za-z0-9_-]+", name) else repr(name)


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the types that an annotation allows: the members of a union, or the type itself."""
    return (
        typing.get_args(hint)
        if typing.get_origin(hint) in (types.UnionType, typing.Union)
        else (hint,)
    )


def checked_value(value: object, hint: Any, where: str) -> object:
    """Check one TOML value against a type, and convert it.

    Lists become tuples, unless the type is a list, and tables become dataclasses.
    """
    for option in _options(hint):
        if option is Any or (isinstance(value, dict) and typing.get_origin(option) is Mapping):
            return value
        if isinstance(value, dict) and hasattr(option, "__dataclass_fields__"):
            from_table = getattr(option, "from_table", None)
            return from_table(value, where) if from_table else build(option, value, where)
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if isinstance(value, list) and _length_fits(value, option):
            items = [
                checked_value(item, typing.get_args(option)[0], f"{where}[{i}]")
                for i, item in enumerate(value)
            ]
            return items if typing.get_origin(option) is list else tuple(items)
        if option in (int, float, str, bool) and _fits(value, option):
            return option(value)
    raise ConfigError.of(where, value, described(hint))


def _length_fits(value: list[object], hint: Any) -> bool:
    """Return True if a sequence or tuple type allows lists of this length."""
    if typing.get_origin(hint) in (Sequence, list):
        return True
    if typing.get_origin(hint) is not tuple:
        return False
    kinds = typing.get_args(hint)
    return Ellipsis in kinds or len(value) == len(kinds)


def _fits(value: object, kind: type) -> bool:
    """Return True if a TOML value has a type.

    Whole numbers are numbers; true, false, nan and inf are not.
    """
    if kind is float:
        return type(value) in (int, float) and math.isfinite(typing.cast(float, value))
    return type(value) is kind


WORDS: dict[Any, str] = {
    Any: "any value",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    bool: "true or false",
    Mapping: "a table",
}


def described(hint: Any) -> str:
    """Describe in words the values of TOML that a type allows."""
    options = [option for option in _options(hint) if option is not type(None)]
    # torch allows tensors beside numbers
    options = [option for option in options if _is_written(option)] or options
    if len(options) > 1:
        return " or ".join(map(described, options))
    (option,) = options
    origin = typing.get_origin(option)
    kinds = typing.get_args(option)
    if origin is Literal:
        return ", ".join(map(str, kinds))
    if origin in (tuple, list, Sequence):
        any_length = Ellipsis in kinds or len(kinds) == 1
        length = "" if any_length else f"{len(kinds)} values, "
        return f"a list of {length}which each is {described(kinds[0])}"
    if hasattr(option, "TABLE"):
        return typing.cast(str, option.TABLE)
    if hasattr(option, "__dataclass_fields__"):
        return f"a table with {', '.join(f.name for f in fields(option) if f.init)}"
    return WORDS.get(origin or option, "no value, because TOML has no such type")


def _is_written(option: Any) -> bool:
    """Tell if TOML can hold a value of a type."""
    kinds = (*WORDS, Literal, tuple, list, Sequence)
    return (typing.get_origin(option) or option) in kinds or hasattr(option, "__dataclass_fields__")
