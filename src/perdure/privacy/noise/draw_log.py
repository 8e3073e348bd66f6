"""Log of the exact sums that noise was drawn for, so that no noise is ever met twice.

A step may be executed again: a run that was killed goes on from its last checkpoint. If the step
then has the same sum, the same noise gives the same answer, which costs nothing. With another sum
(changed code, another library) the same noise would give away the difference of the two sums, and
fresh noise would be a second look that nobody charged. So the MAC of every exact sum is written
down before noise is added to it, with the nonce under which the noise is drawn:

- the sum has the MAC of an earlier draw: its noise is drawn again, under its nonce;
- nothing was drawn for the step: the noise is drawn under the nonce of this process;
- anything else: the step is charged again, as a new entry, before it is drawn.

Lines reach the operating system before noise is drawn, so a killed process loses none. They reach
the disk once a block, when the block is closed. After a machine stopped otherwise (another boot, or
none that is known) a block that was not closed counts as seen, and is charged again.
"""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from perdure.errors import PrivacyError
from perdure.privacy.noise.key import NoiseKey

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""File in which Linux names the present boot."""


class DrawLog:
    """MACs of the sums that noise was drawn for, and nonces of the processes that drew it.

    Args:
        path: the file, by custom `private/draws.jsonl`; None keeps the log in memory.
        key: of the curator.
        boot: name of the present boot; empty where it is not known, which counts as another one.

    Raises:
        PrivacyError: for a file with a line that is damaged, other than the last.
    """

    def __init__(self, path: Path | None, key: NoiseKey, boot: str | None = None) -> None:
        self._path = path
        self._key = key
        self._boot = _present_boot() if boot is None else boot
        self._drawn: dict[str, dict[str, str]] = {}
        self._opened: dict[str, str] = {}
        self._closed: set[str] = set()
        self._process = 0
        self._nonce = ""
        if path:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        for line in _lines(path) if path else ():
            self._take(line)
        self._earlier = frozenset(self._opened)

    @property
    def nonce(self) -> str:
        """128 bits that no other process and no other opening of the log has.

        A simulation has none, or it could not be repeated.
        """
        if self._key.simulated:
            return ""
        if self._process != os.getpid():  # also after a fork
            self._process = os.getpid()
            self._nonce = secrets.token_hex(16)
        return self._nonce

    def open(self, entry: str) -> None:
        """Note that noise of `entry` may be drawn from now on, in this boot."""
        if entry not in self._closed and self._opened.get(entry) != self._boot:
            self._write({"kind": "open", "entry": entry, "boot": self._boot})

    def close(self, entry: str) -> None:
        """Note that all noise of `entry` that anybody has seen is in the log, and sync it."""
        if entry in self._opened and entry not in self._closed:
            self._write({"kind": "close", "entry": entry}, sync=True)

    def seen(self, entry: str) -> bool:
        """True where noise of `entry` may have been drawn without a line in the log.

        Args:
            entry: digest of an entry that was in the ledger before.
        """
        if entry in self._closed:
            return False
        boot = self._opened.get(entry)
        return boot is None or (entry in self._earlier and not self._boot) or boot != self._boot

    def nonce_for(self, place: str, exact: npt.NDArray[np.int64]) -> str | None:
        """Nonce under which noise may be added to a sum; noted before this returns.

        Args:
            place: purpose, entry and step.
            exact: (n,) the exact sum, in grid steps.

        Returns:
            None where noise was drawn there for another sum.
        """
        mac = self._key.tag(place, exact)
        drawn = self._drawn.get(place, {})
        if mac in drawn:
            return drawn[mac]
        if drawn:
            return None  # the MAC is not noted: nothing is drawn for it here
        self._write({"kind": "draw", "place": place, "mac": mac, "nonce": self.nonce})
        return self.nonce

    def _write(self, line: Mapping[str, str], *, sync: bool = False) -> None:
        if self._path:
            with open(self._path, "ab", opener=_private) as file:
                file.write(json.dumps(line, sort_keys=True).encode() + b"\n")
                file.flush()
                if sync:
                    os.fsync(file.fileno())
        self._take(line)

    def _take(self, line: Mapping[str, Any]) -> None:
        kind = line["kind"]
        if kind == "open":
            self._opened[line["entry"]] = line["boot"]
        elif kind == "close":
            self._closed.add(line["entry"])
        else:
            self._drawn.setdefault(line["place"], {})[line["mac"]] = line["nonce"]


def _lines(path: Path) -> list[dict[str, Any]]:
    """Lines of the file; a last one that a stop tore is dropped, since nothing followed it."""
    data = path.read_bytes() if path.exists() else b""
    whole, _, torn = data.rpartition(b"\n")
    if torn:
        os.truncate(path, len(data) - len(torn))
    lines = []
    for number, text in enumerate(whole.split(b"\n") if whole else (), 1):
        try:
            line = json.loads(text)
            {"open": ("entry", "boot"), "close": ("entry",), "draw": ("place", "mac", "nonce")}[
                line["kind"]
            ]
        except (ValueError, KeyError, TypeError):
            raise PrivacyError(
                f"{path}, line {number} is damaged; restore it, or remove the file: steps that are "
                "executed again are then charged again"
            ) from None
        lines.append(line)
    return lines


def _private(path: str, flags: int) -> int:
    """Open a file that only its owner may read."""
    return os.open(path, flags, mode=0o600)


def _present_boot() -> str:
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""
