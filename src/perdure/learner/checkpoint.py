"""Checkpoints as safetensors and JSON files, written atomically; private rows are separate.

Pickle is never used.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from perdure.errors import ConfigError, RunError
from perdure.utils.atomic_files import save_tensors, write_json, writing

PROGRESS = "progress"
"""Key, in the facts of a checkpoint, of the evaluations that were made inside stages."""
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
        save_tensors(self.private / name, snapshot.private, private=True)
        save_tensors(self.public / name, snapshot.tensors)
        write_json(self.public / f"{number:06d}.json", dict(snapshot.facts))
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
            return dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise RunError(f"{path} cannot be read ({error}); restore it from a backup") from None

    def load(self, number: int | None = None) -> Snapshot | None:
        """Load checkpoint `number`, by default the last one; None if there is none.

        Raises:
            RunError: if the checkpoint is missing or damaged.
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
            raise RunError(
                f"checkpoint {name} in {self.public} cannot be read ({error}); {known}"
            ) from None

    def _drop(self, up_to: int) -> None:
        for folder in (self.public, self.private):
            for path in folder.glob("[0-9]*.*"):
                if int(path.stem) <= up_to:
                    with writing(path):
                        path.unlink()


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
