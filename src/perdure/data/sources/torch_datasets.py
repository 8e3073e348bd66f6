"""Data sets from PyTorch: any map-style `torch.utils.data.Dataset`, such as torchvision's."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from perdure.data.datasets.base import Dataset
from perdure.data.sources.assembly import (
    Part,
    Settings,
    dataset_of,
    refuse_beside_share,
    share_of,
)
from perdure.data.sources.inputs import Number, Standardise, byte_range, float_inputs
from perdure.data.sources.targets import TaskName
from perdure.data.sources.values import numbers_of, pixels_of
from perdure.errors import DataError
from perdure.tasks import Task
from perdure.utils.checked_arguments import checked_arguments
from perdure.utils.seeding import seed_globally, undisturbed

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

TWICE = 16
"""Number of items that are read twice, to detect random transforms."""

Key = int | str
"""Key of a value in an item: a position in a tuple, or a name in a dict."""


class MapStyle(Protocol):
    """Data set with numbered items, such as a `torch.utils.data.Dataset`."""

    def __getitem__(self, index: int, /) -> object:
        """Return one item."""

    def __len__(self) -> int:
        """Return the number of items."""


@checked_arguments
def from_torch(
    dataset: MapStyle,
    *,
    test: MapStyle | float = 0.2,
    keys: tuple[Key, Key] = (0, 1),
    task: TaskName | Task = "single-label",
    classes: Sequence[object] | None = None,
    num_classes: int | None = None,
    ids: "ArrayLike | Tensor | None" = None,
    test_ids: "ArrayLike | Tensor | None" = None,
    attributes: Mapping[str, "ArrayLike | Tensor"] | None = None,
    test_attributes: Mapping[str, "ArrayLike | Tensor"] | None = None,
    value_range: tuple[Number, Number] | None = None,
    standardise: Standardise | None = None,
    declared_size: int | None = None,
    seed: int = 0,
    name: str = "data",
) -> Dataset:
    """Build a data set from a map-style PyTorch dataset, with its transforms.

    Every item is read once, with its transforms, and kept in memory. So random transforms are drawn
    once for each record, and `Dataset.notes` says so; for new random transforms in every step give
    `Views` to the learner. Items are converted as by `from_arrays`; images without a transform to
    tensors become bytes.

    >>> points = torch.utils.data.TensorDataset(torch.rand(40, 3), torch.arange(40) % 2)
    >>> len(from_torch(points, test=points).test)
    40

    Guarantee: none for facts computed from the records, as in `from_arrays`. The test part is
    public.

    Args:
        dataset: dataset whose items are (input, target) pairs, or dicts. Its attribute `classes`,
            as torchvision writes it, names the classes.
        test: dataset of the test part; or the average share of records in the test part.
        keys: places of input and target in an item: positions, or names in a dict.
        task: meaning of the targets: "single-label", "multi-label", "regression", "next-token", or
            an object of a task, such as `Regression()`.
        classes: all classes, as the targets write them. Default: as in `from_arrays`.
        num_classes: number of classes. Default: the number of `classes`.
        ids: (n,) identity of each item, as in `from_arrays`. Default: the position.
        test_ids: (m,) identities of the items of a given test part.
        attributes: further facts of each item, name to (n,) numbers, as in `from_arrays`.
        test_attributes: attributes (m,) of the items of a given test part.
        value_range: declared (smallest, largest) value of inputs after the transforms, as in
            `from_arrays`.
        standardise: constants that scale the inputs, as in `from_arrays`. Default: no scaling.
        declared_size: public number of training records. Default: the number of items.
        seed: seed of the hash that draws the test part, and of random transforms.
        name: name of the data set and of its partition. Other records, or other targets of the same
            records, need another name: a warm start compares names.

    Raises:
        ConfigError: if a setting is not allowed.
        DataError: if an item cannot be read, or has another shape than the first item (with its
            number); other cases as in `from_arrays`.
    """
    notes: dict[str, None] = {}
    own_test = not isinstance(test, int | float)
    label = "training " if own_test else ""
    inputs, targets = _items(dataset, keys, f"{label}dataset", seed, notes)
    value_range = value_range or byte_range(inputs)
    train = Part(
        inputs=float_inputs(inputs, f"{label}inputs", notes),
        targets=targets,
        ids=ids,
        attributes=attributes,
        label=label,
    )
    rest: Part | float
    if isinstance(test, int | float):
        rest = share_of(test, others="a dataset of its own")
        refuse_beside_share(test_ids=test_ids, test_attributes=test_attributes)
    else:
        inputs, targets = _items(test, keys, "test dataset", seed, notes)
        made = float_inputs(inputs, "test inputs", notes)
        rest = Part(
            inputs=made,
            targets=targets,
            ids=test_ids,
            attributes=test_attributes,
            label="test ",
        )
    names = getattr(dataset, "classes", None) if classes is None and num_classes is None else None
    named = isinstance(names, list | tuple) and not isinstance(targets[0], str)
    settings = Settings(
        name=name,
        task=task,
        classes=classes,
        num_classes=len(names) if names and named else num_classes,
        value_range=value_range,
        standardise=standardise,
        declared_size=declared_size,
        seed=seed,
        categories={"target": tuple(map(str, names))} if names and named else {},
    )
    return dataset_of(train, rest, settings, notes)


def _items(
    dataset: MapStyle, keys: tuple[Key, Key], name: str, seed: int, notes: dict[str, None]
) -> tuple[Tensor, list[object]]:
    """Read inputs (n, ...) and the n targets of a dataset, every item once."""
    n = _length(dataset, name)
    rows: Tensor | None = None
    targets = []
    with undisturbed():
        seed_globally(seed)
        for number in range(n):
            value, target = _item(dataset, number, keys, name)
            if rows is None:
                rows = torch.empty(n, *value.shape, dtype=value.dtype)
            if value.shape != rows.shape[1:]:
                raise DataError(
                    f"item {number} of the {name} has shape {tuple(value.shape)}, item 0 "
                    f"{tuple(rows.shape[1:])}; allowed: inputs of one shape; resize or pad them in "
                    "the dataset's transform"
                )
            rows[number] = value
            targets.append(target)
        assert rows is not None
        again = [_item(dataset, number, keys, name)[0] for number in range(min(n, TWICE))]
    if not torch.equal(torch.stack(again).nan_to_num(), rows[: len(again)].nan_to_num()):
        notes[f"transforms of the {name} are random: each record has one random version"] = None
    return rows, targets


def _length(dataset: object, name: str) -> int:
    """Return the number of items; refuse a value without numbered items."""
    kind = type(dataset).__name__
    fix = "perdure.data.from_arrays takes arrays"
    if hasattr(dataset, "dataset") and not hasattr(dataset, "__getitem__"):
        fix = "give the dataset of a loader: loader.dataset"
    if (
        isinstance(dataset, IterableDataset | Tensor | np.ndarray)
        or not hasattr(dataset, "__len__")
        or not hasattr(dataset, "__getitem__")
        or hasattr(dataset, "iloc")
    ):
        raise DataError(
            f"{name} is a {kind}; allowed: a map-style torch.utils.data.Dataset, with numbered "
            f"items and a length; {fix}"
        )
    n = len(dataset)
    if not n:
        raise DataError(f"{name} ({kind}) has no items; allowed: at least one")
    return n


def _item(
    dataset: MapStyle, number: int, keys: tuple[Key, Key], name: str
) -> tuple[Tensor, object]:
    """Return input and target of one item; the target is a number, a word or a list of numbers."""
    try:
        item = dataset[number]
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"item {number} of the {name} cannot be read: {type(error).__name__}: {reason}; repair "
            "the dataset or its transform"
        ) from error
    try:
        value, target = (item[key] for key in keys)  # type: ignore[index]
    except (TypeError, KeyError, IndexError) as error:
        if isinstance(item, Mapping):
            has = f"a dict with {', '.join(map(repr, item))}"
        else:
            size = f" of {len(item)}" if isinstance(item, tuple | list) else ""
            has = f"a {type(item).__name__}{size}"
        raise DataError(
            f"item {number} of the {name} is {has}; allowed: input and target at keys={keys}; "
            "give keys=(...), positions in a tuple or names in a dict"
        ) from error
    pixels = pixels_of(value)
    converted = numbers_of(value if pixels is None else pixels, f"inputs of item {number}")
    return converted, target.tolist() if isinstance(target, Tensor | np.ndarray) else target
