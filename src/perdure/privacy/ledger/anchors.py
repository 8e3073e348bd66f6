"""Copies of a ledger's head outside of the ledger, which detect that an old ledger was restored.

`private/ledger.head.json` is in the run's folder; the user's state directory is outside of it. A
private selection has one record in the state directory, and its trainings have none.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from perdure.privacy.ledger.storage import HeadCopy
from perdure.privacy.noise.key import NoiseKey

SETTING = "PERDURE_STATE"
"""Environment variable with a folder for copies of heads, or `off`.

Default: `$XDG_STATE_HOME/perdure`, or `~/.local/state/perdure`.
"""
OFF = "off"
_INSIDE: ContextVar[bool] = ContextVar("_INSIDE", default=False)
"""True while heads are kept in the folders of their runs only."""


@contextmanager
def heads_inside() -> Iterator[None]:
    """Context manager that keeps the heads of ledgers out of the state directory.

    It is for trainings whose number is secret: their files would tell it, also after the trainings
    were deleted.
    """
    before = _INSIDE.set(True)
    try:
        yield
    finally:
        _INSIDE.reset(before)


def private_copy(folder: Path) -> HeadCopy:
    """Copy of the head in the folder `private/` of a curator."""
    return HeadCopy(folder / "private" / "ledger.head.json")


def state_copy(key: NoiseKey) -> HeadCopy | None:
    """Copy of the head in the user's state directory.

    The file is named after the key, so it is found after the run's folder was moved or copied.

    Returns:
        The copy; None for a simulated key, which many runs share, within `heads_inside`, or if the
        setting is `off`.
    """
    if _INSIDE.get():
        return None
    return _copy(key, b"name of the head in the state directory", "head.json")


def state_selection(key: NoiseKey) -> HeadCopy | None:
    """Record in the user's state directory of what a private selection releases.

    Args:
        key: key of the selection; None is returned in the cases of `state_copy`.
    """
    return _copy(key, b"name of the selection in the state directory", "selection.json")


def _copy(key: NoiseKey, purpose: bytes, ending: str) -> HeadCopy | None:
    folder = state_folder()
    if folder is None or key.simulated:
        return None
    name = key.mac(purpose)[:32]
    return HeadCopy(folder / "ledgers" / f"{name}.{ending}", optional=True)


def state_draws(key: NoiseKey) -> Path | None:
    """Path of the copy of the draw log's head, next to the copy of the ledger's head."""
    copy = state_copy(key)
    if copy is None:
        return None
    return copy.path.with_name(copy.path.name.replace(".head.json", ".draws.head"))


def state_folder() -> Path | None:
    """State directory of perdure for this user; None if the setting is `off`."""
    chosen = os.environ.get(SETTING, "")
    if chosen == OFF:
        return None
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if base else Path.home() / ".local" / "state") / "perdure"
