"""Data sets from pandas tables: columns of numbers, categories, times and groups."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from perdure.data.datasets.base import Dataset
from perdure.data.sources.assembly import Part, Settings, dataset_of, share_of
from perdure.data.sources.inputs import Number, Standardise
from perdure.data.sources.targets import TaskName
from perdure.errors import ConfigError, DataError
from perdure.tasks import Task
from perdure.utils.checked_arguments import checked_arguments
from perdure.utils.listing import shown

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pandas import DataFrame, Series

MOST_CATEGORIES = 1000
"""Most different words of a column that are used as categories, if none are declared."""


@checked_arguments
def from_pandas(
    table: "DataFrame",
    *,
    target: str | Sequence[str],
    test: "DataFrame | float" = 0.2,
    columns: Sequence[str] | None = None,
    categories: Mapping[str, Sequence[object]] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    missing: Mapping[str, float] | None = None,
    standardise: Standardise | None = None,
    task: TaskName | Task = "single-label",
    classes: Sequence[object] | None = None,
    num_classes: int | None = None,
    ids: str | None = None,
    time: str | None = None,
    domain: str | None = None,
    group: str | None = None,
    declared_size: int | None = None,
    seed: int = 0,
    name: str = "data",
) -> Dataset:
    """Build a data set from a table, one row per record.

    A column of numbers or booleans becomes one float32 number. A column of words, and a pandas
    Categorical, becomes one indicator, 0 or 1, for each of its categories; a missing category sets
    no indicator. A missing number is refused, unless `missing` declares a number to replace it; the
    column then has an additional indicator that is 1 if the number was missing.

    >>> from_pandas(visits, target="ill", ids="patient", time="day", group="sex")

    Guarantee: none for facts computed from the records: classes and categories, unless they are
    declared. `Dataset.public_facts` lists them. The test part is public.

    Args:
        table: training rows; if `test` is a share, all rows.
        target: column of the class of each record; several columns for multi-label or regression.
        test: table of the test part; or the average share of records in the test part, chosen by a
            hash of their ids.
        columns: columns of the inputs, in their order. Default: all columns without another role.
        categories: all categories of a column, in the order of their indicators, or all values of
            the column of a domain or group, in the order of their numbers. Default: the categories
            of a pandas Categorical, or the words of the training part in alphabetical order.
        ranges: declared (smallest, largest) value of a column of numbers.
        missing: declared number that replaces a missing one, by column.
        standardise: "declared" maps the values in `ranges` to -1 .. 1, and needs a range for every
            column of numbers; it does not change indicators. (mean, deviation) are constants that
            you declare, one number or one for every column of the inputs. A release, as in
            `from_arrays`, scales indicators too.
        task: meaning of the targets: "single-label", "multi-label", "regression", "next-token", or
            an object of a task, such as `Regression()`.
        classes: all classes, as the target column writes them. Default: as in `from_arrays`.
        num_classes: number of classes, if the target column has numbers.
        ids: column of the identity of each record, whole numbers or words, each once.
        time: column of a date or number, kept as the attribute "time": dates in seconds since 1970
            (UTC).
        domain: column of a natural domain, such as the hospital, kept as the attribute "domain".
            Under privacy `by_domain` needs its values declared in `categories`.
        group: column of a group for measures of fairness, kept as the attribute "group".
        declared_size: public number of training records. Default: the number of rows.
        seed: seed of the hash that draws the test part.
        name: name of the data set and of its partition. Other records, or other targets of the same
            records, need another name: a warm start compares names.

    Raises:
        ConfigError: if a setting is not allowed, or the table has no such column.
        DataError: if values are not allowed (with row and column); other cases as in `from_arrays`.
    """
    _refuse_other_tables(table, test)
    targets = [target] if isinstance(target, str) else list(target)
    roles = {"ids": ids, "time": time, "domain": domain, "group": group}
    taken = [*targets, *roles.values()]
    chosen = [c for c in table.columns if c not in taken] if columns is None else list(columns)
    tables = [table] if isinstance(test, int | float) else [table, test]
    _refuse_missing_columns(tables, chosen, targets, roles)
    notes: dict[str, None] = {}
    declared = dict(categories or {})
    kept = {"domain": domain, "group": group}
    values = values_by_attribute(table, test, declared, kept)
    found = [role for role in values if kept[role] not in declared]
    of_inputs = {c: v for c, v in declared.items() if c in chosen or c not in kept.values()}
    encoding = _encoding(table, chosen, of_inputs, missing or {})

    part = partial(_part, encoding=encoding, target=target, roles=roles, values=values)
    share = isinstance(test, int | float)
    train = part(table, "" if share else "training ")
    rest = share_of(test, others="a table of its own") if share else part(test, "test ")
    low_and_high = _declared_ranges(encoding, ranges)
    settings = Settings(
        name=name,
        task=task,
        classes=classes,
        num_classes=num_classes,
        value_range=low_and_high,
        standardise=_constants(encoding, standardise, low_and_high),
        declared_size=declared_size,
        seed=seed,
        columns=[column for each in encoding for column in each.names],
        facts=_facts(encoding, found),
        categories={key: tuple(map(str, found)) for key, found in values.items()},
        numbered_by_records=tuple(found),
    )
    notes["columns of numbers are converted to float32"] = None
    return dataset_of(train, rest, settings, notes)


def _part(
    rows: "DataFrame",
    label: str,
    *,
    encoding: Sequence["_Column"],
    target: str | Sequence[str],
    roles: Mapping[str, str | None],
    values: Mapping[str, Sequence[object]],
) -> Part:
    """Convert the rows of a part: inputs, targets, ids and attributes."""
    ids = roles["ids"]
    return Part(
        inputs=_encoded(rows, encoding, label),
        targets=rows[target if isinstance(target, str) else list(target)].to_numpy(),
        ids=None if ids is None else rows[ids].to_numpy(),
        attributes=row_attributes(rows, label, roles, values),
        label=label,
    )


def row_attributes(
    rows: "DataFrame",
    label: str,
    roles: Mapping[str, str | None],
    values: Mapping[str, Sequence[object]],
) -> dict[str, Any]:
    """Return the attributes of the rows of a part: name to (n,) numbers.

    Args:
        rows: rows of a table.
        label: name of the part, for messages.
        roles: name of the column of each attribute; the column of "time" has dates or numbers.
        values: possible values of each other attribute, in the order of their numbers.
    """
    time = roles["time"]
    attributes: dict[str, Any] = {}
    if time is not None:
        attributes["time"] = _seconds(rows, time, label)
    for role, names in values.items():
        attributes[role] = _codes(rows, str(roles[role]), names)
    return attributes


@dataclass(frozen=True, kw_only=True)
class _Column:
    """Conversion of one column of a table.

    Args:
        column: name of the column in the table.
        categories: values with one indicator each; None for a column of numbers.
        fill: number that replaces a missing one; None if missing numbers are refused.
        boolean: True if the numbers are 0 and 1.
        found: True if the categories were found in the training part, and not declared.
    """

    column: str
    categories: tuple[object, ...] | None = None
    fill: float | None = None
    boolean: bool = False
    found: bool = False

    @property
    def names(self) -> list[str]:
        """Names of the input features into which the column is converted."""
        if self.categories is not None:
            return [f"{self.column}={value}" for value in self.categories]
        return [self.column] if self.fill is None else [self.column, f"{self.column} is missing"]

    @property
    def numbers(self) -> bool:
        """True for a column of numbers whose range does not follow from its type."""
        return self.categories is None and not self.boolean


def _refuse_other_tables(table: Any, test: Any) -> None:
    for name, value in (("table", table), ("test", test)):
        if name == "test" and isinstance(value, int | float):
            continue
        if not hasattr(value, "iloc") or not hasattr(value, "columns"):
            raise DataError(
                f"{name} is a {type(value).__name__}; allowed: a pandas.DataFrame; "
                "pandas.DataFrame(...) makes one, and perdure.data.from_arrays takes arrays"
            )
        names = list(value.columns)
        twice = next((column for column in names if names.count(column) > 1), None)
        if twice is not None:
            raise DataError(f"{name} has two columns {twice!r}; allowed: each name once")
        if value.empty:
            raise DataError(f"{name} has no rows or columns; allowed: at least one of each")


def _refuse_missing_columns(
    tables: Sequence["DataFrame"],
    chosen: Sequence[str],
    targets: Sequence[str],
    roles: Mapping[str, str | None],
) -> None:
    asked = [("target", column) for column in targets]
    asked += [("columns", column) for column in chosen]
    for role, column in [*asked, *roles.items()]:
        for table in tables:
            if column is not None and column not in table.columns:
                known = ", ".join(str(name) for name in table.columns)
                raise ConfigError.of(role, column, f"columns of the table: {known}")
    seen = [column for column in targets if column in chosen]
    if seen:
        allowed = "columns without the target column, which the model predicts"
        raise ConfigError.of("columns", seen[0], allowed)
    if not targets:
        raise ConfigError.of("target", targets, "a column, or several")
    if not chosen:
        raise ConfigError.of("columns", [], "at least one column")


def _encoding(
    table: "DataFrame",
    chosen: Sequence[str],
    categories: Mapping[str, Sequence[object]],
    missing: Mapping[str, float],
) -> list[_Column]:
    """Decide the conversion of each column, from the declarations and the training part."""
    found = [_column(table[name], name, categories, missing) for name in chosen]
    numeric = [each.column for each in found if each.categories is None]
    for field, given, allowed in (
        ("categories", categories, chosen),
        ("missing", missing, numeric),
    ):
        other = next((column for column in given if column not in allowed), None)
        if other is not None:
            known = f"columns: {', '.join(allowed)}" if allowed else "no column"
            raise ConfigError.of(field, other, known)
    return found


def _column(
    values: "Series[Any]",
    name: str,
    categories: Mapping[str, Sequence[object]],
    missing: Mapping[str, float],
) -> _Column:
    from pandas import CategoricalDtype
    from pandas.api import types

    values = values.infer_objects()
    if name in categories:
        return _Column(column=name, categories=tuple(categories[name]))
    if isinstance(values.dtype, CategoricalDtype):
        return _Column(column=name, categories=tuple(values.cat.categories))
    if types.is_numeric_dtype(values) and not types.is_complex_dtype(values):
        boolean = bool(types.is_bool_dtype(values))
        return _Column(column=name, fill=missing.get(name), boolean=boolean)
    present = values.dropna()
    if not all(isinstance(value, str) for value in present):
        raise DataError(
            f"column {name!r} holds {values.dtype}, such as {present.iloc[0]!r}; allowed: numbers, "
            "booleans, words; give a date as time=..., leave the column out with columns=..., or "
            "convert it to numbers"
        )
    words = sorted(set(present))
    if len(words) > MOST_CATEGORIES:
        raise DataError(
            f"column {name!r} holds {len(words)} different words; allowed: {MOST_CATEGORIES}, one "
            "input each; leave it out with columns=..., or declare categories={...}"
        )
    return _Column(column=name, categories=tuple(words), found=True)


def _encoded(rows: "DataFrame", encoding: Sequence[_Column], label: str) -> Tensor:
    """Convert the columns of a table to inputs (n, k) float32."""
    width = sum(len(each.names) for each in encoding)
    made = np.zeros((len(rows), width), dtype=np.float32)
    start = 0
    for each in encoding:
        place = made[:, start : start + len(each.names)]
        start += len(each.names)
        if each.categories is not None:
            _fill_indicators(place, rows[each.column], each, label)
        else:
            _fill_numbers(place, rows[each.column], each, label)
    return torch.from_numpy(made)


def _fill_numbers(place: "NDArray[Any]", values: "Series[Any]", each: _Column, label: str) -> None:
    try:
        numbers = values.to_numpy(dtype="float64", na_value=np.nan)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"column {each.column!r} of the {label}table holds {values.dtype}; allowed: numbers, "
            f"which pandas.to_numeric makes of words ({error})"
        ) from error
    absent = np.isnan(numbers)
    if absent.any() and each.fill is None:
        row = int(absent.argmax())
        raise DataError(
            f"{label}table has a missing number in row {row}, column {each.column!r}; allowed: "
            f"numbers; declare a number to replace it with missing={{{each.column!r}: ...}}, or "
            "leave out the row"
        )
    with np.errstate(over="ignore"):
        place[:, 0] = np.where(absent, each.fill, numbers) if each.fill is not None else numbers
    if each.fill is not None:
        place[:, 1] = absent


def _fill_indicators(
    place: "NDArray[Any]", values: "Series[Any]", each: _Column, label: str
) -> None:
    assert each.categories is not None
    number = {value: code for code, value in enumerate(each.categories)}
    absent = values.isna().to_numpy()
    for row, value in enumerate(values.tolist()):
        if value in number:
            place[row, number[value]] = 1.0
        elif not absent[row]:
            raise DataError(
                f"{label}table has {value!r} in row {row}, column {each.column!r}; allowed: "
                f"{shown(each.categories)}; declare all categories={{{each.column!r}: ...}}"
            )


def _declared_ranges(
    encoding: Sequence[_Column], ranges: Mapping[str, tuple[float, float]] | None
) -> tuple[Number, Number] | None:
    """Return the smallest and the largest value of every input; None if none are declared."""
    if ranges is None:
        return None
    numeric = [each.column for each in encoding if each.numbers]
    if set(ranges) != set(numeric):
        raise ConfigError.of("ranges", list(ranges), f"all columns of numbers: {shown(numeric)}")
    low: list[float] = []
    high: list[float] = []
    for each in encoding:
        bounds = ranges[each.column] if each.numbers else (0.0, 1.0)
        if not isinstance(bounds, tuple | list) or len(bounds) != 2:
            raise ConfigError.of(f"ranges[{each.column!r}]", bounds, "(smallest, largest)")
        others = len(each.names) - 1
        low += [bounds[0], *[0.0] * others]
        high += [bounds[1], *[1.0] * others]
    return low, high


def _constants(
    encoding: Sequence[_Column],
    standardise: Standardise | None,
    low_and_high: tuple[Number, Number] | None,
) -> Standardise | None:
    """Return the scaling constants of every input; "declared" leaves indicators unchanged."""
    if standardise != "declared" or low_and_high is None:
        return standardise  # released constants scale indicators, too
    scaled = [each.numbers and place == 0 for each in encoding for place in range(len(each.names))]
    low, high = (torch.as_tensor(bound, dtype=torch.float32) for bound in low_and_high)
    middle = torch.where(torch.tensor(scaled), (low + high) / 2, 0.0)
    half = torch.where(torch.tensor(scaled), (high - low) / 2, 1.0)
    return middle.tolist(), half.tolist()


def _seconds(rows: "DataFrame", column: str, label: str) -> "NDArray[Any]":
    """Return times (n,) float64: numbers unchanged, dates as seconds since 1970 (UTC)."""
    import pandas
    from pandas.api import types

    values = rows[column]
    if types.infer_dtype(values) == "date":  # days as Python objects, as Arrow gives them
        values = pandas.to_datetime(values)
    if types.is_datetime64_any_dtype(values):
        since = pandas.to_datetime(values, utc=True) - pandas.Timestamp(0, tz="UTC")
        return np.asarray(since.dt.total_seconds(), dtype="float64")
    if not types.is_numeric_dtype(values) or types.is_complex_dtype(values):
        raise DataError(
            f"column {column!r} of the {label}table holds {values.dtype}; allowed: dates or "
            "numbers as time; pandas.to_datetime converts words"
        )
    return np.asarray(values.to_numpy(dtype="float64", na_value=np.nan))


def values_by_attribute(
    table: "DataFrame",
    test: "DataFrame | float",
    declared: Mapping[str, Sequence[object]],
    columns: Mapping[str, str | None],
) -> dict[str, list[object]]:
    """Return the values of the domain and group columns: declared, or found and sorted.

    Args:
        table: training rows, or all rows.
        test: rows of the test part, or its share.
        declared: values by column.
        columns: column by attribute; None if there is no such attribute.
    """
    found = {}
    for role, column in columns.items():
        if column is None:
            continue
        seen: set[object] = set()
        for label, rows in (("", table), ("test ", test)):
            if isinstance(rows, int | float):
                continue
            absent = rows[column].isna().to_numpy()
            if absent.any():
                raise DataError(
                    f"{label}table has a missing value in row {int(absent.argmax())}, column "
                    f"{column!r}, which is its {role}; allowed: a value in every row; use "
                    f"table[{column!r}].fillna('unknown') to set one"
                )
            try:
                seen |= set(rows[column].tolist())
            except TypeError:
                held = type(rows[column].iloc[0]).__name__
                raise DataError(
                    f"column {column!r} of the {label}table holds a {held} in row 0; allowed: "
                    f"words or numbers as {role}"
                ) from None
        found[role] = sorted(seen, key=lambda value: (str(type(value)), value))
        if column in declared:
            strange = [value for value in found[role] if value not in declared[column]]
            if strange:
                raise DataError(
                    f"column {column!r} has {strange[0]!r}; allowed: {shown(declared[column])}; "
                    f"declare all categories={{{column!r}: ...}}"
                )
            found[role] = list(declared[column])
    return found


def _codes(rows: "DataFrame", column: str, values: Sequence[object]) -> Tensor:
    """Return the number (n,) int64 of each record's value in a column."""
    number = {value: code for code, value in enumerate(values)}
    return torch.tensor([number[value] for value in rows[column].tolist()], dtype=torch.int64)


def _facts(encoding: Sequence[_Column], roles: Sequence[str]) -> tuple[str, ...]:
    found = [each.column for each in encoding if each.found]
    facts = [f"the categories found in {shown(found)} are declared public"] if found else []
    return (*facts, *values_are_public(roles))


def values_are_public(attributes: Sequence[str]) -> list[str]:
    """Return a sentence for each attribute whose values were found, which makes them public."""
    return [f"the values of the attribute {role} are declared public" for role in attributes]
