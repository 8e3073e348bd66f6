"""Checks of the arguments that a config gives to a function or class, from its signature.

A builder of models, a schedule of torch or a user's own data set needs no dataclass for its table
in a config: parameters are keys, annotations are types, and defaults are defaults.
"""

import importlib
import inspect
import sys
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from perdure.errors import ConfigError
from perdure.experiment.from_tables import checked_value, described, key_text
from perdure.utils.checked_fields import type_of
from perdure.utils.extensions import MODULE_AND_NAME
from perdure.utils.near_names import did_you_mean

REQUIRED = inspect.Parameter.empty
"""Value of `Parameter.default` for a parameter that a config must give."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """Type and default of one parameter of a function, which a config gives as a key.

    Args:
        hint: annotation of the parameter; `Any` if it has none, or none that can be read.
        default: default of the parameter; `REQUIRED` if it has none.
    """

    hint: Any
    default: Any


def parameters(function: Callable[..., Any], without: Collection[str] = ()) -> dict[str, Parameter]:
    """Return the parameters that a config may give to a function, by name, in their order.

    Args:
        function: function or class.
        without: names of parameters that perdure passes itself.
    """
    owner: Any = function.__init__ if isinstance(function, type) else function  # type: ignore[misc]
    module = vars(sys.modules.get(getattr(owner, "__module__", ""), types))
    return {
        name: Parameter(hint=_hint(each.annotation, module), default=each.default)
        for name, each in inspect.signature(function).parameters.items()
        if name not in without and each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)
    }


def _hint(annotation: Any, module: Mapping[str, Any]) -> Any:
    """Return the type of an annotation; it may name an import for type checkers alone."""
    if annotation is inspect.Parameter.empty:
        return Any
    return type_of(annotation, module)


def arguments(
    function: Callable[..., Any],
    table: Mapping[str, Any],
    where: str,
    *,
    without: Collection[str] = (),
) -> dict[str, Any]:
    """Check the keys and values of a table against the parameters of a function.

    Args:
        function: function or class that will be called with the values.
        table: keys and values of the config.
        where: name of the table, for messages.
        without: names of parameters that perdure passes itself.

    Raises:
        ConfigError: for an unknown key, a value of another type, or a parameter that is missing.
    """
    known = parameters(function, without)
    for name in table:
        if name not in known:
            allowed = f"one of the fields {', '.join(known)}" if known else "no further fields"
            allowed += did_you_mean(name, known)
            raise ConfigError.of(f"{where}.{key_text(name)}", table[name], allowed)
    for name, each in known.items():
        if each.default is REQUIRED and name not in table:
            raise ConfigError(f"{where}.{name} is missing; allowed: {described(each.hint)}")
    return {
        name: checked_value(value, known[name].hint, f"{where}.{name}")
        for name, value in table.items()
    }


def of_module(name: str, field: str, wanted: str) -> Callable[..., Any]:
    """Import a function or class by `"module:name"`.

    Args:
        name: module and name, such as "my_package.models:make_model".
        field: key of the config that has the name, for messages.
        wanted: description of the function that is allowed there, for messages.

    Raises:
        ConfigError: if it cannot be imported or called.
    """
    if not MODULE_AND_NAME.fullmatch(name):
        raise ConfigError.of(field, name, wanted)
    module, _, path = name.partition(":")
    try:
        found: object = getattr(importlib.import_module(module), path)
    except Exception as error:  # a module of the user's own may raise anything
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{field} = {name!r} cannot be imported ({type(error).__name__}: {reason}); allowed: "
            f"{wanted}"
        ) from error
    if not callable(found):
        raise ConfigError.of(field, name, wanted)
    return found
