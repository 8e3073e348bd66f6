"""Storage of the ledger on disk: a hash chain of JSON lines, and a keyed head.

The head says how many lines are valid.

A line is appended and synced, then the head is replaced and synced, and only then may noise be
drawn. So the noise of lines after the head was never drawn, and these lines are dropped; lines that
the head covers must be present. If an older head was restored, or both files were deleted, this is
detected with heads that were recorded elsewhere (`Anchor`): in checkpoints, in `private/`, in the
user's state directory, on a federation's server, or by a privacy officer.
"""

import hashlib
import hmac
import json
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from perdure.errors import LedgerError, StorageError
from perdure.privacy.noise.key import NoiseKey
from perdure.utils.atomic_files import write_atomically, writing
from perdure.utils.folder_lock import FolderLock
from perdure.utils.forks import present_process

Body = dict[str, Any]
"""Content of a line, without the hash of the line before it."""

GENESIS = "0" * 64
HEX = re.compile("[0-9a-f]{64}")

SCHEMA = 1


def canonical_json(value: object) -> str:
    """Return the canonical JSON text of `value`: sorted keys, no spaces, no NaN, plain ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256(text: str) -> str:
    """Return the SHA-256 of `text` in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def link(body: Body, previous: str) -> tuple[str, str]:
    """Return the line for `body` after a line with the hash `previous`, and the line's own hash."""
    chained = {**body, "prev": previous}
    own = sha256(canonical_json(chained))
    return canonical_json({**chained, "hash": own}), own


def unlink(line: str, previous: str) -> tuple[Body, str]:
    """Parse a line that `link` wrote, into its body and its hash.

    Raises:
        ValueError: if the line differs from the line that `link` writes after `previous`.
    """
    body = json.loads(line)
    if not isinstance(body, dict):
        raise ValueError("not an object")
    body = {name: value for name, value in body.items() if name not in ("prev", "hash")}
    expected, own = link(body, previous)
    if line != expected:
        raise ValueError("not the line that was written")
    return body, own


def verify(lines: Sequence[str], *, where: str, first: int = 1) -> tuple[list[Body], str]:
    """Parse a whole chain; return the bodies of its lines and the hash of the last one.

    `first` is the number of its first line in the file.

    Raises:
        LedgerError: names the first line that was edited, moved, inserted or removed.
    """
    bodies = []
    last = GENESIS
    for number, line in enumerate(lines, first):
        try:
            body, last = unlink(line, last)
        except (ValueError, RecursionError) as error:
            raise LedgerError(
                f"{where}, line {number}: the line was changed or moved, or a line before it is "
                "missing; restore the file from a backup"
            ) from error
        bodies.append(body)
    return bodies, last


@dataclass(frozen=True)
class SealedHead:
    """Head of a ledger: number of valid lines, hash of the last one, and a MAC over both."""

    count: int
    hash: str
    mac: str

    @classmethod
    def seal(cls, count: int, last: str, key: NoiseKey) -> "SealedHead":
        """Create the head of a chain.

        Args:
            count: number of lines.
            last: hash of the last line.
            key: the curator's key, for the MAC.
        """
        return cls(count, last, key.mac(_sealed(count, last)))

    @classmethod
    def parse(cls, text: str, *, where: str) -> "SealedHead":
        """Parse a head from `text`.

        Raises:
            LedgerError: if `text` is not exactly as the method `text()` writes it.
        """
        try:
            head = cls(**json.loads(text))
            sealed = all(isinstance(v, str) and HEX.fullmatch(v) for v in (head.hash, head.mac))
            if sealed and type(head.count) is int and head.count >= 0 and head.text() == text:
                return head
        except (ValueError, TypeError, RecursionError):
            pass
        raise LedgerError(f"{where}: the ledger's head is damaged; restore it from a backup")

    def text(self) -> str:
        """Return the head as one line of JSON."""
        return canonical_json(asdict(self))

    def sealed_with(self, key: NoiseKey) -> bool:
        """Return True if this key made the MAC of the head."""
        return hmac.compare_digest(self.mac, key.mac(_sealed(self.count, self.hash)))

    def check(self, key: NoiseKey, *, where: str) -> None:
        """Refuse a head whose MAC was made with another key.

        Raises:
            LedgerError: if the MAC does not belong to this key.
        """
        if not self.sealed_with(key):
            raise LedgerError(
                f"{where}: the MAC of the head does not fit this key; the head was edited, or the "
                "key is not the key of this ledger; restore head and key from one backup"
            )


@dataclass(frozen=True)
class Anchor:
    """A head that was recorded outside the ledger; the ledger must contain the line it names."""

    head: SealedHead
    where: str

    def check(self, lines: Sequence[str], *, key: NoiseKey | None, path: str) -> None:
        """Refuse lines of a ledger that do not continue from the recorded head.

        Args:
            lines: verified lines of the ledger.
            key: key of the curator; None to skip the check of the head's MAC.
            path: path of the ledger, for the message.

        Raises:
            LedgerError: if the ledger is missing, shorter than recorded, or a different one.
        """
        if key is not None:
            self.head.check(key, where=self.where)
        count = self.head.count
        if len(lines) < count:
            found = f"holds {len(lines)} lines" if lines else "is missing or empty"
            raise LedgerError(
                f"{path} {found}, but {self.where} records {count}, so charges are missing; "
                f"{RESTORE}"
            )
        if count and json.loads(lines[count - 1])["hash"] != self.head.hash:
            raise LedgerError(
                f"{path}, line {count}: this is not the line recorded by {self.where}, so it is "
                f"another ledger; {RESTORE}"
            )


@dataclass(frozen=True)
class HeadCopy:
    """File next to the ledger, or outside its folder, with a copy of the ledger's head.

    Args:
        path: path of the file; only its owner may read it.
        optional: True to give a warning, not an error, if the file cannot be written.
    """

    path: Path
    optional: bool = False

    def read(self) -> Anchor | None:
        """Return the head that was recorded last; None if none was recorded yet.

        Raises:
            LedgerError: if the file is damaged.
        """
        try:
            text = self.path.read_bytes().decode("ascii", errors="replace")
        except FileNotFoundError:
            return None
        except OSError as error:
            if self.optional:
                return None
            raise LedgerError(
                f"{self.path} cannot be read ({error.strerror}); make the file readable"
            ) from None
        return Anchor(SealedHead.parse(text, where=str(self.path)), str(self.path))

    def write(self, head: SealedHead) -> None:
        """Record a head, unless the file already has the same one."""
        known = self.read()
        if known is not None and known.head == head:
            return
        try:
            write_atomically(self.path, head.text().encode(), private=True)
        except StorageError as error:
            if not self.optional:
                raise
            warnings.warn(
                f"{self.path} cannot be written ({error.reason}), so an older copy of the run's "
                "folder would not be detected; set PERDURE_STATE to a folder, or to off",
                stacklevel=2,
            )


RESTORE = (
    "restore ledger.jsonl, ledger.head.json and private/ from the newest backup, or train a new "
    "model in another folder"
)


def _sealed(count: int, last: str) -> bytes:
    return canonical_json({"count": count, "hash": last}).encode()


def head_path(path: Path) -> Path:
    """Path of the head of a ledger: `ledger.jsonl` has its head in `ledger.head.json`."""
    return path.with_suffix(".head.json")


def read_lines(path: Path) -> list[str]:
    """Return all complete lines of a file; bytes that are not ASCII are replaced."""
    data = path.read_bytes() if path.exists() else b""
    return [line.decode("ascii", errors="replace") for line in data.split(b"\n")[:-1]]


def load(path: Path, key: NoiseKey | None) -> tuple[list[str], list[Body], SealedHead]:
    """Load and verify the lines of a ledger, their parsed contents, and the head.

    Without a key only the hash chain is verified.

    Raises:
        LedgerError: if a line was edited, moved, rewritten or removed; the message names the line.
    """
    beside = head_path(path)
    if not beside.exists():
        raise LedgerError(
            f"{beside} is missing, so {path.name} cannot be trusted; restore it from a backup"
        )
    head = SealedHead.parse(
        beside.read_bytes().decode("ascii", errors="replace"), where=str(beside)
    )
    if key is not None:
        head.check(key, where=str(beside))
    lines = read_lines(path)[: head.count]
    return lines, cover(lines, head, where=str(path)), head


def cover(lines: Sequence[str], head: SealedHead, *, where: str, first: int = 1) -> list[Body]:
    """Return the contents of `lines`; refuse lines that are not those that `head` counts.

    Raises:
        LedgerError: names the line where they differ.
    """
    bodies, last = verify(lines, where=where, first=first)
    if len(lines) < head.count:
        raise LedgerError(
            f"{where}, line {first + len(lines)}: the line is missing; the file has {len(lines)} "
            f"lines, but its head says {head.count}; restore the file from a backup"
        )
    if last != head.hash:
        raise LedgerError(
            f"{where}, line {first + head.count - 1}: the line was changed; its hash differs from "
            "the hash in the head; restore the file from a backup"
        )
    return bodies


class HashChain:
    """Append-only chain of lines with a head, on disk or in memory.

    Guarantee: when `append` returns, line and head survive a crash. If it raises, the next `open`
    keeps the line if and only if the head covers it.

    Args:
        path: path of the file; None for a chain in memory.
        key: key that makes the MAC of the head.
        trace: called with the name of every stage of a write.
        anchors: recorded heads that the file must continue from.
        copies: files with copies of the head; the file must continue from each of them.
        lock: lock that a writer must hold; None for none.
    """

    def __init__(
        self,
        path: Path | None,
        key: NoiseKey,
        trace: Callable[[str], None],
        *,
        anchors: Sequence[Anchor] = (),
        copies: Sequence[HeadCopy] = (),
        lock: FolderLock | None = None,
    ) -> None:
        self.lines: list[str] = []
        self.bodies: list[Body] = []
        self.last = GENESIS
        self.trace = trace
        self._path = path
        self._key = key
        self._size = 0
        self._interrupted = True
        self._copies = tuple(copies)
        self._lock = lock
        self._process = present_process()
        if lock is not None:
            lock.acquire()
        self._read_at = lock.taken if lock is not None else 0
        there = path is not None and (path.exists() or head_path(path).exists())
        if path is not None and there:
            self.lines, self.bodies, head = load(path, key)
            self.last = head.hash
            self._size = sum(len(line) + 1 for line in self.lines)
        # before anything is written, so that a refused folder does not change
        known = (copy.read() for copy in self._copies)
        for anchor in (*anchors, *(found for found in known if found is not None)):
            self.require(anchor)
        if path is not None and there:
            self._drop_uncovered(path)
        elif path is not None:
            write_atomically(head_path(path), self.head.text().encode())
        for copy in self._copies if self.lines else ():
            copy.write(self.head)

    @property
    def head(self) -> SealedHead:
        """Head of the chain as it is now."""
        return SealedHead.seal(len(self.lines), self.last, self._key)

    def require(self, anchor: Anchor) -> None:
        """Refuse a recorded head that is not the head of some of the first lines.

        Raises:
            LedgerError: if lines are missing, fewer or different from the recorded ones.
        """
        anchor.check(self.lines, key=self._key, path=str(self._path or "the ledger in memory"))

    def hold(self) -> None:
        """Take the lock again if it was released, and check that nobody wrote in between.

        Raises:
            RunError: if another process or learner works in the folder.
            LedgerError: if another process wrote to the ledger, or if this is a forked child
                process.
        """
        self._refuse_child()
        if self._lock is None:
            return
        self._lock.acquire()
        if self._lock.taken == self._read_at or self._path is None:
            return
        beside = head_path(self._path)
        if not beside.exists() or beside.read_text() != self.head.text():
            self._lock.release()
            raise LedgerError(
                f"{self._path}: another process or learner wrote to this ledger; make a new "
                "learner, which continues from the new state"
            )
        self._read_at = self._lock.taken

    def _refuse_child(self) -> None:
        """Refuse to charge, and so to draw noise, in a forked child process.

        A simulation in memory is allowed, because its noise is the same in every process.
        """
        simulated = self._path is None and self._key.simulated
        if self._process != present_process() and not simulated:
            raise LedgerError(
                f"{self._path or 'the ledger in memory'} was opened before this process was "
                "forked, and belongs to the parent process; close it in the parent, and make a "
                "new learner in the child"
            )

    def append(self, body: Body) -> None:
        """Append one line to the file, then update the head.

        Raises:
            LedgerError: if another process has written to the file.
        """
        self.hold()
        line, own = link(body, self.last)
        self.trace("ledger.before-append")
        if self._path is not None:
            self._drop_uncovered(self._path)
            self._interrupted = True
            _append(self._path, line + "\n")
        self.trace("ledger.appended")
        head = SealedHead.seal(len(self.lines) + 1, own, self._key)
        if self._path is not None:
            write_atomically(head_path(self._path), head.text().encode())
        for copy in self._copies:  # after the head, so that no copy is newer than the head
            copy.write(head)
        self.lines.append(line)
        self.bodies.append(body)
        self.last = own
        self._interrupted = False
        self._size += len(line) + 1

    def _drop_uncovered(self, path: Path) -> None:
        """Remove lines after the head that a crash left; their noise was never drawn."""
        size = path.stat().st_size if path.exists() else 0
        if size != self._size and not self._interrupted:
            raise LedgerError(
                f"{path}: another process wrote to this ledger; use it from one process at a time"
            )
        if size > self._size:
            with writing(path):
                os.truncate(path, self._size)
        self._interrupted = False


def _append(path: Path, text: str) -> None:
    with writing(path), path.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
