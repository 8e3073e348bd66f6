"""Checkpoints as safetensors and JSON files, written atomically; private rows are separate.

Pickle is never used. Every file contains the SHA-256 of its values, so that a file that the disk
has changed is found. The one of private rows is in `private/`, because whoever guesses the rows
could confirm them by it.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from perdure.errors import ConfigError, RunError
from perdure.utils.atomic_files import save_tensors, write_json, writing
from perdure.utils.hashing import digest

PROGRESS = "progress"
"""Key, in the facts of a checkpoint, of the evaluations that were made inside stages."""
SUM = "sha256"
"""Name of the SHA-256 of a file's values, in the file."""
KEEP = 2
"""Number of kept checkpoints; the last but one survives a crash while a new one is written."""


@dataclass
class Position:
    """Position of a run in its stream.

    Args:
        experience: index of the open experience, or of the next one.
        step: number of steps of this experience that are done.
        begun: True if the experience was opened.
    """

    experience: int = 0
    step: int = 0
    begun: bool = False


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything that is needed to continue a run.

    Args:
        tensors: tensors that may be published: parameters, optimiser, strategy state.
        private: tensors that stay in the folder `private/`: memory rows.
        facts: JSON values: position, rates, results so far.
    """

    tensors: Mapping[str, Tensor]
    private: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


class Store:
    """Numbered checkpoints of one run or client in a folder: `checkpoint/` and `private/`.

    A checkpoint is complete if `checkpoint/latest.json` names it; other files are unfinished.
    """

    def __init__(self, folder: Path) -> None:
        self.public = folder / "checkpoint"
        self.private = folder / "private"
        self._latest = self.public / "latest.json"

    def save(self, number: int, snapshot: Snapshot) -> None:
        """Write checkpoint `number`, then name it as the latest, then delete old checkpoints.

        Raises:
            StorageError: if a file cannot be written; the last checkpoint stays complete.
        """
        name = f"{number:06d}.safetensors"
        for folder, tensors in ((self.private, snapshot.private), (self.public, snapshot.tensors)):
            own = {SUM: digest(tensors).hex()}
            save_tensors(folder / name, tensors, private=folder == self.private, metadata=own)
        facts = dict(snapshot.facts)
        write_json(self.public / f"{number:06d}.json", facts | {SUM: sum_of(facts)})
        write_json(self._latest, {"number": number})
        self._drop(number - KEEP)

    def numbers(self) -> list[int]:
        """Return the numbers of the complete checkpoints, ascending.

        Raises:
            RunError: if the file that names the last checkpoint is damaged.
        """
        if not self._latest.exists():
            return []
        try:
            last = int(json.loads(self._latest.read_text())["number"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{self._latest} cannot be read ({error!r}); restore it from a backup, or use "
                "another folder"
            ) from None
        found = sorted(int(path.stem) for path in self.public.glob("[0-9]*.json"))
        return [number for number in found if number <= last]

    def facts(self, number: int) -> dict[str, Any]:
        """Load only the JSON values of checkpoint `number`.

        Raises:
            RunError: if they are missing or damaged.
        """
        path = self.public / f"{number:06d}.json"
        try:
            facts = dict(json.loads(path.read_text()))
            if facts.pop(SUM) != sum_of(facts):
                raise ValueError("its checksum is wrong")
            return facts
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RunError(
                f"{path} cannot be read ({error or repr(error)}); restore it from a backup"
            ) from None

    def load(self, number: int | None = None) -> Snapshot | None:
        """Load checkpoint `number`, by default the last one; None if there is none.

        If the tensors of the last one are damaged, the last but one is loaded with a warning. A run
        that continues from there takes the same steps again.

        Raises:
            RunError: if the checkpoint is missing or damaged.
        """
        numbers = self.numbers()
        if number is not None or not numbers:
            return None if number is None else self._loaded(number, numbers)
        facts = self.facts(numbers[-1])
        try:
            return self._loaded(numbers[-1], numbers, facts)
        except RunError as error:
            if len(numbers) == 1:
                raise
            older = self._loaded(numbers[-2], numbers)
            warnings.warn(f"{error}; continued from {numbers[-2]:06d}", stacklevel=2)
            return older

    def _loaded(
        self, number: int, numbers: Sequence[int], facts: dict[str, Any] | None = None
    ) -> Snapshot:
        """Load a checkpoint, and check that the disk has not changed it.

        Args:
            number: number of the checkpoint.
            numbers: numbers of the complete checkpoints, for errors.
            facts: its JSON values, if they are already loaded.
        """
        name = f"{number:06d}.safetensors"
        try:
            return Snapshot(
                tensors=_checked(self.public / name),
                private=_checked(self.private / name),
                facts=self.facts(number) if facts is None else facts,
            )
        except (OSError, ValueError, RunError) as error:
            raise RunError(
                f"checkpoint {number:06d} in {self.public} cannot be read ({error}); complete "
                f"ones: {list(numbers) or 'none'}"
            ) from None

    def _drop(self, up_to: int) -> None:
        for folder in (self.public, self.private):
            for path in folder.glob("[0-9]*.*"):
                if int(path.stem) <= up_to:
                    with writing(path):
                        path.unlink()


def sum_of(facts: dict[str, Any]) -> str:
    """Return the SHA-256 of JSON values, as they read when they are loaded again."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(facts))).encode()).hexdigest()


def _checked(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a file.

    Raises:
        ValueError: if the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            expected = (file.metadata() or {}).get(SUM)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path.name}: {error}") from None
    if digest(tensors).hex() != expected:
        raise ValueError(f"{path}: its checksum is wrong")
    return tensors


def flatten_optimizer(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split the state of an optimiser into tensors and JSON values.

    Raises:
        ConfigError: if a state is neither, such as an object of the optimiser's own class.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    packed: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            key = f"optimizer.{index}.{name}"
            if isinstance(value, Tensor):
                tensors[key] = value
            elif isinstance(value, list | tuple | dict):
                packed[key] = _packed(key, value, tensors)
            else:
                numbers[key] = _packed(key, value, tensors)
    facts: dict[str, Any] = {"optimizer": numbers, "groups": state["param_groups"]}
    if packed:
        facts["packed"] = packed
    # an inverse or a rotation may be stored by columns, and products then round in another way
    strides = {name: list(t.stride()) for name, t in tensors.items() if not t.is_contiguous()}
    if strides:
        facts["strides"] = strides
    return tensors, facts


def _packed(key: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """Describe a value in JSON, with its type, and put its tensors into `tensors`."""
    if isinstance(value, Tensor):
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, list | tuple):
        parts = [_packed(f"{key}.{i}", each, tensors) for i, each in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": parts}
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {"dict": {n: _packed(f"{key}.{n}", each, tensors) for n, each in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError.of(
        f"state {key.split('.', 2)[2]} of the optimizer",
        type(value).__name__,
        "tensors, numbers, and lists of them, which a checkpoint can hold; use another optimiser",
    )


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Build the value that `_packed` described."""
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {name: _unpacked(each, tensors) for name, each in inner.items()}
    parts = [_unpacked(each, tensors) for each in inner]
    return tuple(parts) if kind == "tuple" else parts


def load_optimizer(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Load the state of an optimiser from the tensors and values of `flatten_optimizer`."""
    packed = facts.get("packed", {})
    inside = tuple(f"{key}." for key in packed)
    strides = facts.get("strides", {})
    own = {
        name: _laid_out(value, strides.get(name))
        for name, value in tensors.items()
        if name.startswith("optimizer.")
    }
    saved: dict[str, Any] = {n: t for n, t in own.items() if not n.startswith(inside)}
    saved |= dict(facts["optimizer"])
    saved |= {name: _unpacked(value, own) for name, value in packed.items()}
    state: dict[int, dict[str, Any]] = {}
    for name, value in saved.items():
        _, index, entry = name.split(".", 2)
        state.setdefault(int(index), {})[entry] = value
    groups = [
        {name: _as_saved(name, value) for name, value in group.items()} for group in facts["groups"]
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _laid_out(value: Tensor, stride: Sequence[int] | None) -> Tensor:
    """Copy a tensor, with the given strides; None for the ones that it has."""
    if stride is None:
        return value.clone()
    made = torch.empty_strided(value.shape, stride, dtype=value.dtype, device=value.device)
    return made.copy_(value)


def _as_saved(name: str, value: Any) -> Any:
    """Convert a list from JSON back to a tuple, as in a parameter group (Adam's betas)."""
    return tuple(value) if isinstance(value, list) and name != "params" else value


def numbered(value: Any) -> Any:
    """Convert dict keys that JSON turned into strings back to whole numbers, for a schedule.

    The value may contain lists and dicts.
    """
    if not isinstance(value, dict):
        return [numbered(item) for item in value] if isinstance(value, list) else value
    return {
        int(key) if str(key).isdecimal() else key: numbered(item) for key, item in value.items()
    }
