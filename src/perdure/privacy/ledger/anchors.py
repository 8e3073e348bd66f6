"""Copies of a ledger's head outside of the ledger, which detect that an old ledger was restored.

`private/ledger.head.json` is in the run's folder; the user's state directory is outside of it.
"""

import os
from pathlib import Path

from perdure.privacy.ledger.storage import HeadCopy
from perdure.privacy.noise.key import NoiseKey

SETTING = "PERDURE_STATE"
"""Environment variable with a folder for copies of heads, or `off`.

Default: `$XDG_STATE_HOME/perdure`, or `~/.local/state/perdure`.
"""
OFF = "off"


def private_copy(folder: Path) -> HeadCopy:
    """Copy of the head in the folder `private/` of a curator."""
    return HeadCopy(folder / "private" / "ledger.head.json")


def state_copy(key: NoiseKey) -> HeadCopy | None:
    """Copy of the head in the user's state directory.

    The file is named after the key, so it is found after the run's folder was moved or copied.

    Returns:
        The copy; None for a simulated key, which many runs share, or if the setting is `off`.
    """
    folder = state_folder()
    if folder is None or key.simulated:
        return None
    name = key.mac(b"name of the head in the state directory")[:32]
    return HeadCopy(folder / "ledgers" / f"{name}.head.json", optional=True)


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
