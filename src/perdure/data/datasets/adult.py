"""Adult, the census table of UCI, read from its published files."""

import csv
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from perdure.data.datasets.base import Dataset, data_root, from_published_split
from perdure.data.records import Records
from perdure.errors import DataError
from perdure.utils.checked_arguments import checked_arguments

ADULT_URL = "https://archive.ics.uci.edu/dataset/2/adult"

ADULT_NUMERIC: dict[int, tuple[str, float, float]] = {
    0: ("age", 0, 100),
    2: ("fnlwgt", 0, 1_500_000),
    4: ("education-num", 1, 16),
    10: ("capital-gain", 0, 99_999),
    11: ("capital-loss", 0, 4_500),
    12: ("hours-per-week", 0, 100),
}
"""Column to name and declared public range.

The ranges are round numbers, not extremes of the records.
"""

ADULT_CATEGORIES: dict[int, tuple[str, ...]] = {
    1: (
        "Private",
        "Self-emp-not-inc",
        "Self-emp-inc",
        "Federal-gov",
        "Local-gov",
        "State-gov",
        "Without-pay",
        "Never-worked",
    ),
    3: (
        "Bachelors",
        "Some-college",
        "11th",
        "HS-grad",
        "Prof-school",
        "Assoc-acdm",
        "Assoc-voc",
        "9th",
        "7th-8th",
        "12th",
        "Masters",
        "1st-4th",
        "10th",
        "Doctorate",
        "5th-6th",
        "Preschool",
    ),
    5: (
        "Married-civ-spouse",
        "Divorced",
        "Never-married",
        "Separated",
        "Widowed",
        "Married-spouse-absent",
        "Married-AF-spouse",
    ),
    6: (
        "Tech-support",
        "Craft-repair",
        "Other-service",
        "Sales",
        "Exec-managerial",
        "Prof-specialty",
        "Handlers-cleaners",
        "Machine-op-inspct",
        "Adm-clerical",
        "Farming-fishing",
        "Transport-moving",
        "Priv-house-serv",
        "Protective-serv",
        "Armed-Forces",
    ),
    7: ("Wife", "Own-child", "Husband", "Not-in-family", "Other-relative", "Unmarried"),
    8: ("White", "Asian-Pac-Islander", "Amer-Indian-Eskimo", "Other", "Black"),
    9: ("Female", "Male"),
    13: (
        "United-States",
        "Cambodia",
        "England",
        "Puerto-Rico",
        "Canada",
        "Germany",
        "Outlying-US(Guam-USVI-etc)",
        "India",
        "Japan",
        "Greece",
        "South",
        "China",
        "Cuba",
        "Iran",
        "Honduras",
        "Philippines",
        "Italy",
        "Poland",
        "Jamaica",
        "Vietnam",
        "Mexico",
        "Portugal",
        "Ireland",
        "France",
        "Dominican-Republic",
        "Laos",
        "Ecuador",
        "Taiwan",
        "Haiti",
        "Columbia",
        "Hungary",
        "Guatemala",
        "Nicaragua",
        "Scotland",
        "Thailand",
        "Yugoslavia",
        "El-Salvador",
        "Trinadad&Tobago",
        "Peru",
        "Hong",
        "Holand-Netherlands",
    ),
}
"""Column to the categories that the documentation of the data set lists, in its spelling."""

ADULT_COLUMNS = 15
ADULT_GROUPS = {"workclass": 1, "race": 8, "sex": 9}
"""Attributes of the records, and the columns that they come from."""
ADULT_FEATURES = len(ADULT_NUMERIC) + sum(map(len, ADULT_CATEGORIES.values()))


@checked_arguments
def adult(root: str | Path | None = None, *, declared_size: int | None = None) -> Dataset:
    """48,842 people of the 1994 census, inputs (105,) in [0, 1], label 1 for an income above 50K.

    The records have the attributes "workclass", "race" and "sex", numbers of the names in
    `categories`: for clients of a federation, for measures of groups and for weights. A missing
    category has the number after the last name.

    Reads ROOT/adult/adult.data and adult.test. Categories and ranges are from the documentation of
    the data set, so no constant is computed from the records.

    Args:
        root: data root; see `perdure.data.datasets.base`.
        declared_size: public number of training records; None for the actual number.

    Raises:
        DataError: if a file is missing, or a row differs from the documentation.

    Source: Becker and Kohavi 1996, "Adult", UCI Machine Learning Repository.
    """
    folder = data_root(root) / "adult"
    if not all((folder / name).is_file() for name in ("adult.data", "adult.test")):
        raise DataError(f"no adult.data and adult.test in {folder}; get them from {ADULT_URL}")
    train, test = (read_adult(folder / name) for name in ("adult.data", "adult.test"))
    fact = "category lists and column ranges are declared in advance"
    made = from_published_split(
        "adult",
        train,
        test,
        num_classes=2,
        facts=(fact,),
        declared_size=declared_size,
        value_range=(0.0, 1.0),
        size_published=True,
    )
    return replace(
        made,
        train=with_groups(made.train),
        test=with_groups(made.test),
        categories={name: ADULT_CATEGORIES[column] for name, column in ADULT_GROUPS.items()},
    )


def with_groups(records: Records) -> Records:
    """Return records of Adult with the attributes in `ADULT_GROUPS`, read from their inputs.

    A missing category has the number of the last category plus 1.
    """
    found = {}
    for name, column in ADULT_GROUPS.items():
        before = [ADULT_CATEGORIES[each] for each in ADULT_CATEGORIES if each < column]
        first = len(ADULT_NUMERIC) + sum(map(len, before))
        shown = records.inputs[:, first : first + len(ADULT_CATEGORIES[column])]
        missing = (shown.sum(1) == 0).long() * shown.shape[1]
        found[name] = shown.argmax(1) + missing
    return replace(records, attributes=found)


def read_adult(path: Path) -> tuple[Tensor, Tensor]:
    """Features (n, 105) float32 in [0, 1] and labels (n,) int64 of one file of the UCI Adult table.

    Numeric columns come first, each clamped to its declared range and scaled by it; then one
    indicator per listed category. A missing category ("?") has no indicator set. The label is 1 for
    an income above 50K.

    Raises:
        DataError: if a row has other columns, numbers or categories than documented; the message
            has the line number.

    Source: Becker and Kohavi 1996, "Adult", UCI Machine Learning Repository.
    """
    rows = [_adult_row(row, f"{path}, line {line}") for line, row in _adult_lines(path)]
    if not rows:
        raise DataError(f"{path} holds no records; get it again")
    return torch.tensor([row for row, _ in rows]), torch.tensor([label for _, label in rows])


def _adult_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows with their line numbers, without blank lines and header.

    The remark at the top of the original test file is left out, too.
    """
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            for number, row in enumerate(csv.reader(lines, skipinitialspace=True), start=1):
                if row and row[0] != "age" and not row[0].startswith("|"):
                    yield number, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}; put a complete copy there") from error


def _adult_row(row: list[str], source: str) -> tuple[list[float], int]:
    if len(row) != ADULT_COLUMNS:
        raise DataError(f"{source} has {len(row)} columns; allowed: {ADULT_COLUMNS}")
    features = [_scaled(row[column], bounds, source) for column, bounds in ADULT_NUMERIC.items()]
    for column, categories in ADULT_CATEGORIES.items():
        features += _indicators(row[column], categories, source)
    income = row[-1].rstrip(".")
    if income not in ("<=50K", ">50K"):
        raise DataError(f"{source} has income {row[-1]!r}; allowed: <=50K, >50K")
    return features, int(income == ">50K")


def _scaled(text: str, bounds: tuple[str, float, float], source: str) -> float:
    name, low, high = bounds
    try:
        value = float(text)
    except ValueError as error:
        raise DataError(f"{source} has {name} = {text!r}; allowed: a number") from error
    if math.isnan(value):
        raise DataError(f"{source} has {name} = {text!r}; allowed: a number")
    return min(max((value - low) / (high - low), 0.0), 1.0)


def _indicators(text: str, categories: tuple[str, ...], source: str) -> list[float]:
    if text != "?" and text not in categories:
        raise DataError(
            f"{source} has an unknown category {text!r}; allowed: ?, {', '.join(categories)}"
        )
    return [float(text == category) for category in categories]
