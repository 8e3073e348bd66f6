"""Checkpoints: safetensors and JSON, written atomically, private rows apart; never pickle."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from perdure.errors import RunError

KEEP = 2
"""Checkpoints kept, so that the one before the last survives a crash while the last is written."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything that a run needs to go on.

    Args:
        tensors: what may be published: parameters, optimiser, strategy state.
        private: what stays in `private/`: memory rows.
        facts: JSON values: position, rates, results so far.
    """

    tensors: Mapping[str, Tensor]
    private: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file in one step and see it through to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically, keys in the order given."""
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=True) + "\n").encode())


class Store:
    """Numbered checkpoints of one run or client in a folder: `checkpoint/` and `private/`.

    A checkpoint exists once `checkpoint/latest.json` names it; whatever else lies there is an unfinished draft.
    """

    def __init__(self, folder: Path) -> None:
        self.public, self.private = folder / "checkpoint", folder / "private"
        self._latest = self.public / "latest.json"

    def save(self, number: int, snapshot: Snapshot) -> None:
        """Write checkpoint `number`, then point to it, then drop old ones."""
        from safetensors.torch import save

        self.private.mkdir(parents=True, exist_ok=True, mode=0o700)
        for folder, tensors in ((self.private, snapshot.private), (self.public, snapshot.tensors)):
            whole = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
            write_atomically(folder / f"{number:06d}.safetensors", save(whole))
        write_json(self.public / f"{number:06d}.json", dict(snapshot.facts))
        write_json(self._latest, {"number": number})
        self._drop(number - KEEP)

    def numbers(self) -> list[int]:
        """Return the numbers of the complete checkpoints, ascending.

        Raises:
            RunError: when the file that names the last one is damaged.
        """
        if not self._latest.exists():
            return []
        try:
            last = int(json.loads(self._latest.read_text())["number"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self._latest} cannot be read ({error!r}); restore it, or use another folder") from None
        found = sorted(int(path.stem) for path in self.public.glob("[0-9]*.json"))
        return [number for number in found if number <= last]

    def load(self, number: int | None = None) -> Snapshot | None:
        """Load checkpoint `number`, default the last; None when there is none.

        Raises:
            RunError: when the number asked for is gone or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        numbers = self.numbers()
        if number is None and not numbers:
            return None
        name = f"{numbers[-1] if number is None else number:06d}"
        try:
            return Snapshot(
                tensors=load_file(self.public / f"{name}.safetensors"),
                private=load_file(self.private / f"{name}.safetensors"),
                facts=json.loads((self.public / f"{name}.json").read_text()),
            )
        except (OSError, ValueError, SafetensorError) as error:
            known = f"complete ones: {numbers or 'none'}"
            raise RunError(f"checkpoint {name} in {self.public} cannot be read ({error}); {known}") from None

    def _drop(self, up_to: int) -> None:
        for folder in (self.public, self.private):
            for path in folder.glob("[0-9]*.*"):
                if int(path.stem) <= up_to:
                    path.unlink()
