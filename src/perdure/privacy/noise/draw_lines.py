"""Lines of the log of draws, each with a MAC over itself and all before it, and heads of the log.

A head is the number of lines and the MAC of the last one. It is kept in files beside and outside
the log, so that a log that was put back from an earlier time is told from one that goes on.
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
"""Content of a line, without its MAC."""

FIELDS = {
    "open": {"kind", "entry", "boot"},
    "close": {"kind", "entry"},
    "draw": {"kind", "entry", "place", "mac", "nonce"},
    "lost": {"kind", "heads"},
}
"""Names in a line of each kind."""
GENESIS = "0" * 64
SEPARATOR = b', "chain": "'
SUFFIX = len(SEPARATOR) + len(GENESIS) + len('"}')
HEAD = re.compile(r"(\d{12}) ([0-9a-f]{64})\n")


@dataclass(frozen=True)
class DrawsHead:
    """Number of lines of the log, and the MAC of the last one, which covers all."""

    count: int = 0
    mac: str = GENESIS

    @classmethod
    def parse(cls, text: str) -> "DrawsHead | None":
        """Undo `text`; None for another text, such as one that a stop of the machine tore."""
        found = HEAD.fullmatch(text)
        return cls(int(found[1]), found[2]) if found else None

    def text(self) -> str:
        """One line of a fixed length, which is written over the one before in one piece."""
        return f"{self.count:012d} {self.mac}\n"


@dataclass(frozen=True)
class DrawLines:
    """Whole lines of a log, verified.

    Args:
        lines: in order.
        macs: of every line.
        size: their number of bytes; what lies beyond was torn by a stop.
    """

    lines: tuple[Line, ...]
    macs: tuple[str, ...]
    size: int

    @property
    def head(self) -> DrawsHead:
        """Head of all lines."""
        return DrawsHead(len(self.macs), self.macs[-1]) if self.macs else DrawsHead()

    def cover(self, head: DrawsHead) -> bool:
        """Tell if the lines go on from a recorded head, or say that its draws were lost."""
        if not head.count:
            return True
        if head.count <= len(self.macs) and self.macs[head.count - 1] == head.mac:
            return True
        given_up = f"{head.count} {head.mac}"
        return any(given_up in line["heads"] for line in self.lines if line["kind"] == "lost")


def write_line(line: Line, previous: str, mac: Callable[[bytes], str]) -> tuple[bytes, str]:
    """Bytes of a line after one with the MAC `previous`, and its own MAC."""
    body = json.dumps(dict(line), sort_keys=True).encode()
    own = mac(previous.encode() + body)
    return body[:-1] + SEPARATOR + own.encode() + b'"}\n', own


def read_lines(path: Path, key: NoiseKey) -> DrawLines:
    """Read a log; a last line that a stop tore is left out, since nothing followed it.

    Raises:
        PrivacyError: for a line that is damaged, edited, moved or after a gap.
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
    """Return the content of a line; None for text that no log contains."""
    try:
        line = json.loads(body)
        known = set(line) == FIELDS[line["kind"]]
    except (ValueError, KeyError, TypeError):
        return None
    return line if known else None


def head_file(path: Path) -> Path:
    """`draws.jsonl` has its head in `draws.head`."""
    return path.with_suffix(".head")


def read_head(path: Path) -> DrawsHead | None:
    """Return the head that a file holds; None where there is none."""
    try:
        return DrawsHead.parse(path.read_bytes().decode("ascii", errors="replace"))
    except OSError:
        return None


def compare(
    path: Path, key: NoiseKey, copies: Sequence[Path], anchors: Sequence[DrawsHead]
) -> tuple[DrawLines, list[DrawsHead]]:
    """Read a log, and return it with the recorded heads that it does not go on from.

    Its own head has to be there: without it nothing tells whether lines are missing.

    Args:
        path: of the log.
        key: of the curator.
        copies: files outside that hold a head.
        anchors: heads from elsewhere, such as checkpoints.

    Raises:
        PrivacyError: for a line that is damaged, edited, moved or after a gap.
    """
    # before the log, which a run may go on with meanwhile
    beside = read_head(head_file(path))
    known = [beside, *map(read_head, copies), *anchors]
    found = read_lines(path, key)
    missed = [head for head in known if head is not None and not found.cover(head)]
    if beside is None and found.lines:
        missed.append(found.head)
    return found, missed


class HeadFile:
    """A file that holds the head of a log, written over in place at every line.

    It is not synced: after a stop of the machine an open block is charged again anyway.

    Args:
        path: of the file, which only its owner may read.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)

    def write(self, head: DrawsHead) -> None:
        """Record a head."""
        os.pwrite(self.descriptor, head.text().encode(), 0)
