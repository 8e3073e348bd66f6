"""Shared functions of the benchmarks.

They are for options of the command line, stored rows that a later run keeps, and printed tables.
"""

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from perdure.utils import command, machine, store_rows

Row = dict[str, Any]


def options(text: str, *, seeds: int, resumed: bool = False) -> argparse.ArgumentParser:
    """Make a command line with --seeds, --data and --json.

    Args:
        text: description of the benchmark.
        seeds: default number of seeds.
        resumed: True if rows that are already stored are kept.
    """
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kept = (
        "add the rows to this file; those that are there are not run again"
        if resumed
        else "store the rows here"
    )
    parser.add_argument(
        "--seeds", type=int, default=seeds, help="number of seeds, from 0 (default %(default)s)"
    )
    parser.add_argument(
        "--data", type=Path, help="data root (default: PERDURE_DATA, else the user's cache folder)"
    )
    parser.add_argument("--json", type=Path, help=kept)
    return parser


def stored(path: Path | None) -> list[Row]:
    """Read the rows of an earlier run."""
    return list(json.loads(path.read_text())["rows"]) if path and path.exists() else []


def store(path: Path | None, rows: Sequence[Mapping[str, object]]) -> None:
    """Write the rows with machine, versions and command, if there is a path."""
    if path:
        store_rows(path, rows, seed=0)


def origin() -> Row:
    """Return command and machine of a row; a file may contain rows of several runs."""
    return {"command": command(), "machine": machine()}


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Compute the mean and its standard error, which is None for a single value."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(
        values
    ) > 1 else None


def show(
    title: str, rows: Iterable[Mapping[str, Any]], columns: Sequence[str], *, digits: int = 2
) -> None:
    """Print the given columns of the rows."""
    table = Table(title=title)
    for column in columns:
        table.add_column(
            column.removeprefix("average_").removeprefix("standard_").replace("_", " ")
        )
    for entry in rows:
        cells = [entry[column] for column in columns]
        table.add_row(
            *[
                f"{c:.{digits}f}" if isinstance(c, float) else "-" if c is None else str(c)
                for c in cells
            ]
        )
    Console(width=140).print(table)
