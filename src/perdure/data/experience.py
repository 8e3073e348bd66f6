"""Experiences and streams: the data to learn, in their order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from perdure.data.records import Records
from perdure.errors import ConfigError, DataError
from perdure.tasks import Task
from perdure.types import SCENARIOS, Scenario


@dataclass(frozen=True, kw_only=True, eq=False)
class Experience:
    """One stage of a stream.

    Args:
        index: its place in the stream, from 0.
        train: records to learn from.
        test: records to be measured on, declared public.
        classes: the declared classes, as outputs of the full-width head: classes, labels or
            tokens; all outputs for regression. Public, whatever the records hold.
        stage: the stage this one is part of, where a stage was cut into pieces (`online`). Default:
            `index`.

    Raises:
        DataError: when a label is not among the declared classes, or the test records are of
            another task.
    """

    index: int
    train: Records
    test: Records
    classes: tuple[int, ...]
    stage: int = -1

    def __post_init__(self) -> None:
        if self.stage < 0:
            object.__setattr__(self, "stage", self.index)
        for part, records in (("train", self.train), ("test", self.test)):
            if records.task != self.task:
                raise DataError(
                    f"experience {self.index} has {self.task.name} records to train on and "
                    f"{records.task.name} ones to test on; give both the same task"
                )
            found = self.task.undeclared(records.labels, self.classes)
            if found:
                raise DataError(
                    f"experience {self.index} has {part} {found}; declared: {self.classes}"
                )

    @property
    def task(self) -> Task:
        """Task of the records."""
        return self.train.task

    def without_records(self) -> "Experience":
        """Return the same experience with no training record: its declared facts alone."""
        empty = self.train.map(lambda rows: rows.new_empty(0, *rows.shape[1:]))
        return replace(self, train=empty)


@dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """Experiences in the order in which they are met.

    Args:
        name: for reports.
        scenario: task (the learner is told the task), domain (same classes, other inputs) or class
            (classes arrive over time and the learner must tell them all apart).
        experiences: at least one, numbered from 0.
        num_classes: full width of the head: classes, labels, targets or tokens.
        input_shape: shape of one input.
        assigned_by_record: whether a record's place depends on the record and public facts alone.
            Where it does not, a guarantee under add/remove adjacency does not hold. None where
            nobody said: a stream made by hand has to say which it is before it is used under
            privacy.

    Raises:
        ConfigError: for another scenario, no experiences, wrong numbering, classes outside the
            head, or records of several tasks.

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
        if [experience.index for experience in self] != list(range(max(1, len(self)))):
            indices = [experience.index for experience in self]
            raise ConfigError.of("experiences", indices, "indices 0, 1, 2, ... and at least one")
        declared = {label for experience in self for label in experience.classes}
        if not declared <= set(range(self.num_classes)):
            raise ConfigError.of("classes", sorted(declared), f"0 .. {self.num_classes - 1}")
        names = {experience.task: experience.task.name for experience in self}
        if len(names) > 1:
            raise ConfigError.of("tasks of the experiences", sorted(names.values()), "one task")

    @property
    def task(self) -> Task:
        """Task of the records."""
        return self.experiences[0].task

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

        Records that experiences share are moved once.
        """
        moved: dict[int, Records] = {}
        for records in (
            part for experience in self for part in (experience.train, experience.test)
        ):
            if id(records) not in moved:
                there = records.to(device)
                same = there.inputs is records.inputs and there.labels is records.labels
                moved[id(records)] = records if same else there
        if all(id(records) == key for key, records in moved.items()):
            return self
        experiences = (
            replace(experience, train=moved[id(experience.train)], test=moved[id(experience.test)])
            for experience in self
        )
        return replace(self, experiences=tuple(experiences))


def placed_again(stream: Stream, by_record: bool) -> bool | None:
    """Return `assigned_by_record` of a stream whose records were placed once more.

    Args:
        stream: before that.
        by_record: whether the new place depends on the record and public facts alone.
    """
    return stream.assigned_by_record if by_record else False


def size_of_each(declared_size: int | Sequence[int] | None, experiences: int) -> list[int | None]:
    """Declared size of every experience: one number for all, or one each; None where none is given.

    Raises:
        ConfigError: for another number of sizes.
    """
    if declared_size is None or not isinstance(declared_size, Sequence):
        return [declared_size] * experiences
    if len(declared_size) != experiences:
        raise ConfigError.of(
            "declared_size", tuple(declared_size), f"a number, or {experiences}, one an experience"
        )
    return list(declared_size)
