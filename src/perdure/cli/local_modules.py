"""Modules of the current folder, which configs may name."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def local_modules() -> Iterator[None]:
    """Look for modules in the current folder, too, as `python -m` does; last, so it hides none."""
    here = str(Path.cwd())
    new = [] if here in sys.path else [here]
    sys.path += new
    try:
        yield
    finally:
        for folder in new:
            sys.path.remove(folder)
