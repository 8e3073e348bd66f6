"""Files outside a ledger that follow its head, so that a ledger that was put back is seen.

`private/ledger.head.json` lies in the run's folder; the user's state directory lies outside it.
"""

import os
from pathlib import Path

from perdure.privacy.ledger.storage import HeadCopy
from perdure.privacy.noise.key import NoiseKey

SETTING = "PERDURE_STATE"
"""Environment variable: a folder to keep heads in, or `off`.

Default: `$XDG_STATE_HOME/perdure`, or `~/.local/state/perdure`.
"""
OFF = "off"


def private_copy(folder: Path) -> HeadCopy:
    """Copy of the head in the `private/` of a curator's folder."""
    return HeadCopy(folder / "private" / "ledger.head.json")


def state_copy(key: NoiseKey) -> HeadCopy | None:
    """Copy of the head in the user's state directory.

    It is named by the key, so that it is found wherever the run's folder was moved or copied to.

    Returns:
        None for a simulated key, which many runs share, and where the setting is `off`.
    """
    folder = state_folder()
    if folder is None or key.simulated:
        return None
    name = key.mac(b"name of the head in the state directory")[:32]
    return HeadCopy(folder / "ledgers" / f"{name}.head.json", optional=True)


def state_draws(key: NoiseKey) -> Path | None:
    """Path of the copy of the draw log's head, beside the ledger's (see `state_copy`)."""
    copy = state_copy(key)
    if copy is None:
        return None
    return copy.path.with_name(copy.path.name.replace(".head.json", ".draws.head"))


def state_folder() -> Path | None:
    """The user's state directory of perdure; None where the setting is `off`."""
    chosen = os.environ.get(SETTING, "")
    if chosen == OFF:
        return None
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if base else Path.home() / ".local" / "state") / "perdure"
