"""The strategies, one method a file. Import them as `perdure.strategies`.

>>> from perdure.strategies import EWC
>>> from perdure.strategies.ewc import EWC          # the same, with types

Adding a strategy is adding a file: `my_method.py` with one class `MyMethod(Strategy)`.
"""

import importlib
from pathlib import Path
from typing import Any

if __name__ != "perdure.strategies":
    raise ImportError(f"import this package as perdure.strategies, not as {__name__}")

from perdure.contract import Combine, Strategy
from perdure.errors import ConfigError

__all__ = ["Combine", "find", "names"]


def names() -> tuple[str, ...]:
    """Names of all strategies, found from the files."""
    return tuple(sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py")))


def find(name: str) -> type[Strategy]:
    """Return the class of the strategy called `name` (its file's name).

    Raises:
        ConfigError: when there is no such file; it lists those there are.
    """
    if name not in names():
        raise ConfigError.of("strategy", name, names())
    module = importlib.import_module(f"{__name__}.{name}")
    own = [
        value
        for value in vars(module).values()
        if _is_strategy(value) and value.__module__ == module.__name__
    ]
    if len(own) != 1:
        raise ConfigError(
            f"strategies/{name}.py defines {len(own)} strategies; allowed: exactly one class a file"
        )
    return own[0]  # type: ignore[no-any-return]


def _is_strategy(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Strategy)


def __getattr__(name: str) -> Any:
    file = {stem.replace("_", ""): stem for stem in names()}.get(name.lower())
    found = find(file) if file else None
    if found is None or found.__name__ != name:
        raise AttributeError(f"perdure.strategies has no {name!r}; it has {', '.join(names())}")
    return found


def __dir__() -> list[str]:
    return [*__all__, *(find(name).__name__ for name in names())]
