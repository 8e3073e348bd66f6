"""Atomic writes: a file is written completely or not at all."""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from perdure.errors import StorageError

PRIVATE = 0o600
"""Mode of a file that only its owner may read; the mode of its folder is 0700."""


def private_folder(path: Path) -> None:
    """Create a folder that only its owner can enter, or restrict an existing one."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        path.chmod(0o700)


def write_atomically(path: Path, data: bytes, *, private: bool = False) -> None:
    """Replace a file in one step, and sync the file and its name to the disk.

    Args:
        path: path of the file.
        data: new content.
        private: True if only the owner may read the file; its folder is restricted, too.

    Raises:
        StorageError: if the file cannot be written; it is then unchanged.
    """
    with writing(path):
        _write_atomically(path, data, private=private)


def _write_atomically(path: Path, data: bytes, *, private: bool) -> None:
    if private:
        private_folder(path.parent)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    draft.unlink(missing_ok=True)  # others may be able to read a draft that a crash left
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        with os.fdopen(os.open(draft, flags, PRIVATE if private else 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        with suppress(OSError):
            draft.unlink()  # an incomplete draft uses disk space
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context manager that turns errors of writing into StorageError with the file and the reason.

    Raises:
        StorageError: if the disk is full, a limit is reached, or writing is not permitted.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError.of(path, error) from None


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, with keys in the given order."""
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=True) + "\n").encode())


def save_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    private: bool = False,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write tensors as safetensors; tensors that share memory are written separately.

    Args:
        path: path of the file.
        tensors: name to tensor.
        private: True if only the owner may read the file.
        metadata: text by name for the head of the file.
    """
    from safetensors.torch import save

    own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    write_atomically(path, save(own, metadata=metadata), private=private)
