"""Console of rich to which the commands print."""

import sys

from rich.console import Console


def wide_console() -> Console:
    """Return a console that does not cut a table when its output goes to a file or pipe."""
    return Console(width=None if sys.stdout.isatty() else 120)
