"""Lines and heads of the log of draws; a MAC in each line covers it and all lines before it.

A head is the number of lines and the MAC of the last one. It is kept in files next to the log and
outside its folder, so that a log that was restored from an older copy is recognised.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from perdure.errors import PrivacyError
from perdure.privacy.noise.key import NoiseKey

Line = Mapping[str, str]
"""Content of a line of the log, without its MAC."""

FIELDS = {
    "open": {"kind", "entry", "boot"},
    "close": {"kind", "entry"},
    "draw": {"kind", "entry", "place", "mac", "nonce"},
    "lost": {"kind", "heads"},
}
"""Names of the fields in each kind of line."""
GENESIS = "0" * 64
SEPARATOR = b', "chain": "'
SUFFIX = len(SEPARATOR) + len(GENESIS) + len('"}')
HEAD = re.compile(r"(\d{12}) ([0-9a-f]{64})\n")


@dataclass(frozen=True)
class DrawsHead:
    """Number of lines of the log, and the MAC of the last one, which covers all lines."""

    count: int = 0
    mac: str = GENESIS

    @classmethod
    def parse(cls, text: str) -> "DrawsHead | None":
        """Parse a head; None for any other text, for example after an interrupted write."""
        found = HEAD.fullmatch(text)
        return cls(int(found[1]), found[2]) if found else None

    def text(self) -> str:
        """Return the head as a line of fixed length, which is overwritten in one piece."""
        return f"{self.count:012d} {self.mac}\n"


@dataclass(frozen=True)
class DrawLines:
    """Complete, verified lines of a log.

    Args:
        lines: the lines in order.
        macs: MAC of every line.
        size: total bytes of the lines; any bytes after them are an interrupted write.
    """

    lines: tuple[Line, ...]
    macs: tuple[str, ...]
    size: int

    @property
    def head(self) -> DrawsHead:
        """Head of the log with these lines."""
        return DrawsHead(len(self.macs), self.macs[-1]) if self.macs else DrawsHead()

    def cover(self, head: DrawsHead) -> bool:
        """Return True if the lines continue from a recorded head, or list it as lost."""
        if not head.count:
            return True
        if head.count <= len(self.macs) and self.macs[head.count - 1] == head.mac:
            return True
        given_up = f"{head.count} {head.mac}"
        return any(given_up in line["heads"] for line in self.lines if line["kind"] == "lost")


def write_line(line: Line, previous: str, mac: Callable[[bytes], str]) -> tuple[bytes, str]:
    """Return the bytes of a line after a line with the MAC `previous`, and the new MAC."""
    body = json.dumps(dict(line), sort_keys=True).encode()
    own = mac(previous.encode() + body)
    return body[:-1] + SEPARATOR + own.encode() + b'"}\n', own


def read_lines(path: Path, key: NoiseKey) -> DrawLines:
    """Read a log; an incomplete last line is ignored, because nothing was written after it.

    Raises:
        PrivacyError: if a line is damaged, edited or moved, or a line before it is missing.
    """
    data = path.read_bytes() if path.exists() else b""
    whole, _, torn = data.rpartition(b"\n")
    mac = key.chain("draws")
    lines: list[Line] = []
    macs: list[str] = []
    last = GENESIS
    for number, text in enumerate(whole.split(b"\n") if whole else (), 1):
        body = text[:-SUFFIX] + b"}"
        own = mac(last.encode() + body)
        line = _parsed(body) if text[-SUFFIX:] == SEPARATOR + own.encode() + b'"}' else None
        if line is None:
            raise PrivacyError(
                f"{path}, line {number} is damaged or edited, or a line before it is missing; "
                "delete the file, and do not restore an older copy: steps that run again are "
                "then charged again"
            )
        lines.append(line)
        macs.append(own)
        last = own
    return DrawLines(tuple(lines), tuple(macs), len(data) - len(torn))


def _parsed(body: bytes) -> Line | None:
    """Return the content of a line; None if the text cannot be a line of a log."""
    try:
        line = json.loads(body)
        known = set(line) == FIELDS[line["kind"]]
    except (ValueError, KeyError, TypeError):
        return None
    return line if known else None


def head_file(path: Path) -> Path:
    """Path of the head of a log: `draws.jsonl` has its head in `draws.head`."""
    return path.with_suffix(".head")


def read_head(path: Path) -> DrawsHead | None:
    """Return the head that a file holds; None if there is none."""
    try:
        return DrawsHead.parse(path.read_bytes().decode("ascii", errors="replace"))
    except OSError:
        return None


def compare(
    path: Path, key: NoiseKey, copies: Sequence[Path], anchors: Sequence[DrawsHead]
) -> tuple[DrawLines, list[DrawsHead]]:
    """Read a log; return it with the recorded heads that it does not continue from.

    The file with its own head must exist: without it, missing lines would not be noticed.

    Args:
        path: path of the log.
        key: key of the curator.
        copies: files outside the folder that hold a head.
        anchors: heads from elsewhere, such as checkpoints.

    Raises:
        PrivacyError: if a line is damaged, edited or moved, or a line before it is missing.
    """
    # read before the log, which a run may extend meanwhile
    beside = read_head(head_file(path))
    known = [beside, *map(read_head, copies), *anchors]
    found = read_lines(path, key)
    missed = [head for head in known if head is not None and not found.cover(head)]
    if beside is None and found.lines:
        missed.append(found.head)
    return found, missed


class HeadFile:
    """File that holds the head of a log, overwritten in place after every line.

    It is not synced: after a crash of the machine an open block is charged again anyway.

    Args:
        path: path of the file; only its owner may read it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)

    def write(self, head: DrawsHead) -> None:
        """Write a head to the file."""
        os.pwrite(self.descriptor, head.text().encode(), 0)
