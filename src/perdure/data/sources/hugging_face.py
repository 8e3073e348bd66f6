"""Data sets from the library `datasets` by Hugging Face."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

from perdure.data.datasets.base import Dataset
from perdure.data.sources.tables import (
    from_pandas,
    row_attributes,
    values_are_public,
    values_by_attribute,
)
from perdure.data.sources.targets import TaskName
from perdure.data.sources.token_sequences import from_tokens
from perdure.data.sources.torch_datasets import from_torch
from perdure.errors import ConfigError, DataError
from perdure.tasks import Task
from perdure.utils.checked_arguments import checked_arguments

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from datasets import DatasetDict


@checked_arguments
def from_huggingface(
    dataset: "Table | DatasetDict",
    *,
    inputs: str | Sequence[str],
    target: str | None = None,
    test: "Table | float | None" = None,
    vocabulary: int | None = None,
    padding: int | None = None,
    length: int | None = None,
    task: TaskName | Task | None = None,
    ids: str | None = None,
    time: str | None = None,
    domain: str | None = None,
    group: str | None = None,
    declared_size: int | None = None,
    seed: int = 0,
    name: str = "data",
) -> Dataset:
    """Build a data set from a `datasets.Dataset`, or from the parts "train" and "test" of a dict.

    One column of images or vectors is read as by `from_torch`; a column of token ids, with
    `vocabulary`, as by `from_tokens`; several columns as by `from_pandas`. A target of type
    `ClassLabel` names its classes. Needs the extra `perdure[huggingface]`.

    >>> from_huggingface(datasets.load_dataset("mnist"), inputs="image", target="label")

    Guarantee: none for facts computed from the records, as in `from_arrays`. The test part is
    public.

    Args:
        dataset: training records; if `test` is a share, all records.
        inputs: column of the inputs, or several columns of a table.
        target: column of the targets; None for the next token.
        test: records of the test part; or the average share of records in the test part. Default:
            the part "test" of a dict, or 0.2 if there is none.
        vocabulary: number of different tokens, declared, for a column of token ids.
        padding: token that fills sequences, as in `from_tokens`.
        length: declared length of sequences, as in `from_tokens`.
        task: meaning of the targets, as in `from_arrays` and `from_tokens`.
        ids: column of the identity of each record, whole numbers or words, each once.
        time: column of a date or number, kept as the attribute "time", as in `from_pandas`.
        domain: column of a natural domain, kept as the attribute "domain". Names of a column of
            type `ClassLabel` count as declared; under privacy `by_domain` needs them.
        group: column of a group for measures of fairness, kept as the attribute "group".
        declared_size: public number of training records. Default: the number of rows.
        seed: seed of the hash that draws the test part.
        name: name of the data set and of its partition. Other records, or other targets of the same
            records, need another name: a warm start compares names.

    Raises:
        ConfigError: if a setting is not allowed, or the data set has no such column.
        DataError: if values are not allowed, as in the functions named above.
    """
    train, rest, tables = _parts(dataset, test)
    columns = [inputs] if isinstance(inputs, str) else list(inputs)
    roles = _Roles(time=time, domain=domain, group=group)
    _refuse_missing_columns(tables, columns, {"target": target, "ids": ids, **roles})
    facts = _Facts.of(tables, roles)
    classes = getattr(train.features[target], "names", None) if target is not None else None
    rows = _rows(tables, ids, facts)
    settings = _Settings(
        num_classes=classes and len(classes), declared_size=declared_size, seed=seed, name=name
    )
    kind = task or "single-label"
    if vocabulary is not None:
        as_tokens = partial(from_tokens, padding=padding, length=length, task=task)
        made = as_tokens(
            _column(train, columns[0]),
            target and _column(train, target),
            test=_tokens_of_test(rest, columns[0], target),
            vocabulary=vocabulary,
            **rows,
            **settings,
        )
    elif target is None:
        raise _without_target(tables[0])
    elif len(columns) > 1 or isinstance(train[0][columns[0]], bool | int | float | str):
        made = from_pandas(
            train.to_pandas(),
            target=target,
            columns=columns,
            test=rest if len(tables) == 1 else rest.to_pandas(),
            task=kind,
            ids=ids,
            categories=facts.declared,
            **roles,
            **settings,
        )
    else:
        keys = (columns[0], target)
        made = from_torch(train, keys=keys, test=rest, task=kind, **rows, **settings)
    return facts.added_to(made, classes)


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """Attributes of the records (time, domain, group), read from columns of a data set.

    Args:
        attributes: for each part, name of the attribute to (n,) values.
        declared: value to number, by column, for columns whose type lists the values.
        categories: names of the values, by attribute.
        found: attributes whose values were found in the records, and not declared.
    """

    attributes: list[dict[str, Any]]
    declared: dict[str, Sequence[int]]
    categories: dict[str, tuple[str, ...]]
    found: tuple[str, ...]

    @classmethod
    def of(cls, tables: Sequence[Any], roles: Mapping[str, Any]) -> "_Facts":
        """Read the columns of these roles in every part; "time" holds dates or numbers."""
        taken = [column for column in dict.fromkeys(roles.values()) if column is not None]
        frames = [table.select_columns(taken).to_pandas() for table in tables] if taken else []
        if not frames:
            return cls(attributes=[{} for _ in tables], declared={}, categories={}, found=())
        columns = {role: column for role, column in roles.items() if role != "time"}
        types = {column: getattr(tables[0].features[column], "names", None) for column in taken}
        declared = {column: range(len(names)) for column, names in types.items() if names}
        values = values_by_attribute(frames[0], frames[-1], declared, columns)
        names = {role: types[str(columns[role])] or found for role, found in values.items()}
        return cls(
            attributes=[row_attributes(frame, "", roles, values) for frame in frames],
            declared={c: r for c, r in declared.items() if c in columns.values()},
            categories={role: tuple(map(str, each)) for role, each in names.items()},
            found=tuple(role for role in values if columns[role] not in declared),
        )

    @property
    def public(self) -> list[str]:
        """Return a sentence for each attribute whose values were found, which makes them public."""
        return values_are_public(self.found)

    def added_to(self, made: Dataset, classes: Sequence[str] | None) -> Dataset:
        """Return a data set with these facts, and with the names of its classes."""
        named = {} if classes is None else {"target": tuple(classes)}
        told, learnt = (
            tuple(dict.fromkeys([*own, *self.public]))
            for own in (made.public_facts, made.train.public_facts)
        )
        return replace(
            made,
            train=replace(made.train, public_facts=learnt, numbered_by_records=self.found),
            categories={**made.categories, **self.categories, **named},
            public_facts=told,
        )


class _Settings(TypedDict):
    """Arguments of `from_huggingface` that are passed unchanged to `from_torch` and its kin."""

    num_classes: int | None
    declared_size: int | None
    seed: int
    name: str


class _Roles(TypedDict):
    """Columns that become attributes of the records; None for no such column."""

    time: str | None
    domain: str | None
    group: str | None


class _Rows(TypedDict):
    """Ids and attributes of the records, in the training part and in a test part of its own."""

    ids: Any
    test_ids: Any
    attributes: Mapping[str, Any]
    test_attributes: Mapping[str, Any] | None


def _rows(tables: Sequence[Any], ids: str | None, facts: _Facts) -> _Rows:
    """Return ids from the column `ids`, and the attributes, of one or two parts."""
    own_ids = [ids and _column(table, ids) for table in tables]
    return _Rows(
        ids=own_ids[0],
        test_ids=own_ids[1] if len(tables) > 1 else None,
        attributes=facts.attributes[0],
        test_attributes=facts.attributes[1] if len(tables) > 1 else None,
    )


def _without_target(table: Any) -> ConfigError:
    """Make the error for a data set without target column and without vocabulary."""
    allowed = f"one of {', '.join(table.column_names)}; or None together with vocabulary=..."
    return ConfigError.of("target", None, allowed)


def _parts(dataset: Any, test: Any) -> tuple[Any, Any, list[Any]]:
    """Return the training part, the test part or its share, and a list of the parts."""
    if isinstance(dataset, Mapping):
        if "train" not in dataset:
            raise ConfigError.of("parts of the dataset", list(dataset), "a part called 'train'")
        test = dataset.get("test", 0.2) if test is None else test
        dataset = dataset["train"]
    test = 0.2 if test is None else test
    for field, value in (("dataset", dataset), ("test", test)):
        if field == "test" and isinstance(value, int | float):
            continue
        if not all(hasattr(value, known) for known in ("features", "column_names", "to_pandas")):
            fix = "load one with datasets.load_dataset(...); convert a streaming dataset first"
            raise DataError(
                f"{field} is a {type(value).__name__}; allowed: a datasets.Dataset; {fix}"
            )
        if not len(value):
            raise DataError(f"{field} has no records; allowed: at least one")
    return dataset, test, [dataset] if isinstance(test, int | float) else [dataset, test]


def _refuse_missing_columns(
    tables: Sequence[Any],
    columns: Sequence[str],
    others: Mapping[str, Any],
) -> None:
    """Refuse columns that a part of the data set lacks."""
    if not columns:
        raise ConfigError.of("inputs", [], _columns_of(tables[0]))
    asked = [("inputs", column) for column in columns]
    for table in tables:
        for field, column in [*asked, *others.items()]:
            if column is not None and column not in table.column_names:
                raise ConfigError.of(field, column, _columns_of(table))


def _columns_of(table: Any) -> str:
    return f"columns of the data set: {', '.join(table.column_names)}"


def _column(table: Any, name: str) -> list[Any]:
    """Return the values of a column as Python objects."""
    return list(table.with_format(None)[name])


def _tokens_of_test(rest: Any, column: str, target: str | None) -> Any:
    if isinstance(rest, int | float):
        return rest
    sequences = _column(rest, column)
    return sequences if target is None else (sequences, _column(rest, target))
