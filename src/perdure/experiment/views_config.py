"""Table `[training.views]` of a config."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from perdure.data.augmentation import Change, Views, shift_and_flip
from perdure.errors import ConfigError
from perdure.experiment.calls import REQUIRED, arguments, of_module, parameters
from perdure.experiment.from_tables import checked_value, key_text, named_option, placed
from perdure.learner.optimizers import first_line
from perdure.utils.checked_fields import CheckedFields
from perdure.utils.near_names import did_you_mean

CHANGES: dict[str, Callable[..., Callable[[Tensor], Tensor]]] = {"shift_and_flip": shift_and_flip}
"""Functions that return a random change of records, by their names in a table of views."""
OWN = '"module:name" of a function'
NOT_OF_A_RECORD = ("Transform", "MixUp", "CutMix")
"""Transforms of torchvision that need more than one record, or do nothing."""
NEED_OBJECTS = (
    "Compose",
    "RandomApply",
    "RandomChoice",
    "RandomOrder",
    "Lambda",
    "LinearTransformation",
)
"""Transforms of torchvision that a config may not name: they need functions or tensors."""
NAMES = f"{', '.join(CHANGES)}, a transform of torchvision.transforms.v2, or {OWN}"


@dataclass(frozen=True, kw_only=True)
class ViewsConfig(CheckedFields):
    """Random versions of every record, averaged inside its loss (augmentation).

    Args:
        count: number of versions.
        change: `shift_and_flip`, a transform of torchvision.transforms.v2, or "module:name" of a
            function that returns a change, as `perdure.data.shift_and_flip` does. Its own arguments
            are keys of the same table. A list of tables, each with name = TRANSFORM and its
            arguments, applies several transforms of torchvision one after another.
        views: the views as the argument `views` of `Learner`, made from `count` and `change`.
    """

    TABLE: ClassVar[str] = "a table with count, change = NAME, and the change's own arguments"

    change: str
    views: Views

    @classmethod
    def from_table(cls, table: Mapping[str, Any], where: str) -> "ViewsConfig":
        """Find the change by its name, and make it with the table's other keys."""
        options = dict(table)
        if "count" not in options:
            raise ConfigError(f"{where}.count is missing; allowed: a whole number")
        count = checked_value(options.pop("count"), int, f"{where}.count")
        if isinstance(options.get("change"), list):
            name, change = _sequence(options, where)
        else:
            name, own = named_option("change", options, where, tuple(CHANGES))
            change = _change(name, own, where, key="change")
        try:
            return cls(change=name, views=Views(count=count, change=change))  # type: ignore[arg-type]
        except ConfigError as error:
            raise ConfigError(
                placed(str(error).removeprefix("views."), where, ("count",))
            ) from None


def _sequence(table: dict[str, Any], where: str) -> tuple[str, Change]:
    """Return the names and the composition of several transforms of torchvision."""
    given = table.pop("change")
    allowed = "a list of tables, each with name = NAME of torchvision.transforms.v2"
    if not given or not all(isinstance(each, dict) for each in given):
        raise ConfigError.of(f"{where}.change", given, allowed)
    for key, value in table.items():
        raise ConfigError.of(f"{where}.{key_text(key)}", value, "count and change, beside a list")
    from torchvision.transforms import v2

    made: list[Change] = []
    names: list[str] = []
    for number, each in enumerate(given):
        place = f"{where}.change[{number}]"
        name, options = named_option("name", each, place, ("RandomAffine", "ColorJitter"))
        if name not in transform_names():
            raise ConfigError.of(f"{place}.name", name, transform_names())
        names.append(name)
        made.append(_change(name, options, place, key="name"))
    return ", ".join(names), v2.Compose(made)


def _change(name: str, options: Mapping[str, Any], where: str, *, key: str) -> Change:
    """Make the change of a name with its own arguments.

    Args:
        name: `shift_and_flip`, a transform of torchvision, or "module:name".
        options: its arguments.
        where: name of the table, for messages.
        key: key of the table that has the name.
    """
    field = f"{where}.{key}"
    made: Change
    if ":" in name or name in CHANGES:
        maker = of_module(name, field, f"{OWN} that returns a change") if ":" in name else None
        function = maker or CHANGES[name]
        made = function(**arguments(function, options, where))
        return made
    if name not in transform_names():
        raise ConfigError.of(field, name, NAMES)
    from torchvision.transforms import v2

    kind = getattr(v2, name)
    known = parameters(kind)
    for option, value in options.items():
        if option not in known:
            allowed = f"one of the arguments {', '.join(known)}" if known else "no arguments"
            allowed += f" of {name}{did_you_mean(option, known)}"
            raise ConfigError.of(f"{where}.{key_text(option)}", value, allowed)
    for option, each in known.items():
        if each.default is REQUIRED and option not in options:
            raise ConfigError(f"{where}.{option} is missing; allowed: an argument of {name}")
    try:
        made = kind(**options)
    except (TypeError, ValueError, NotImplementedError) as error:
        allowed = f"arguments that torchvision's {name} takes ({first_line(error)})"
        raise ConfigError.of(where, dict(options), allowed) from error
    return made


def transform_names() -> tuple[str, ...]:
    """Names of the transforms of torchvision that a config may name."""
    from torchvision.transforms import v2

    without = NOT_OF_A_RECORD + NEED_OBJECTS
    return tuple(
        name
        for name, value in vars(v2).items()
        if isinstance(value, type) and issubclass(value, v2.Transform) and name not in without
    )
