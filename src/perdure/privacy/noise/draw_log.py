"""Log of the exact sums for which noise was drawn, so that no noise is used for two sums.

A step may be executed again: a run that was killed continues from its last checkpoint. If the step
then has the same sum, the same noise gives the same result, which costs nothing. With another sum
(because of changed code, or another library) the same noise would reveal the difference of the two
sums, and fresh noise would be a second release that nobody charged. So the MAC of every exact sum
is written to the log before noise is added to it, with the nonce for which the noise is drawn:

- the sum has the MAC of an earlier draw: the same noise is drawn again, with its nonce;
- nothing was drawn for the step: the noise is drawn with the nonce of this process;
- in all other cases, the step is charged again, as a new entry, before noise is drawn.

Lines are passed to the operating system before noise is drawn, so a killed process loses none. They
are synced to disk once per block, when the block is closed. If the machine stopped in any other way
(another boot, or an unknown one), the noise of a block that was not closed counts as used, and the
block is charged again.

If an older copy of the log were restored, a second release would cost nothing. So its head (see
`perdure.privacy.noise.draw_lines`) is kept elsewhere too. A log that does not continue from that
head records this in a line of its own, and the noise of every entry that was open before then
counts as used. A closed entry never draws anything new, so none of its lines can be needed. One
process writes at a time, and this is checked before every draw: a second writer, a file that was
replaced, and a forked child process are refused.
"""

import errno
import os
import secrets
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from perdure.errors import LedgerError, StorageError
from perdure.privacy.noise.draw_lines import (
    DrawsHead,
    HeadFile,
    Line,
    compare,
    head_file,
    write_line,
)
from perdure.privacy.noise.key import NoiseKey
from perdure.utils.atomic_files import writing
from perdure.utils.folder_lock import FolderLock
from perdure.utils.forks import present_process

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""File that holds the identifier of the current boot on Linux."""


class DrawLog:
    """MACs of the sums for which noise was drawn, and nonces of the processes that drew it.

    Args:
        path: path of the file, usually `private/draws.jsonl`; None keeps the log in memory.
        key: key of the curator.
        boot: identifier of the current boot; "" if it is not known, which counts as another boot.
        copies: files outside the folder with copies of the log's head; a file that cannot be
            written is skipped.
        anchors: heads that were recorded elsewhere, such as in checkpoints.
        lock: lock that a process must hold to draw; after it was released and taken again, the log
            is read again.

    Raises:
        PrivacyError: if a line other than the last one is damaged.
    """

    def __init__(
        self,
        path: Path | None,
        key: NoiseKey,
        boot: str | None = None,
        *,
        copies: Sequence[Path] = (),
        anchors: Sequence[DrawsHead] = (),
        lock: FolderLock | None = None,
    ) -> None:
        self._path = path
        self._key = key
        self._mac = key.chain("draws")
        self._boot = _present_boot() if boot is None else boot
        self._copies = tuple(copies)
        self._anchors = tuple(anchors)
        self._lock = lock
        self._process = present_process()
        self._nonce = secrets.token_hex(16)
        self._nonce_of = self._process
        self._own: set[str] = set()
        self._drawn: dict[str, dict[str, str]] = {}
        self._opened: dict[str, str] = {}
        self._closed: set[str] = set()
        self._head = DrawsHead()
        self._log = -1
        self._closing: weakref.finalize[..., DrawLog] | None = None
        if path:
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._read(path)

    @property
    def nonce(self) -> str:
        """128 random bits that belong to this process and this opening of the log only.

        In a simulation it is empty, so that the run can be repeated.
        """
        if self._key.simulated:
            return ""
        if self._nonce_of != present_process():  # after a fork
            self._nonce_of = present_process()
            self._nonce = secrets.token_hex(16)
        return self._nonce

    @property
    def head(self) -> DrawsHead:
        """Number of lines, and the MAC of the last one."""
        return self._head

    def open(self, entry: str) -> None:
        """Write to the log that noise of `entry` may be drawn until the machine restarts."""
        self._hold()
        if entry not in self._closed and self._opened.get(entry) != self._boot:
            self._write({"kind": "open", "entry": entry, "boot": self._boot})
        self._own.add(entry)

    def close(self, entry: str) -> None:
        """Write to the log that it contains all used noise of `entry`, and sync the file."""
        self._hold()
        if entry in self._opened and entry not in self._closed:
            self._write({"kind": "close", "entry": entry}, sync=True)

    def closed(self, entry: str) -> bool:
        """Return True if all noise of an entry is in the log; results may have been used."""
        self._hold()
        return entry in self._closed

    def seen(self, entry: str) -> bool:
        """Return True if noise of `entry` may have been drawn without a line in the log.

        Args:
            entry: digest of an entry that was in the ledger before this process.
        """
        self._hold()
        if entry in self._closed:
            return False
        boot = self._opened.get(entry)
        unknown = not self._boot and entry not in self._own
        return boot is None or unknown or boot != self._boot

    def nonce_for(
        self,
        purpose: str,
        entry: str,
        step: int,
        exact: npt.NDArray[np.int64],
        *,
        unseen: bool = False,
    ) -> str | None:
        """Nonce with which noise may be drawn for a sum; the log has it when this returns.

        Args:
            purpose: purpose of the noise.
            entry: digest of the ledger entry of the sum; `open` was called for it.
            step: step of the run.
            exact: (n,) the exact sum, in grid steps.
            unseen: True if no result is used before the entry is closed; while it is open, another
                sum then gets another nonce.

        Returns:
            The nonce; None if noise was drawn, or may have been drawn, for another sum.

        Raises:
            LedgerError: in a forked child, or if another process wrote to the log.
        """
        self._hold()
        place = f"{purpose} {entry} {step}"
        mac = self._key.tag(place, exact)
        drawn = self._drawn.get(place, {})
        if mac in drawn:
            return drawn[mac]
        again = bool(drawn) and (self._key.simulated or not unseen)
        # If the MAC was not written to the log, no noise is drawn for it here.
        if again or entry in self._closed or entry not in self._opened:
            return None
        nonce = secrets.token_hex(16) if drawn else self.nonce
        self._write({"kind": "draw", "entry": entry, "place": place, "mac": mac, "nonce": nonce})
        return nonce

    def release(self) -> None:
        """Close the files; the log is read again at the next use."""
        if self._closing:
            self._closing()

    # ------------------------------------------------------------------ inside

    def _hold(self) -> None:
        """Refuse a forked child and a second writer; read the log again if it may have changed.

        A simulation in memory is allowed in a child, because its noise is the same in every
        process.
        """
        simulated = self._path is None and self._key.simulated
        if self._process != present_process() and not simulated:
            raise LedgerError(
                f"{self._path or 'the log of draws in memory'} was opened before this process was "
                "forked, and belongs to the parent process; close it in the parent, and make a "
                "new learner in the child"
            )
        if self._path is None:
            return
        taken = self._lock.taken if self._lock else 0
        if taken != self._read_at or not (self._closing and self._closing.alive):
            self._read(self._path)
            return
        if _file(self._path) != self._file:
            raise LedgerError(
                f"{self._path} was changed, or replaced by an older copy, while this learner used "
                "it; make a new learner, which continues from the new state"
            )

    def _read(self, path: Path) -> None:
        """Read the file, and record in it which recorded heads it does not continue from."""
        found, missed = compare(path, self._key, self._copies, self._anchors)
        self._drawn = {}
        self._opened = {}
        self._closed = set()
        for line in found.lines:
            self._take(line)
        self._head = found.head
        self._read_at = self._lock.taken if self._lock else 0
        with writing(path):
            self._open_files(path)
            os.ftruncate(self._log, found.size)
            self._file = _file(path)
            if not missed:
                self._record()
                return
        # Before the heads are overwritten; otherwise a kill in between would hide the missing
        # lines.
        heads = ", ".join(sorted(f"{head.count} {head.mac}" for head in missed))
        self._write({"kind": "lost", "heads": heads})

    def _open_files(self, path: Path) -> None:
        """Open the log and the files of its head; files that were open are closed."""
        if self._closing:
            self._closing()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        self._log = os.open(path, flags, 0o600)
        descriptors = [self._log]
        self._closing = weakref.finalize(self, _close, descriptors)
        self._heads: list[HeadFile] = []
        for place in (head_file(path), *self._copies):
            try:
                with writing(place):
                    file = HeadFile(place)
            except StorageError:
                if place in self._copies:
                    continue
                raise
            self._heads.append(file)
            descriptors.append(file.descriptor)

    def _write(self, line: Line, *, sync: bool = False) -> None:
        if self._path:
            data, mac = write_line(line, self._head.mac, self._mac)
            with writing(self._path):
                written = os.write(self._log, data)
            self._head = DrawsHead(self._head.count + 1, mac)
            device, number, size = self._file
            # the size with a complete line; a line cut by a full disk is detected at the next draw
            self._file = (device, number, size + len(data))
            with writing(self._path):
                if written != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if sync:
                    os.fsync(self._log)
                self._record()
        self._take(line)

    def _record(self) -> None:
        """Update every file with the head; the log itself is written first."""
        for file in self._heads:
            file.write(self._head)

    def _take(self, line: Line) -> None:
        kind = line["kind"]
        if kind == "open":
            self._opened[line["entry"]] = line["boot"]
        elif kind == "close":
            self._closed.add(line["entry"])
        elif kind == "lost":
            self._opened = {entry: self._opened[entry] for entry in self._closed}
            self._own = set()
        else:
            self._drawn.setdefault(line["place"], {})[line["mac"]] = line["nonce"]


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _file(path: Path) -> tuple[int, int, int]:
    """Device, inode and size of a file; zeros if it does not exist."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    return (found.st_dev, found.st_ino, found.st_size)


def _present_boot() -> str:
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""
