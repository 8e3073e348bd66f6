"""Identity of the current process, which differs in every forked child.

A process number does not distinguish a child from its parent: in two process namespaces both may
have the same one. So objects that belong to one process (a nonce, a lock, a log, numbers drawn by a
thread) store the identity of the process that made them, and compare it.
"""

import os
from typing import NamedTuple


class Process(NamedTuple):
    """Identity of a process.

    Args:
        token: object that is new in every forked child, and is compared by identity.
        number: process number, for a fork that Python does not notice.
    """

    token: object
    number: int


_tokens = [object()]
"""List with the token of the current process."""


def present_process() -> Process:
    """Return the identity of the current process."""
    return Process(_tokens[0], os.getpid())


def _renew() -> None:
    _tokens[0] = object()


# Windows has no fork. Elsewhere this has to stand before the first fork, so it stands here.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
