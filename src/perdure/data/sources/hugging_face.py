"""Data sets from the library `datasets` by Hugging Face."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict

from perdure.data.datasets.base import Dataset
from perdure.data.sources.tables import from_pandas
from perdure.data.sources.targets import TaskName
from perdure.data.sources.token_sequences import from_tokens
from perdure.data.sources.torch_datasets import from_torch
from perdure.errors import ConfigError, DataError
from perdure.tasks import Task

if TYPE_CHECKING:
    from datasets import Dataset as Table
    from datasets import DatasetDict


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
        declared_size: public number of training records. Default: the number of rows.
        seed: seed of the hash that draws the test part.
        name: name of the data set and of its partition. Other records, or other targets of the same
            records, need another name: a warm start compares names.

    Raises:
        ConfigError: if a setting is not allowed, or the data set has no such column.
        DataError: if values are not allowed, as in the functions named above.
    """
    train, rest = _parts(dataset, test)
    columns = [inputs] if isinstance(inputs, str) else list(inputs)
    tables = [train] if isinstance(rest, int | float) else [train, rest]
    _refuse_missing_columns(tables, columns, target, ids)
    classes = getattr(train.features[target], "names", None) if target is not None else None
    own_ids = [ids and _column(table, ids) for table in tables]
    settings = _Settings(
        num_classes=classes and len(classes), declared_size=declared_size, seed=seed, name=name
    )
    if vocabulary is not None:
        made = from_tokens(
            _column(train, columns[0]),
            target and _column(train, target),
            test=_tokens_of_test(rest, columns[0], target),
            vocabulary=vocabulary,
            padding=padding,
            length=length,
            task=task,
            ids=own_ids[0],
            test_ids=own_ids[1] if len(tables) > 1 else None,
            **settings,
        )
    elif target is None:
        raise _without_target(train)
    elif len(columns) > 1 or isinstance(train[0][columns[0]], bool | int | float | str):
        made = from_pandas(
            train.to_pandas(),
            target=target,
            columns=columns,
            test=rest if len(tables) == 1 else rest.to_pandas(),
            task=task or "single-label",
            ids=ids,
            **settings,
        )
    else:
        made = from_torch(
            train,
            keys=(columns[0], target),
            test=rest,
            task=task or "single-label",
            ids=own_ids[0],
            test_ids=own_ids[1] if len(tables) > 1 else None,
            **settings,
        )
    return made if classes is None else _named(made, classes)


def _named(data: Dataset, classes: Sequence[str]) -> Dataset:
    return replace(data, categories={**data.categories, "target": tuple(classes)})


class _Settings(TypedDict):
    """Settings that are passed unchanged to every function that makes a data set."""

    num_classes: int | None
    declared_size: int | None
    seed: int
    name: str


def _without_target(table: "Table") -> ConfigError:
    allowed = f"one of {', '.join(table.column_names)}; or None together with vocabulary=..."
    return ConfigError.of("target", None, allowed)


def _parts(dataset: Any, test: Any) -> tuple[Any, Any]:
    """Return the training part, and the test part or its share."""
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
    return dataset, test


def _refuse_missing_columns(
    tables: Sequence[Any], columns: Sequence[str], target: str | None, ids: str | None
) -> None:
    if not columns:
        raise ConfigError.of("inputs", [], tables[0].column_names)
    asked = [("inputs", column) for column in columns]
    for table in tables:
        for field, column in [*asked, ("target", target), ("ids", ids)]:
            if column is not None and column not in table.column_names:
                raise ConfigError.of(field, column, table.column_names)


def _column(table: Any, name: str) -> list[Any]:
    """Return the values of a column as Python objects."""
    return list(table.with_format(None)[name])


def _tokens_of_test(rest: Any, column: str, target: str | None) -> Any:
    if isinstance(rest, int | float):
        return rest
    sequences = _column(rest, column)
    return sequences if target is None else (sequences, _column(rest, target))
