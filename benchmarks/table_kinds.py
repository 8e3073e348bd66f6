"""Kinds of tables of stored rows: lists, pivots, claims, growth and counts."""

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]
ACCURACY = "{average_accuracy:.1f} ({standard_error:.1f})"


class _Cell(string.Formatter):
    """Fill a template from a row.

    Fields that the row does not have, or has as None, are left out.
    """

    def format_field(self, value: Any, spec: str) -> str:
        return "" if value is None else str(format(value, spec))

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return kwargs.get(str(key))


def cell(template: str, row: Row) -> str:
    """Fill a template such as `{ratio:.2f}`, and remove the empty brackets that are left."""
    text = _Cell().vformat(template, (), row)
    return text.removesuffix(", ").replace(" ()", "").strip()


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Table with one line for each stored row.

    Args:
        file: name of the file of rows in benchmarks/results, without its ending.
        columns: heading to the template of its cells.
        only: values that a row must have to be in the table, by key; a tuple allows several.
    """

    file: str
    columns: Mapping[str, str]
    only: Mapping[str, object] = field(default_factory=dict)

    def rows(self) -> list[Row]:
        """Read the stored rows of the table, in the order of the file."""
        stored = json.loads((RESULTS / f"{self.file}.json").read_text())["rows"]
        return [row for row in stored if all(_is(row.get(k), v) for k, v in self.only.items())]

    def lines(self) -> list[list[str]]:
        """Return the heading and the lines of the table, each as a list of cells."""
        body = [[cell(template, row) for template in self.columns.values()] for row in self.rows()]
        return [list(self.columns), *body]


@dataclass(frozen=True, kw_only=True)
class Pivot(Listing):
    """Table with one line for each value of a key, and one column for each value of another key.

    Args:
        columns: heading to template of the first columns, which are filled from a line's first row.
        across: key whose values are columns, and the order of the values.
        each: template of the cells in the columns of `across`.
        line: keys that distinguish the lines.
        last: heading to template of the last columns, which are filled from a line's last row.
    """

    across: tuple[str, tuple[Any, ...]]
    each: str
    line: tuple[str, ...]
    last: Mapping[str, str] = field(default_factory=dict)

    def lines(self) -> list[list[str]]:
        """Return the heading and the lines of the table, each as a list of cells."""
        key, values = self.across
        grouped: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows():
            grouped.setdefault(tuple(row[name] for name in self.line), []).append(row)
        found = [[*self.columns, *(str(value) for value in values), *self.last]]
        for rows in grouped.values():
            cells = {row[key]: "" if row.get("refused") else cell(self.each, row) for row in rows}
            first = [cell(template, rows[0]) for template in self.columns.values()]
            last = [
                next(filter(None, (cell(template, row) for row in reversed(rows))), "")
                for template in self.last.values()
            ]
            found.append([*first, *(cells.get(value, "") for value in values), *last])
        return found


@dataclass(frozen=True, kw_only=True)
class Claims(Listing):
    """Table with one line for each comparison of each claim."""

    def lines(self) -> list[list[str]]:
        """Return the heading and the lines of the table, each as a list of cells."""
        found = [list(self.columns)]
        for row in self.rows():
            for index, compared in enumerate(row["compared"]):
                whole = {**row, **compared, "measure": compared["measure"].replace("_", " ")}
                whole |= {"shown": "yes" if compared["shown"] else "no"}
                if index:
                    whole |= {"sentence": None, "paper": None, "seeds": None}
                found.append([cell(template, whole) for template in self.columns.values()])
        return found


@dataclass(frozen=True, kw_only=True)
class Growth(Listing):
    """Table of rows that have a list of sizes and a list of times."""

    def rows(self) -> list[Row]:
        """Return the rows, with each list of numbers as one text."""
        return [
            row
            | {
                "sizes": ", ".join(f"{size:,}" for size in row["sizes"]),
                "milliseconds": ", ".join(f"{each:.3g}" for each in row["milliseconds"]),
            }
            for row in super().rows()
            if "sizes" in row
        ]


@dataclass(frozen=True, kw_only=True)
class Counts(Listing):
    """Table with one line for each group of rows with equal cells, and counts of rows.

    Args:
        counted: heading to the key whose true (or not empty) values are counted.
    """

    counted: Mapping[str, str]

    def lines(self) -> list[list[str]]:
        """Return the heading and the lines of the table, each as a list of cells."""
        grouped: dict[tuple[str, ...], list[Row]] = {}
        for row in self.rows():
            cells = tuple(cell(template, row) for template in self.columns.values())
            grouped.setdefault(cells, []).append(row)
        body = [
            [*cells, str(len(rows))]
            + [str(sum(bool(row[key]) for row in rows)) for key in self.counted.values()]
            for cells, rows in grouped.items()
        ]
        return [[*self.columns, "runs", *self.counted], *body]


def _is(value: object, allowed: object) -> bool:
    return value in allowed if isinstance(allowed, tuple) else value == allowed
