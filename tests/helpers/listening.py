"""Addresses on which a process listens; run as a program, it reports them of its parent.

python listening.py REPORT RANK COUNT MEETING writes them, and the mode of the folder of MEETING,
to the JSON file REPORT.
"""

import json
import os
import stat
import sys
from pathlib import Path

LISTENS = "0A"
"""State of a listening socket in `/proc/net/tcp`."""


def listening(process: int) -> list[str]:
    """Return the addresses, as `/proc/net/tcp` writes them: address, colon, port."""
    folder = Path(f"/proc/{process}")
    opened = {str(path.readlink()) for path in (folder / "fd").iterdir() if path.is_symlink()}
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in (folder / "net" / name).read_text().splitlines()
    ]
    return [row[1] for row in rows if row[3] == LISTENS and f"socket:[{row[9]}]" in opened]


def report(path: str, rank: str, count: str, meeting: str) -> None:
    """Describe the meeting of the process that started this one."""
    folder = Path(meeting).parent
    found = {
        "given": [rank, count],
        "folder": str(folder),
        "mode": stat.S_IMODE(folder.stat().st_mode),
        "listening": listening(os.getppid()),
    }
    Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    report(*sys.argv[1:])
