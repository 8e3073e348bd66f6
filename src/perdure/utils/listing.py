"""Short lists of values for messages."""

from collections.abc import Sequence

MOST = 8
"""Most values that a message lists."""


def shown(values: Sequence[object]) -> str:
    """List the first values, for a message.

    >>> shown(range(10))
    '0, 1, 2, 3, 4, 5, 6, 7, ...'
    """
    return ", ".join(map(str, values[:MOST])) + (", ..." if len(values) > MOST else "")
