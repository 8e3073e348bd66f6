"""Consoles of rich to which the commands print; rich is imported only when a command prints."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130
"""Exit code of a process that Ctrl-C ended, by custom of the shells."""


def wide_console() -> "Console":
    """Return a console that does not cut a table when its output goes to a file or pipe."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120)


def complain(message: str) -> None:
    """Print one line of an error to the standard error output."""
    from rich.console import Console

    Console(stderr=True, soft_wrap=True, highlight=False).print(f"perdure: {message}", markup=False)


@contextmanager
def resumable() -> Iterator[None]:
    """Context manager that prints one line instead of a traceback at Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        complain("stopped; give the same command again to continue")
        raise typer.Exit(INTERRUPTED) from None
