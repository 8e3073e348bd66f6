"""Files that are there whole or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file in one step and see it, and its name, through to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
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
    """Write JSON, keys in the order given."""
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=True) + "\n").encode())


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors; tensors that share memory are written apart."""
    from safetensors.torch import save

    write_atomically(
        path,
        save({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}),
    )
