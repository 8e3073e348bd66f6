"""Proposals for names that nothing has: the known name that is written nearly alike."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message that proposes the known name nearest to `name`; "" without one.

    >>> did_you_mean("epoch", ("epochs", "batch_size"))
    "; did you mean 'epochs'?"
    """
    near = get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
