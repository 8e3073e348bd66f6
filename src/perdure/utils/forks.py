"""The name of the present process, which changes in every forked child.

A process number does not tell a child from its parent: in two process namespaces both may have the
same one. So whatever belongs to one process alone (a nonce, a lock, a log, numbers drawn by a
thread) keeps the name under which it was made, and compares.
"""

import os
from typing import NamedTuple


class Process(NamedTuple):
    """Name of a process.

    Args:
        token: made anew in every forked child, and compared by identity.
        number: of the process, for a fork that Python does not see.
    """

    token: object
    number: int


_tokens = [object()]
"""Token of the present process, alone."""


def present_process() -> Process:
    """Return the name of the present process."""
    return Process(_tokens[0], os.getpid())


def _renew() -> None:
    _tokens[0] = object()


# Windows has no fork. Elsewhere this has to stand before the first fork, so it stands here.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
