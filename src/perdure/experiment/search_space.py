"""Spaces of hyper-parameters: ranges and choices, in Python and in the table `[search.space]`."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from perdure.errors import ConfigError
from perdure.experiment.from_tables import build
from perdure.utils.checked_fields import CheckedFields

if TYPE_CHECKING:
    import optuna

Values = dict[str, Any]
"""Hyper-parameters by name."""
CHOICES = "choices"
ALLOWED = "a tuple (lowest, highest) of numbers, a Range, or a list of choices"
IN_TOML = "[lowest, highest], {low = L, high = H, scale = SCALE}, or {choices = [...]}"


@dataclass(frozen=True, kw_only=True)
class Range(CheckedFields):
    """Range of numbers to search.

    Args:
        low: lowest value.
        high: highest value. If both ends are whole, whole numbers are searched.
        scale: `linear` or `log`; left out for `log` where numbers are not whole and `low` is above
            0, and else for `linear`.
    """

    low: float
    high: float
    scale: Literal["linear", "log"] | None = None

    def __post_init__(self) -> None:
        ends = (self.low, self.high)
        if not all(map(_is_number, ends)) or not self.low < self.high:
            raise ConfigError.of("low, high", ends, "two finite numbers, the lower one first")
        if self.scale == "log" and self.low <= 0:
            raise ConfigError.of("low", self.low, "a number above 0 on a log scale")

    @property
    def whole(self) -> bool:
        """True if whole numbers are searched."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def logarithmic(self) -> bool:
        """True if the scale is logarithmic."""
        if self.scale is not None:
            return self.scale == "log"
        return not self.whole and self.low > 0


Space = Mapping[str, tuple[float, float] | Range | list[Any]]
"""Name of a hyper-parameter to the values that are searched:

    {"rate": (1e-4, 0.1)}              numbers on a logarithmic scale: the lowest is above 0
    {"momentum": (0.0, 0.9)}           numbers on a linear scale: the lowest is 0 or below
    {"epochs": (1, 8)}                 whole numbers, where both ends are whole
    {"keep": Range(low=0.5, high=0.9, scale="linear")}    another scale
    {"optimizer": ["sgd", "adam"]}     a list of choices: text, numbers, True, False, None or lists
"""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def space_of_table(table: Mapping[str, Any], where: str) -> dict[str, Range | list[Any]]:
    """Read the table `[search.space]`: keys are paths of a config, in quotes or as nested tables.

    Raises:
        ConfigError: for values that are neither a range nor choices, and for an empty table.
    """
    found: dict[str, Range | list[Any]] = {}
    for path, value in _entries(table):
        name = f'{where}."{path}"'
        if isinstance(value, dict) and CHOICES in value:
            choices = value[CHOICES]
            if len(value) > 1 or not isinstance(choices, list) or not choices:
                raise ConfigError.of(name, value, IN_TOML)
            found[path] = choices
        elif isinstance(value, dict):
            found[path] = build(Range, value, name)
        elif isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)):
            low, high = value
            found[path] = build(Range, {"low": low, "high": high}, name)
        else:
            raise ConfigError.of(name, value, IN_TOML)
    if not found:
        raise ConfigError.of(where, dict(table), 'one or more paths, as "training.learning_rate"')
    return found


def _entries(table: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every path with its values; a key without quotes has made a nested table."""
    for key, value in table.items():
        nested = isinstance(value, dict) and not value.keys() & {CHOICES, "low", "high", "scale"}
        if nested and value:
            yield from _entries(value, f"{before}{key}.")
        else:
            yield before + key, value


def checked_space(space: Space) -> dict[str, Range | list[Any]]:
    """Check a space, and return it with a `Range` for every pair of numbers.

    Raises:
        ConfigError: for an empty space, and for values that are neither a range nor choices.
    """
    if not space:
        raise ConfigError.of("space", dict(space), "one or more names, each with its values")
    return {name: _checked(name, given) for name, given in space.items()}


def _checked(name: str, given: object) -> Range | list[Any]:
    if isinstance(given, Range):
        return given
    plain = (str, int, float, bool, list, type(None))
    if isinstance(given, list) and given and all(isinstance(each, plain) for each in given):
        return given
    if isinstance(given, tuple) and len(given) == 2 and all(map(_is_number, given)):
        low, high = given
        if low < high:
            return Range(low=low, high=high)
    raise ConfigError.of(f"space[{name!r}]", given, ALLOWED)


def some_values(given: Range | list[Any]) -> list[Any]:
    """Return the two ends of a range, or all choices."""
    return [given.low, given.high] if isinstance(given, Range) else given


def described_space(space: Mapping[str, Range | list[Any]]) -> dict[str, object]:
    """Return a space as JSON can hold it, to tell two searches apart."""
    return {
        name: [given.low, given.high, "log" if given.logarithmic else "linear"]
        if isinstance(given, Range)
        else {CHOICES: given}
        for name, given in space.items()
    }


def suggested(trial: "optuna.Trial", name: str, given: Range | list[Any]) -> Any:
    """Draw the value of one hyper-parameter for a trial of Optuna."""
    if isinstance(given, list):
        labels = [_label(choice) for choice in given]
        return given[labels.index(trial.suggest_categorical(name, labels))]
    if given.whole:
        return trial.suggest_int(name, int(given.low), int(given.high), log=given.logarithmic)
    return trial.suggest_float(name, given.low, given.high, log=given.logarithmic)


def _label(choice: Any) -> Any:
    """Return a choice as Optuna can store it: lists and tables as text."""
    return json.dumps(choice) if isinstance(choice, list | dict) else choice
