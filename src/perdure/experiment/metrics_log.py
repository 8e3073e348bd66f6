"""File `metrics.jsonl` of a run."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perdure.errors import RunError
from perdure.utils.atomic_files import write_atomically, writing


class MetricsLog:
    """File `metrics.jsonl` of a run: measurements of each arm after each experience.

    Each line is one JSON object. A resumed run does not repeat the lines that the file has.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        kept = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in kept if line.endswith(b"\n")]
        if whole != kept:
            write_atomically(path, b"".join(whole))
        try:
            rows = [json.loads(line) for line in whole]
            self.rows: dict[tuple[str, int], dict[str, Any]] = {
                (row["trial"], row["experience"]): row for row in rows
            }
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{path} is damaged ({error!r}); restore it from a backup, or delete the folder"
            ) from None

    def append(self, row: Mapping[str, Any]) -> None:
        """Append the measurements of an arm after an experience, unless the file has them."""
        key = (row["trial"], row["experience"])
        if key in self.rows:
            return
        self.rows[key] = dict(row)
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
