"""Consoles of rich to which the commands print; rich is imported only when a command prints."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def wide_console() -> "Console":
    """Return a console that does not cut a table when its output goes to a file or pipe."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120)


def complain(message: str) -> None:
    """Print one line of an error to the standard error output."""
    from rich.console import Console

    Console(stderr=True, soft_wrap=True, highlight=False).print(f"perdure: {message}", markup=False)


@contextmanager
def shown_progress(console: "Console") -> Iterator[Callable[[str, float], None]]:
    """Context manager with a progress bar per arm; gives the function that sets an arm's share.

    Without a terminal, a line is printed at each quarter of an arm.
    """
    from rich.progress import (
        BarColumn,
        Progress,
        TaskID,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        TextColumn("{task.description:16}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}
        told: dict[str, int] = {}

        def progress(arm: str, share: float) -> None:
            if arm not in tasks:
                tasks[arm] = bars.add_task(arm, total=1.0)
            bars.update(tasks[arm], completed=share)
            quarter = int(4 * share)
            if bars.disable and quarter > told.get(arm, 0):
                console.print(f"{arm} {25 * quarter} %", highlight=False)
                told[arm] = quarter

        yield progress
