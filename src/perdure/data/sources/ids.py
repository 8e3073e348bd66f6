"""Ids and attributes of a user's records, converted to tensors."""

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from perdure.data.sources.values import TEXT_KINDS, array_of, numbers_of, refuse_not_finite
from perdure.errors import DataError


def ids_of(value: object, name: str) -> Tensor:
    """Return ids (n,) int64: whole numbers unchanged, words by a hash of each word.

    Args:
        value: ids, in a form that `perdure.data.sources.values.array_of` takes.
        name: name of the argument, for the message.

    Raises:
        DataError: if shape or type is not allowed, or an id occurs twice.
    """
    found = array_of(value, name)
    if len(found.shape) != 1:
        raise DataError(f"{name} have shape {tuple(found.shape)}; allowed: (n,), one for each row")
    if isinstance(found, np.ndarray) and found.dtype.kind in TEXT_KINDS:
        ids = text_ids(map(str, found.tolist()))
    else:
        numbers = numbers_of(found, name)
        if numbers.is_floating_point() or numbers.dtype == torch.bool:
            raise DataError(f"{name} are {numbers.dtype}; allowed: whole numbers, or words")
        ids = numbers.long()
    order = torch.argsort(ids, stable=True)
    twice = (ids[order][1:] == ids[order][:-1]).nonzero()
    if len(twice):
        one = int(order[int(twice[0])])
        other = int(order[int(twice[0]) + 1])
        raise DataError(
            f"{name} are equal in rows {one} and {other} ({found[one]}); allowed: one row per id; "
            "join all data of one person into one row"
        )
    return ids


def text_ids(words: Iterable[str]) -> Tensor:
    """Hash texts to ids (n,): 63 bits of the SHA-256 of each text.

    Args:
        words: one text per record.
    """
    digests = (hashlib.sha256(word.encode()).digest() for word in words)
    return torch.tensor([int.from_bytes(each[:8], "big") >> 1 for each in digests])


def attributes_of(given: Mapping[str, object] | None, name: str) -> dict[str, Tensor]:
    """Convert attributes to tensors of finite numbers, name to (n,).

    Args:
        given: name to values, one per record.
        name: name of the argument, for the message.

    Raises:
        DataError: if values are not numbers, or not finite.
    """
    if not isinstance(given, Mapping | None):
        raise DataError(
            f"{name} are a {type(given).__name__}; allowed: a dict, name to one number a record"
        )
    found = {}
    for key, value in (given or {}).items():
        found[key] = numbers_of(value, f"{name}[{key!r}]")
        refuse_not_finite(found[key], f"{name}[{key!r}]")
    return found
