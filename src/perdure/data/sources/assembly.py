"""Assembly of a `Dataset` from a user's converted inputs: checks, test part, scaling."""

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from dataclasses import field as filled_with

import torch
from torch import Tensor

from perdure.data.datasets.base import Dataset
from perdure.data.domain import InputDomain
from perdure.data.records import Records
from perdure.data.scenarios import public_coin
from perdure.data.sources.ids import attributes_of, ids_of
from perdure.data.sources.inputs import (
    Number,
    Scaling,
    Standardise,
    is_release,
    refuse_bad_inputs,
    released_scaling,
    scaling_of,
)
from perdure.data.sources.targets import Classes, TaskName, converted, given_classes, task_of
from perdure.data.sources.values import LARGEST
from perdure.errors import ConfigError, DataError
from perdure.tasks import Task

TEST = 4
"""Number that makes the hash for the test part different from other hashes of the ids."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Training or test part of a data set: converted inputs, and the user's targets and ids.

    Args:
        inputs: (n, ...) float32, or int64 tokens.
        targets: one target per row.
        ids: one id per row; None if no ids were given.
        attributes: name to values, one per row.
        label: name of the part in messages, before the word "inputs".
    """

    inputs: Tensor
    targets: object
    ids: object | None = None
    attributes: Mapping[str, object] | None = None
    label: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Settings:
    """Declarations of a user about a data set.

    Args:
        name: name of the data set and of its partition.
        task: meaning of the targets, by name or as an object.
        classes: names of the classes in the order of their numbers; None if not declared.
        num_classes: number of classes; None if not declared.
        value_range: smallest and largest value of inputs before scaling.
        standardise: constants for scaling, or the release of such constants.
        declared_size: public number of training records; None for the number of rows.
        seed: seed of the hash that draws the test part.
        columns: names of the columns of inputs (n, k), if they have names.
        domain: declared domain of inputs that are not floats.
        facts: sentences about facts that are declared public.
        categories: names of the values of attributes.
        numbered_by_records: attributes whose values were found in the records; see `Records`.
    """

    name: str
    task: TaskName | Task = "single-label"
    classes: Sequence[object] | None = None
    num_classes: int | None = None
    value_range: tuple[Number, Number] | None = None
    standardise: Standardise | None = None
    declared_size: int | None = None
    seed: int = 0
    columns: Sequence[str] = ()
    domain: InputDomain | None = None
    facts: tuple[str, ...] = ()
    categories: Mapping[str, tuple[str, ...]] = filled_with(default_factory=dict)
    numbered_by_records: tuple[str, ...] = ()


def dataset_of(
    train: Part, test: Part | float, settings: Settings, notes: dict[str, None]
) -> Dataset:
    """Check all parts, cut off a test part if a share is given, scale, and build the data set.

    A public hash of the ids decides which records are in the test part, so the part of a record
    that has its own id depends on no other record. Without such ids, removing one row would move
    other rows between the parts. Such training records are marked, and privacy and releases refuse
    them.

    Args:
        train: training rows; if `test` is a share, all rows.
        test: test rows, or the share of the test part.
        settings: declarations of the user.
        notes: notes about changes to the data so far.

    Raises:
        ConfigError: if a declaration is not allowed.
        DataError: if the values of a part are not allowed.
    """
    if not isinstance(settings.name, str) or not settings.name:
        raise ConfigError.of("name", settings.name, "a text that is not empty")
    if isinstance(settings.seed, bool) or not isinstance(settings.seed, int):
        raise ConfigError.of("seed", settings.seed, "a whole number")
    shape = tuple(train.inputs.shape[1:])
    scaling = scaling_of(settings.standardise, settings.value_range, shape)
    task = task_of(settings.task)
    classes = given_classes(settings.classes, settings.num_classes)
    parts = [train, test] if isinstance(test, Part) else [train]
    made = []
    for part in parts:
        _refuse_bad_rows(part, shape, scaling, settings.columns)
        targets, classes = converted(part.targets, task, classes, f"{part.label}targets", notes)
        made.append(_records(part, targets, task, settings.name))
    assert classes is not None
    found = list(settings.facts)
    if not classes.declared:
        found.append("the classes found in the records are declared public")
    facts = list(found)
    if settings.declared_size is None:
        facts.append("the number of training records is declared public")
    if isinstance(test, Part):
        learnt, measured = _with_other_ids(*made)
    else:
        (whole,) = made
        out = public_coin(whole.ids, seed=settings.seed, purpose=TEST) < test
        learnt = replace(whole.take(~out), drawn_by_position=whole.ids_by_position)
        measured = whole.take(out)
        facts.append(f"the test part, a share of {test:g} by a hash of the ids, is public")
    learnt = replace(
        learnt.declared(settings.declared_size),
        public_facts=tuple(found),
        numbered_by_records=settings.numbered_by_records,
    )
    if is_release(settings.standardise):
        _refuse_drawn_by_position(learnt)
        scaling, learnt = released_scaling(settings.standardise, scaling, learnt)
        facts.append("mean and deviation of the inputs are a private release")
    domain = settings.domain or scaling.domain(shape)
    return Dataset(
        name=settings.name,
        train=_scaled(learnt, scaling, domain),
        test=replace(_scaled(measured, scaling, domain), partition=f"{settings.name}-test"),
        num_classes=classes.number,
        input_shape=shape,
        public_facts=tuple(facts),
        notes=tuple(notes),
        categories={**_named(classes), **settings.categories},
    )


def _refuse_bad_rows(
    part: Part, shape: tuple[int, ...], scaling: Scaling, columns: Sequence[str]
) -> None:
    """Refuse inputs with another shape than the first part, not finite, or out of range."""
    given = tuple(part.inputs.shape[1:])
    if given != shape:
        raise DataError(f"{part.label}inputs have rows of shape {given}; allowed: {shape}")
    refuse_bad_inputs(part.inputs, scaling, f"{part.label}inputs", columns)


def _records(part: Part, targets: Tensor, task: Task, name: str) -> Records:
    """Build the records of a part, after a check that every row has a target, id and attributes."""
    ids = part.ids
    attributes = attributes_of(part.attributes, f"{part.label}attributes")
    n = len(part.inputs)
    found = torch.empty(0, dtype=torch.int64) if ids is None else ids_of(ids, f"{part.label}ids")
    given: dict[str, Sized] = {f"{part.label}targets": targets}
    given |= {} if ids is None else {f"{part.label}ids": found}
    given |= {f"{part.label}attributes[{key!r}]": value for key, value in attributes.items()}
    for what, rows in given.items():
        if len(rows) != n:
            raise DataError(
                f"{n} {part.label}inputs but {len(rows)} {what}; give one for each input"
            )
    return Records(
        inputs=part.inputs,
        labels=targets,
        ids=found,
        partition=name,
        attributes=attributes,
        task=task,
    )


def _with_other_ids(train: Records, test: Records) -> tuple[Records, Records]:
    """Give the test records ids that follow the training ids, if no ids were given."""
    if not test.ids_by_position:
        return train, test
    first = int(train.ids.max()) + 1
    if first > LARGEST - len(test):  # behind the largest number there is none: go below the least
        first = int(train.ids.min()) - len(test)
    return train, replace(test, ids=first + torch.arange(len(test)), ids_by_position=False)


def _refuse_drawn_by_position(records: Records) -> None:
    if records.drawn_by_position:
        raise ConfigError(
            "ids = None is not allowed with a released scaling and a share of the records as test "
            "part, because removing one row would move others between the parts; give ids=..., "
            "which belong to the records, or a separate test part in test=..."
        )


def _scaled(records: Records, scaling: Scaling, domain: InputDomain | None) -> Records:
    return replace(records, inputs=scaling.applied(records.inputs), domain=domain)


def _named(classes: Classes) -> dict[str, tuple[str, ...]]:
    return {"target": tuple(map(str, classes.names))} if classes.names else {}


def share_of(test: object, *, others: str) -> float:
    """Return the share of the test part, between 0 and 1.

    Args:
        test: value given by the user.
        others: description of other allowed values.

    Raises:
        ConfigError: if `test` is not a number between 0 and 1.
    """
    if isinstance(test, bool) or not isinstance(test, int | float) or not 0 < test < 1:
        given = test if isinstance(test, int | float | str | None) else type(test).__name__
        raise ConfigError.of("test", given, f"a share between 0 and 1, or {others}")
    return float(test)


def refuse_beside_share(*, test_ids: object, test_attributes: object) -> None:
    """Refuse ids or attributes of a test part if the test part is a share of the records.

    Args:
        test_ids: only None is allowed.
        test_attributes: only None is allowed.

    Raises:
        ConfigError: if an argument is not allowed; the message names it.
    """
    for field, value in (("test_ids", test_ids), ("test_attributes", test_attributes)):
        if value is not None:
            raise ConfigError(
                f"{field} is not allowed if test=... is a share of the records; allowed: None, or "
                "a separate test part in test=..."
            )
