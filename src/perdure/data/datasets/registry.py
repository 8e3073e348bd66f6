"""Search for a data set by name: the name of its file, of an entry point, or "module:name"."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeGuard

from perdure.data.datasets.base import Dataset
from perdure.errors import ConfigError
from perdure.utils.checked_arguments import checked_arguments
from perdure.utils.extensions import Extensions

GIVEN = ("root", "seed")
"""Arguments that `load` passes to the functions of data sets, if they have them."""


def _is_loader(value: object) -> TypeGuard[Callable[..., Dataset]]:
    return inspect.isfunction(value) and all(
        parameter.name in GIVEN or parameter.default is not parameter.empty
        for parameter in inspect.signature(value).parameters.values()
    )


EXTENSIONS = Extensions(
    kind="data set",
    package="perdure.data.datasets",
    group="perdure.datasets",
    fits=_is_loader,
    wanted="a function of `root` and `seed`, or of one or neither, that returns a Dataset",
    helpers=("base", "registry"),
    named_as_file=True,
)


def names() -> tuple[str, ...]:
    """Names of all data sets, found from the files and the entry points."""
    return EXTENSIONS.names()


def find(name: str, *, field: str | None = None) -> Callable[..., Dataset]:
    """Return the function that makes the data set called `name`.

    Args:
        name: one of `names()`, with dashes or underscores, or "module:name".
        field: name of the setting or argument with this value, for the error message.

    Raises:
        ConfigError: if there is no such data set; the message lists all data sets.

    >>> find("breast-cancer").__name__
    'breast_cancer'
    """
    plain = name.replace("-", "_")
    return EXTENSIONS.find(plain if plain in names() else name, field=field)


@checked_arguments
def load(
    name: str,
    root: str | Path | None = None,
    seed: int = 0,
    *,
    declared_size: int | None = None,
    options: Mapping[str, object] | None = None,
) -> Dataset:
    """Load a data set by name.

    Args:
        name: one of `names()`, with dashes or underscores, or "module:name".
        root: data root, for data sets that are read from files; see `perdure.data.datasets.base`.
        seed: seed of the split into training and test part, if the data set has no published split.
        declared_size: public number of training records; None for the size that the data set
            declares.
        options: further arguments of the data set's function, such as {"length": 32}.

    Raises:
        ConfigError: if the name is not known, or the function returns no data set.
        DataError: if files are missing or damaged.

    >>> load("digits").input_shape
    (1, 8, 8)
    """
    loader = find(name)
    given = {"root": root, "seed": seed}
    taken = inspect.signature(loader).parameters
    taken_up = {key: value for key, value in given.items() if key in taken}
    made: object = loader(**taken_up, **(options or {}))
    if not isinstance(made, Dataset):
        raise ConfigError(
            f"data set {name!r} is a {type(made).__name__}; allowed: a perdure.data.Dataset; "
            f"return one from {loader.__module__}.{loader.__qualname__}"
        )
    if declared_size is None:
        return made
    return replace(made, train=made.train.declared(declared_size))
