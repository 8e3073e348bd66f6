"""Common parts of benchmarks.

Options of the command line, rows that are stored and taken up again, the table at the end.
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
    """A command line with --seeds, --data and --json.

    Args:
        text: what the benchmark is.
        seeds: how many by default.
        resumed: whether rows that are stored are kept.
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
    """Rows of an earlier run."""
    return list(json.loads(path.read_text())["rows"]) if path and path.exists() else []


def store(path: Path | None, rows: Sequence[Mapping[str, object]]) -> None:
    """Write the rows with machine, versions and command, if there is a path."""
    if path:
        store_rows(path, rows, seed=0)


def origin() -> Row:
    """Command and machine of a row; a file may hold rows of several runs."""
    return {"command": command(), "machine": machine()}


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; None of one value."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(
        values
    ) > 1 else None


def show(
    title: str, rows: Iterable[Mapping[str, Any]], columns: Sequence[str], *, digits: int = 2
) -> None:
    """Print these columns of the rows."""
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
