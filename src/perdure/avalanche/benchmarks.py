"""Conversion of Avalanche benchmarks to streams."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from perdure.data.experience import Experience, Stream, size_of_each
from perdure.data.records import Records
from perdure.errors import ConfigError, DataError
from perdure.types import Scenario


def from_avalanche(
    benchmark: Any,
    *,
    declared_size: int | Sequence[int] | None = None,
    assigned_by_record: bool | None = None,
) -> Stream:
    """Turn an Avalanche benchmark for classification into a stream.

    Both streams use the *eval* transforms of Avalanche. Each input is computed once and kept as a
    tensor, so a random transform would be drawn only once and would not augment. Use `Views` for
    augmentation. For a data set of tensors without input transforms this is one fast selection;
    other data sets are read item by item.

    The scenario is `task` if the task labels differ between experiences, `domain` if there are
    several experiences with the same classes, and `class` in all other cases. If tasks share
    classes (the labels of each task start at 0), every task gets its own outputs in the head.
    Experience e is tested on the e-th experience of the test stream (or on its only one),
    restricted to the classes of training experience e.

    Guarantee: ids are indices into the source, so a record has the same id in all experiences.
    Experiences are separate partitions if neither classes nor records overlap; if they overlap, all
    experiences share one partition and their privacy costs add up. Two tensor data sets over the
    same tensor of inputs (the same people with other labels) hold the same records. The classes
    that the benchmark lists count as declared, so they are public.

    `assigned_by_record` of the stream is True if no record of a source was left out and either the
    classes are disjoint, or every experience has all records. It is False if experiences share
    classes and do not all have the same records (a random cut). It is None in the other cases, such
    as a validation stream that was cut off: the rule cannot be known, and privacy refuses the
    stream until you pass `assigned_by_record`.

    Args:
        benchmark: benchmark of Avalanche 0.6, with `streams["train"]` and `streams["test"]`.
        declared_size: public number of training records in an experience; one for all experiences,
            or one for each. Default: the actual number.
        assigned_by_record: True if the experience of a record depends only on the record and public
            facts, False if not; needed only if the benchmark does not show it; see `Stream`.

    Raises:
        ConfigError: if `benchmark` has no train and test streams.
        DataError: if the items are not (tensor, label), or the train and test streams do not match.
    """
    train, test = _streams(benchmark)
    _refuse_without_targets({"training": train, "test": test})
    sources = _Sources()
    tasks = task_labels(benchmark)
    parts = [sources.records(part.dataset) for part in train]
    shown = torch.cat([part.ids for part in parts])
    whole = sources.seen == len(torch.unique(shown))
    measured = [sources.records(part.dataset) for part in test]
    classes = [
        tuple(sorted(int(label) for label in part.dataset.targets.uniques)) for part in train
    ]
    offsets = _offsets(tasks, classes)
    by_class = sum(map(len, classes)) == len(set().union(*classes))
    # Different classes are not enough: another task may have the same records with other labels.
    disjoint = by_class and len(shown) == len(torch.unique(shown))
    if assigned_by_record is None and (disjoint or _same_records(parts)):
        assigned_by_record = True if whole else None
    elif assigned_by_record is None and not by_class:
        assigned_by_record = False
    sizes = size_of_each(declared_size, len(parts))
    experiences = tuple(
        Experience(
            index=e,
            train=_shifted(
                part.declared(sizes[e]), offsets[e], f"experience-{e}" if disjoint else "avalanche"
            ),
            test=_shifted(
                _of_classes(measured[min(e, len(test) - 1)], classes[e]),
                offsets[e],
                "avalanche-test",
            ),
            classes=tuple(label + offsets[e] for label in classes[e]),
        )
        for e, part in enumerate(parts)
    )
    return Stream(
        name="avalanche",
        scenario=_scenario(tasks, classes),
        experiences=experiences,
        num_classes=1 + max(label for experience in experiences for label in experience.classes),
        input_shape=tuple(parts[0].inputs.shape[1:]),
        assigned_by_record=assigned_by_record,
    )


def task_labels(benchmark: Any) -> list[int]:
    """Task label of every training experience in Avalanche; 0 if there is none."""
    return [_task_of(part, index) for index, part in enumerate(_streams(benchmark)[0])]


def _streams(benchmark: Any) -> tuple[list[Any], list[Any]]:
    streams = getattr(benchmark, "streams", {})
    if not {"train", "test"} <= set(streams):
        raise ConfigError.of(
            "benchmark",
            type(benchmark).__name__,
            "an Avalanche benchmark with a train and a test stream",
        )
    train = list(streams["train"])
    test = list(streams["test"])
    if len(test) not in (1, len(train)):
        raise DataError(
            f"{len(train)} training experiences but {len(test)} test experiences; allowed: equal "
            "numbers, or one test experience"
        )
    return train, test


def _task_of(experience: Any, index: int) -> int:
    labels = getattr(experience.dataset, "targets_task_labels", None)
    tasks = {0} if labels is None else {int(label) for label in labels.uniques}
    if len(tasks) > 1:
        raise DataError(
            f"experience {index} mixes the tasks {sorted(tasks)}; give each task its own experience"
        )
    return tasks.pop()


def _refuse_without_targets(streams: Mapping[str, Sequence[Any]]) -> None:
    """Refuse data sets without targets, because Avalanche then does not know the classes.

    Raises:
        DataError: names the stream and the experience.
    """
    for name, parts in streams.items():
        for index, part in enumerate(parts):
            labels = getattr(getattr(part.dataset, "targets", None), "uniques", None)
            if labels is None:
                raise DataError(
                    f"{name} experience {index} has no targets; give its data set some before the "
                    "benchmark is made, such as dataset.targets = labels.tolist()"
                )
            strange = [label for label in labels if not _is_class(label)]
            if strange:
                raise DataError(
                    f"{name} experience {index} has the target {strange[0]!r}; allowed: whole "
                    "numbers from 0, one per record, as its class; other tasks need "
                    "perdure.data.from_arrays or from_torch"
                )


def _is_class(label: Any) -> bool:
    try:
        return int(label) == label and int(label) >= 0
    except (TypeError, ValueError, RuntimeError):
        return False


def _scenario(tasks: Sequence[int], classes: Sequence[tuple[int, ...]]) -> Scenario:
    if len(set(tasks)) > 1:
        return "task"
    return "domain" if len(classes) > 1 and len(set(classes)) == 1 else "class"


def _offsets(tasks: Sequence[int], classes: Sequence[tuple[int, ...]]) -> list[int]:
    """Return the number to add to the labels of each experience, so that tasks share no output."""
    by_task = {
        task: {c for t, held in zip(tasks, classes, strict=True) if t == task for c in held}
        for task in tasks
    }
    width = 1 + max(label for held in classes for label in held)
    shared = sum(map(len, by_task.values())) > len(set().union(*by_task.values()))
    return [list(by_task).index(task) * width if shared else 0 for task in tasks]


def _shifted(records: Records, offset: int, partition: str) -> Records:
    """Add `offset` to the labels of records, and set their partition."""
    return replace(records, labels=records.labels + offset, partition=partition)


def _of_classes(records: Records, classes: tuple[int, ...]) -> Records:
    return records.take(torch.isin(records.labels, torch.tensor(classes)))


def _same_records(parts: Sequence[Records]) -> bool:
    """Return True if all experiences have the same records, in any order."""
    return all(torch.equal(part.ids.sort().values, parts[0].ids.sort().values) for part in parts)


class _Sources:
    """Data sets from which all views, subsets and concatenations of a benchmark are made.

    Each source gets a range of record ids, one per item, when it is used for the first time. A
    record in several experiences has the same id in all of them, so privacy counts it as one
    record.
    """

    def __init__(self) -> None:
        self._first_ids: list[tuple[Any, int]] = []
        self._next = 0

    def records(self, dataset: Any) -> Records:
        """All records of an Avalanche data set after its eval transforms, in its order."""
        with_eval_transforms = dataset.eval()
        transforms: list[Any] = []  # filled by _origins
        positions = range(len(with_eval_transforms))
        origins = _origins(with_eval_transforms, positions, transforms)
        selected = _selected_at_once(with_eval_transforms, origins, transforms)
        inputs, labels = selected or _item_by_item(with_eval_transforms)
        ids = torch.tensor([self._first_id(source) + row for source, row in origins])
        return Records(inputs=inputs, labels=labels, ids=ids, ids_by_position=True)

    @property
    def seen(self) -> int:
        """Number of records of all sources so far, also of records that no experience uses."""
        return self._next

    def _first_id(self, source: Any) -> int:
        """Id of the first record of a source; a new source gets the next free ids."""
        for known, first in self._first_ids:
            if known is source or _over_one_tensor(known, source):
                return first
        self._first_ids.append((source, self._next))
        self._next += len(source)
        return self._first_ids[-1][1]


def _over_one_tensor(one: Any, other: Any) -> bool:
    """Return True if two sources are tensor data sets with the same tensor of inputs."""
    if not (isinstance(one, TensorDataset) and isinstance(other, TensorDataset)):
        return False
    mine = one.tensors[0]
    theirs = other.tensors[0]
    same_place = mine.data_ptr() == theirs.data_ptr() and mine.stride() == theirs.stride()
    return bool(len(mine)) and same_place and mine.shape == theirs.shape


def _origins(dataset: Any, rows: Sequence[int], transforms: list[Any]) -> list[tuple[Any, int]]:
    """Trace each row to its source data set and its index there.

    The transforms of every layer in between are appended to `transforms`.

    Avalanche's own `leaf_datasets` loses the order across sources, and fails if a source has no
    row.
    """
    from avalanche.benchmarks.utils.flat_data import FlatData

    layer = getattr(dataset, "_flat_data", dataset)
    for groups in ("_frozen_transform_groups", "_transform_groups"):
        held = getattr(layer, groups, None)
        transforms += [] if held is None else [held[held.current_group]]
    if isinstance(layer, Subset):
        return _origins(layer.dataset, [layer.indices[row] for row in rows], transforms)
    if isinstance(layer, FlatData):
        rows = rows if layer._indices is None else [layer._indices[row] for row in rows]
        return _origins_of_parts(layer._datasets, rows, transforms)
    if isinstance(layer, ConcatDataset):
        return _origins_of_parts(layer.datasets, rows, transforms)
    return [(layer, int(row)) for row in rows]


def _origins_of_parts(
    parts: Sequence[Any], rows: Sequence[int], transforms: list[Any]
) -> list[tuple[Any, int]]:
    """Trace rows of concatenated data sets to their sources (see `_origins`)."""
    ends = list(accumulate(len(part) for part in parts))
    which = [bisect_right(ends, row) for row in rows]
    traced = []
    for k, part in enumerate(parts):
        start = ends[k] - len(part)
        own = [row - start for row, owner in zip(rows, which, strict=True) if owner == k]
        traced.append(iter(_origins(part, own, transforms) if own else []))
    return [next(traced[owner]) for owner in which]


def _selected_at_once(
    dataset: Any, origins: Sequence[tuple[Any, int]], transforms: Sequence[Any]
) -> tuple[Tensor, Tensor] | None:
    """Read inputs (n, ...) float32 and labels (n,) by one index selection, which is fast.

    None if not all rows come from one TensorDataset without input transforms.
    """
    source = origins[0][0]
    changed = any(
        transform is not None and transform.flat_transforms(0) for transform in transforms
    )
    mixed = any(other is not source for other, _ in origins)
    if changed or mixed or not isinstance(source, TensorDataset):
        return None
    inputs: Tensor = source.tensors[0][[row for _, row in origins]]
    return inputs.float().cpu(), torch.tensor([int(label) for label in dataset.targets])


def _item_by_item(dataset: Any) -> tuple[Tensor, Tensor]:
    """Read inputs (n, ...) float32 and labels (n,) item by item, with the transforms.

    Raises:
        DataError: if inputs are neither tensors nor arrays.
    """
    items = [dataset[position][:2] for position in range(len(dataset))]
    if not all(hasattr(x, "__array__") and hasattr(x, "dtype") for x, _ in items):
        given = type(items[0][0]).__name__
        raise DataError(
            f"inputs are {given} after the eval transforms; give the benchmark "
            "eval_transform=ToTensor()"
        )
    inputs = torch.stack([torch.as_tensor(x) for x, _ in items]).float().cpu()
    return inputs, torch.tensor([int(y) for _, y in items])
