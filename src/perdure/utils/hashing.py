"""Pseudo-random numbers per record, computed by a hash of the record's id.

They are the same in every process and at every time.

Hooks of a strategy have no random generator: a row may depend on its record only, and a resumed run
must get the same numbers. So hooks use a hash of the record's id and of the purpose. The hash runs
under `torch.func.vmap`.

Guarantee: none; everyone can compute these numbers. They are never used for noise or for secrets.

Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014 (the
mixing function).
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.types import Tensors
from perdure.utils.chunking import row_slices

JSONValue = None | bool | int | float | str | list["JSONValue"] | dict[str, "JSONValue"]

STEP, FIRST, SECOND = (
    word - 2**64 for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def hashed(ids: Tensor, *stream: int | Tensor) -> Tensor:
    """Hash ids to int64 words; every bit of a word depends on all bits of the id.

    Args:
        ids: (n,) int64 ids.
        stream: numbers for the purpose, such as `seeds.derive("label", experience)`: other numbers
            give independent values. int64 tensors whose shapes broadcast with `ids` are allowed,
            too.
    """
    salt = torch.zeros((), dtype=torch.int64, device=ids.device)
    for part in stream:
        salt = _mixed(salt + part)
    return _mixed(_mixed(ids) ^ salt)


def uniforms(ids: Tensor, *stream: int | Tensor) -> Tensor:
    """Hash ids to uniform numbers in (0, 1), float32, with 2^23 possible values.

    Args:
        ids: ids, int64.
        stream: numbers that choose an independent stream of values.


    >>> uniforms(torch.arange(3)[:, None], 7, torch.arange(5)).shape
    torch.Size([3, 5])
    """
    return (shifted(hashed(ids, *stream), 41).float() + 0.5) * 2.0**-23


def normals(ids: Tensor, *stream: int | Tensor) -> Tensor:
    """Hash ids to standard normal numbers (n,), float32, between -5.3 and 5.3."""
    return math.sqrt(2) * torch.erfinv(2 * uniforms(ids, *stream) - 1)


def shifted(words: Tensor, places: int) -> Tensor:
    """Shift bits to the right and fill with zeros; torch's own shift fills with the sign bit."""
    moved: Tensor = (words >> places) & (2 ** (64 - places) - 1)
    return moved


def _mixed(words: Tensor) -> Tensor:
    """Mix 64-bit words; arithmetic is modulo 2^64, as int64 computes."""
    words = words + STEP
    words = (words ^ shifted(words, 30)) * FIRST
    words = (words ^ shifted(words, 27)) * SECOND
    return words ^ shifted(words, 31)


def canonical(value: object) -> JSONValue:
    """Describe a value as JSON that is the same for equal values in every process.

    A dataclass becomes the name of its class and its fields, a function its name and the values of
    its closure, a set is sorted, and a tensor becomes its dtype, shape and numbers.

    Raises:
        ConfigError: if the value is of another kind, for which equality over processes is not
            defined.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [canonical(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((canonical(item) for item in value), key=canonical_text)
    if isinstance(value, Mapping):
        return {str(key): canonical(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: canonical(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
        return [type(value).__name__, fields]
    return _canonical_object(value)


def _canonical_object(value: object) -> JSONValue:
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), value.detach().reshape(-1).tolist()]
    if isinstance(value, torch.dtype | torch.device | Path):
        return str(value)
    if isinstance(value, partial):
        return [canonical(value.func), canonical(value.args), canonical(value.keywords)]
    if name := getattr(value, "__qualname__", None):
        closed = getattr(value, "__closure__", None) or ()
        return [name, *[canonical(cell.cell_contents) for cell in closed]]
    allowed = (
        "numbers, text, tensors, functions, dataclasses, and lists, sets and mappings of these"
    )
    raise ConfigError.of("a setting", f"{type(value).__name__} {value!r}", allowed)


def is_plain(value: object) -> bool:
    """Return True if a value consists only of numbers and text."""
    if isinstance(value, tuple | list):
        return all(is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def canonical_text(value: object) -> str:
    """Return JSON text that is equal for equal values in every process, as input of a digest."""
    return json.dumps(canonical(value), sort_keys=True, separators=(",", ":"))


def digest(tensors: Tensors) -> bytes:
    """Return the SHA-256 of named tensors: names, dtypes, shapes and values.

    For private records, only a keyed MAC of the digest may leave the curator.
    """
    total = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        total.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        # rows that are not in memory are read one piece at a time; the bytes are the same
        pieces = (value[piece] for piece in row_slices(value)) if value.dim() else iter([value])
        for piece in pieces:
            own = piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            total.update(own.numpy().data)
    return total.digest()
