"""Data sets from arrays: NumPy arrays, tensors, lists."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

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
from perdure.data.sources.values import numbers_of
from perdure.tasks import Task
from perdure.utils.checked_arguments import checked_arguments

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@checked_arguments
def from_arrays(
    inputs: "ArrayLike | Tensor",
    targets: "ArrayLike | Tensor",
    *,
    test: "tuple[ArrayLike | Tensor, ArrayLike | Tensor] | float" = 0.2,
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
    """Build a data set from numpy arrays, tensors or lists, checked row by row.

    Inputs become float32, and `Dataset.notes` says so. Images of bytes, (n, height, width),
    (n, channels, height, width) or channels last, are divided by 255 and have their channels first.
    Other numbers keep their values, except with `standardise`.

    >>> data = from_arrays([[0.1, 0.2], [0.9, 0.8], [0.2, 0.1]], ["no", "yes", "no"], test=0.3)

    Guarantee: none for facts computed from the records: the number of rows and the classes, unless
    they are declared. `Dataset.public_facts` lists them. The test part is public.

    Args:
        inputs: (n, ...) numbers, one row per record. A memory-mapped array is not copied if it is
            float32 or larger than 256 MiB: it is then converted batch by batch.
        targets: (n,) the class of each record, as a number from 0 or as a word; for multi-label
            (n, C) of 0 and 1; for regression (n,) or (n, k) numbers.
        test: (inputs, targets) of the test part; or the average share of records in the test part,
            chosen by a hash of their ids.
        task: meaning of the targets: "single-label", "multi-label", "regression", "next-token", or
            an object of a task, such as `Regression()`.
        classes: all classes, as the targets write them; their order gives the numbers. Default:
            the words of the training part in alphabetical order.
        num_classes: number of classes, if targets are numbers.
        ids: (n,) identity of each record, a whole number or a word, each once. Under privacy they
            decide the experience or client of a record. Default: the position; privacy then needs a
            test part of its own, because a hash of positions would let one record move others.
        test_ids: (m,) identities of the records of a given test part.
        attributes: further facts of each record, name to (n,) numbers, such as "time", "domain" or
            "group".
        test_attributes: attributes (m,) of the records of a given test part.
        value_range: declared (smallest, largest) value of inputs before scaling; each one number,
            or one for every column or channel. The guard of a private run looks at this range.
            Default: (0, 1) for images of bytes; none for other inputs.
        standardise: "declared" maps `value_range` to -1 .. 1; (mean, deviation) are constants that
            you declare, one number or one for every column or channel; a
            `perdure.privacy.ReleasedScaling` releases constants of the training records with
            noise. Default: no scaling.
        declared_size: public number of training records. Default: the number of rows.
        seed: seed of the hash that draws the test part.
        name: name of the data set and of its partition. Other records, or other targets of the same
            records, need another name: a warm start compares names.

    Raises:
        ConfigError: if a setting is not allowed.
        DataError: if values are not numbers, not finite or out of range (with row and column), if
            numbers of rows differ, or if an id occurs twice or in both parts.
    """
    notes: dict[str, None] = {}
    label = "training " if isinstance(test, tuple | list) else ""
    numbers = numbers_of(inputs, f"{label}inputs")
    train = Part(
        inputs=float_inputs(numbers, f"{label}inputs", notes),
        targets=targets,
        ids=ids,
        attributes=attributes,
        label=label,
    )
    rest: Part | float
    if isinstance(test, tuple | list) and len(test) == 2:
        rest = Part(
            inputs=float_inputs(numbers_of(test[0], "test inputs"), "test inputs", notes),
            targets=test[1],
            ids=test_ids,
            attributes=test_attributes,
            label="test ",
        )
    else:
        rest = share_of(test, others="(inputs, targets)")
        refuse_beside_share(test_ids=test_ids, test_attributes=test_attributes)
    settings = Settings(
        name=name,
        task=task,
        classes=classes,
        num_classes=num_classes,
        value_range=value_range or byte_range(numbers),
        standardise=standardise,
        declared_size=declared_size,
        seed=seed,
    )
    return dataset_of(train, rest, settings, notes)
