"""Experiences and streams: the data to learn from, in the order of training."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby, islice
from typing import overload

import torch

from perdure.data.records import Records, require_type
from perdure.errors import ConfigError, DataError
from perdure.tasks import Task
from perdure.types import SCENARIOS, Scenario

NO_TEST = Records(inputs=torch.empty(0), labels=torch.empty(0, dtype=torch.int64))
"""Test records of an experience that has none yet."""


def _no_rows(records: Records) -> Records:
    """Return the same records without any rows, so that only declared facts remain."""
    return records.map(lambda rows: rows.new_empty(0, *rows.shape[1:]))


def _no_test(train: Records) -> Records:
    """Return test records of the same kind as `train`, without any rows."""
    return replace(_no_rows(train), partition="no test", declared_size=0, placed_by="")


@dataclass(frozen=True, kw_only=True, eq=False)
class Experience:
    """One experience of a stream: its training and test records, and its declared classes.

    Args:
        index: position in the stream, from 0.
        train: training records.
        test: records for the evaluation, declared public. Leave them out if there are none yet: the
            experience is not evaluated until `Stream.with_test` adds some.
        classes: the declared classes, as outputs of the full-width head: classes, labels or tokens;
            all outputs for regression. They are public and do not depend on the records.
        stage: number of the stage that this experience belongs to, if a stage was cut into pieces
            (`online`). Default: `index`.

    Raises:
        DataError: if a label is not among the declared classes, or the test records have another
            task.
    """

    index: int
    train: Records
    test: Records = NO_TEST
    classes: tuple[int, ...]
    stage: int = -1

    def __post_init__(self) -> None:
        if self.test is NO_TEST:
            object.__setattr__(self, "test", _no_test(self.train))
        if self.stage < 0:
            object.__setattr__(self, "stage", self.index)
        classes: object = self.classes
        if not isinstance(classes, Sequence) or isinstance(classes, str):
            raise ConfigError.of("classes", self.classes, "a tuple of whole numbers, as (0, 1)")
        for part, records in (("train", self.train), ("test", self.test)):
            name = f"{part} of experience {self.index}"
            require_type(records, Records, name, "a perdure.Records")
            if records.task != self.task:
                raise DataError(
                    f"experience {self.index} has {self.task.name} training records but "
                    f"{records.task.name} test records; give both the same task"
                )
            found = records.undeclared(self.classes)
            if found:
                raise DataError(
                    f"experience {self.index} has {part} {found}; allowed: the declared classes "
                    f"{self.classes}; declare the others too, or leave their records out"
                )
        mine = (self.train.inputs.shape[1:], self.train.inputs.dtype)
        theirs = (self.test.inputs.shape[1:], self.test.inputs.dtype)
        if mine != theirs:
            raise DataError(
                f"experience {self.index} has training inputs of shape {tuple(mine[0])} in "
                f"{mine[1]} and test inputs of shape {tuple(theirs[0])} in {theirs[1]}; allowed: "
                "one shape and type; convert one of them"
            )

    @property
    def task(self) -> Task:
        """Task of the records."""
        return self.train.task

    def without_records(self) -> "Experience":
        """Return the same experience without training records; declared facts remain."""
        return replace(self, train=_no_rows(self.train))


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """Experiences that are evaluated together: a single one, or the pieces of one.

    Args:
        number: index of the stage in the stream, which is a column of the accuracy matrix.
        first: index of the first experience.
        last: index of the last experience.
        test: test records of all of these experiences.
    """

    number: int
    first: int
    last: int
    test: Records

    def latest(self, after: int) -> int:
        """Return the index of the stage's last trained experience, once `after` was trained.

        If none of its experiences was trained yet, this is the first one.
        """
        return min(self.last, max(self.first, after))


@dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """Experiences in the order of training.

    Args:
        name: name of the stream, for reports.
        scenario: `task` (the task of each record is known in prediction), `domain` (same classes,
            other inputs) or `class` (new classes arrive over time, and a prediction is over all of
            them).
        experiences: at least one, numbered from 0.
        num_classes: full width of the head: classes, labels, targets or tokens.
        input_shape: shape of one input.
        assigned_by_record: True if the experience of a record depends only on the record and on
            public facts. If False, no guarantee under add/remove adjacency holds. None if not
            known. Privacy refuses None, so set it to True or False for a stream that you build
            yourself.

    Raises:
        ConfigError: if the scenario is not known, there are no experiences, the numbering is wrong,
            classes are outside the head, records have several tasks, or the experiences of a stage
            are not consecutive or have different test records.

    Source: van de Ven, Tuytelaars, Tolias 2022, "Three types of incremental learning".
    """

    name: str
    scenario: Scenario
    experiences: tuple[Experience, ...]
    num_classes: int
    input_shape: tuple[int, ...]
    assigned_by_record: bool | None = None

    def __post_init__(self) -> None:
        if self.scenario not in SCENARIOS:
            raise ConfigError.of("scenario", self.scenario, SCENARIOS)
        parts: object = self.experiences
        for part in parts if isinstance(parts, tuple | list) else [parts]:
            require_type(part, Experience, f"an experience of {self.name}", "a perdure.Experience")
        if [experience.index for experience in self] != list(range(max(1, len(self)))):
            indices = [experience.index for experience in self]
            raise ConfigError.of("experiences", indices, "indices 0, 1, 2, ... and at least one")
        declared = {label for experience in self for label in experience.classes}
        if not declared <= set(range(self.num_classes)):
            raise ConfigError.of("classes", sorted(declared), f"0 .. {self.num_classes - 1}")
        names = {experience.task: experience.task.name for experience in self}
        if len(names) > 1:
            raise ConfigError.of("tasks of the experiences", sorted(names.values()), "one task")
        _ = self.stages  # refuse stages that cannot be evaluated

    @property
    def task(self) -> Task:
        """Task of the records."""
        return self.experiences[0].task

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """Stages of the stream: experiences, or groups of them, that are evaluated together.

        Raises:
            ConfigError: if the experiences of a stage are not consecutive, or have different test
                records.
        """
        stages: list[Stage] = []
        met: set[int] = set()
        for name, group in groupby(self.experiences, key=lambda each: each.stage):
            parts = list(group)
            test = parts[0].test
            if any(part.test is not test and len(part.test) + len(test) for part in parts):
                raise ConfigError(
                    f"experiences {parts[0].index} to {parts[-1].index} are one stage and have "
                    "different test records; give all of them the same object"
                )
            if name in met:
                raise ConfigError(
                    f"experience {parts[0].index} goes back to stage {name}; allowed: the "
                    "experiences of a stage one after the other"
                )
            met.add(name)
            stages.append(
                Stage(
                    number=len(stages),
                    first=parts[0].index,
                    last=parts[-1].index,
                    test=test,
                )
            )
        return tuple(stages)

    def with_test(self, stage: int, test: Records) -> "Stream":
        """Return the stream with other test records for a stage, for example later ones.

        A learner that continues with this stream evaluates the stage on them.

        Args:
            stage: index in `stages`; in a stream without pieces, the index of the experience.
            test: test records, declared public.

        Raises:
            ConfigError: if there is no such stage.
            DataError: if the records have undeclared classes or another task.
        """
        if not 0 <= stage < len(self.stages):
            raise ConfigError.of("stage", stage, f"0 to {len(self.stages) - 1}")
        its = self.stages[stage]
        parts = list(self.experiences)
        for index in range(its.first, its.last + 1):
            parts[index] = replace(parts[index], test=test)
        return replace(self, experiences=tuple(parts))

    def upto(self, index: int) -> "Seen":
        """Return the experiences up to and including `index`."""
        return Seen(self, index + 1)

    @cached_property
    def declared_sizes(self) -> tuple[int, ...]:
        """Declared number of training records up to and including each experience."""
        return tuple(accumulate(each.train.declared_size for each in self))

    @cached_property
    def partitions(self) -> tuple[frozenset[str], ...]:
        """Partitions up to and including each experience."""
        found = [frozenset[str]()]
        for each in self:
            known = found[-1]
            new = each.train.partition
            found.append(known if new in known else known | {new})
        return tuple(found[1:])

    def stage_of(self, index: int) -> Stage:
        """Return the stage that contains experience `index`."""
        return self.stages[bisect_right(self.stages, index, key=lambda each: each.first) - 1]

    def __iter__(self) -> Iterator[Experience]:
        return iter(self.experiences)

    def __len__(self) -> int:
        return len(self.experiences)

    def __getitem__(self, index: int) -> Experience:
        return self.experiences[index]

    def __repr__(self) -> str:
        return (
            f"Stream({self.name!r}, {self.scenario}-incremental, {len(self)} experiences, "
            f"{self.num_classes} classes, inputs {self.input_shape})"
        )

    def to(self, device: torch.device | str) -> "Stream":
        """Return the same stream on another device.

        Records that several experiences share are moved only once.
        """
        moved: dict[int, Records] = {}
        for records in (
            part for experience in self for part in (experience.train, experience.test)
        ):
            if id(records) not in moved:
                moved[id(records)] = records.to(device)
        if all(id(records) == key for key, records in moved.items()):
            return self
        experiences = (
            replace(experience, train=moved[id(experience.train)], test=moved[id(experience.test)])
            for experience in self
        )
        return replace(self, experiences=tuple(experiences))


class Seen(Sequence[Experience]):
    """First experiences of a stream, without a copy, with their declared totals.

    The totals are cached, because a stream may have thousands of pieces.

    Args:
        stream: the stream.
        count: number of experiences.
    """

    def __init__(self, stream: Stream, count: int) -> None:
        self._stream = stream
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Experience: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Experience]: ...

    def __getitem__(self, index: int | slice) -> Experience | Sequence[Experience]:
        places = range(self._count)[index]
        if isinstance(places, int):
            return self._stream[places]
        if places.start == 0 and places.step == 1:
            return Seen(self._stream, len(places))
        return tuple(self._stream[place] for place in places)

    def __iter__(self) -> Iterator[Experience]:
        return islice(self._stream.experiences, self._count)

    @property
    def declared_size(self) -> int:
        """Total declared number of training records of these experiences."""
        return self._stream.declared_sizes[self._count - 1] if self._count else 0

    @property
    def partitions(self) -> frozenset[str]:
        """Partitions of these experiences."""
        return self._stream.partitions[self._count - 1] if self._count else frozenset()


def declared_size_of(experiences: Sequence[Experience]) -> int:
    """Return the declared number of training records of all experiences."""
    if isinstance(experiences, Seen):
        return experiences.declared_size
    return sum(each.train.declared_size for each in experiences)


def partitions_of(experiences: Sequence[Experience]) -> frozenset[str]:
    """Return the partitions of all experiences."""
    if isinstance(experiences, Seen):
        return experiences.partitions
    return frozenset(each.train.partition for each in experiences)


def require_stream(stream: object) -> None:
    """Refuse a value that is not a `Stream`; the message names the function that makes one.

    Args:
        stream: value given by the user.

    Raises:
        DataError: if the value is not a `Stream`.
    """
    if not isinstance(stream, Stream):
        raise DataError(
            f"stream is a {type(stream).__name__}; allowed: a perdure.Stream; "
            "perdure.data.split(dataset, scenario='class', experiences=5) makes one of a data set"
        )


def placed_again(stream: Stream, by_record: bool) -> bool | None:
    """Return `assigned_by_record` for a stream whose records are assigned to parts once more.

    Args:
        stream: stream before the second assignment.
        by_record: True if the second assignment depends only on the record and public facts.
    """
    return stream.assigned_by_record if by_record else False


def size_of_each(declared_size: int | Sequence[int] | None, experiences: int) -> list[int | None]:
    """Return the declared size of every experience, from one number for all, or one for each.

    The size of an experience is None if no number is given.

    Raises:
        ConfigError: if the number of sizes is wrong.
    """
    if declared_size is None or not isinstance(declared_size, Sequence):
        return [declared_size] * experiences
    if len(declared_size) != experiences:
        raise ConfigError.of(
            "declared_size",
            tuple(declared_size),
            f"one number, or {experiences} numbers, one per experience",
        )
    return list(declared_size)
