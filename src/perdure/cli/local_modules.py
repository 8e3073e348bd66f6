"""Modules of the current folder, which configs may name."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def local_modules() -> Iterator[None]:
    """Context manager in which modules of the current folder can be imported.

    The folder is the last place of the search, so that it hides no other module.
    """
    here = str(Path.cwd())
    new = [] if here in sys.path else [here]
    sys.path += new
    try:
        yield
    finally:
        for folder in new:
            sys.path.remove(folder)
