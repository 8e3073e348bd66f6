"""Arrays of Flower's messages that hold a tensor, and make bytes of it only at need.

Within one process a message is read where it was written, so its arrays need not go through
`np.save` and `np.load`. The engines that carry bytes ask for them, and get a plain `Array`.
"""

from collections.abc import Mapping
from copy import copy
from functools import cache
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

SERIALISED_AS = "numpy.ndarray"
"""Flower's word for bytes that `np.save` made."""


@cache
def name_of(dtype: torch.dtype) -> str:
    """Name a dtype as numpy does."""
    return str(dtype).removeprefix("torch.")


class HeldArray(Array):
    """An array by its tensor; its bytes equal a plain `Array`'s of the same numbers.

    No reader can alter it for another one: `numpy` gives a copy, and a copy of the array, which
    every receiver gets (see `copied`), has attributes of its own.

    Args:
        value: a CPU tensor that nobody else writes to.
    """

    def __init__(self, value: Tensor) -> None:
        # not by attributes: Flower's take note of every change, and here is none yet
        self.__dict__ |= {
            "tensor": value,
            "shape": tuple(value.shape),
            "dtype": name_of(value.dtype),
            "stype": SERIALISED_AS,
        }

    @property
    def tensor(self) -> Tensor | None:
        """The tensor, to read only; None where bytes were put in its place."""
        value: Tensor | None = self.__dict__["tensor"]
        return value

    @property
    def data(self) -> bytes:
        """The serialised array, made when it is asked for."""
        return self.plain().data

    @data.setter
    def data(self, value: bytes) -> None:
        self.__dict__["tensor"] = None
        self.__dict__["bytes"] = value

    def plain(self) -> Array:
        """Return Flower's own array of the same numbers."""
        if self.tensor is not None:
            return Array(self.tensor.numpy())
        return Array(self.dtype, self.shape, self.stype, self.__dict__["bytes"])

    def numpy(self) -> Any:
        """Return the numbers as an array of the caller's own."""
        return self.plain().numpy() if self.tensor is None else self.tensor.numpy().copy()

    def deflate(self) -> bytes:
        """Serialise for an engine that carries bytes: as a plain array, which it knows."""
        return self.plain().deflate()

    def __copy__(self) -> "HeldArray":
        fresh = object.__new__(HeldArray)
        fresh.__dict__.update(self.__dict__)
        return fresh

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, self.data)


def held(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return a record that holds copies of the tensors."""
    return record_of(
        {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in tensors.items()
        }
    )


def record_of(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return a record that holds the tensors themselves; nobody may write to them any more."""
    record = ArrayRecord()
    values_of(record).update({name: HeldArray(value) for name, value in tensors.items()})
    return record


def values_of(record: Any) -> dict[str, Any]:
    """Return the dictionary in one of Flower's, whose checks cost more than small arrays do."""
    own: dict[str, Any] = vars(record)["_data"]
    return own


def read_only(array: Array) -> Tensor:
    """Return the array's numbers, which may be those that others read; do not write to them."""
    value = array.tensor if isinstance(array, HeldArray) else None
    return torch.from_numpy(array.numpy()) if value is None else value


def copied(content: RecordDict) -> RecordDict:
    """Return a copy of a message's records that its receiver may change.

    Values that cannot change are shared: bytes, numbers and the tensors of held arrays.
    """
    own = RecordDict()
    for name, record in content.items():
        fresh: Any = record.copy()  # of any kind, each with values of its own types
        values = values_of(fresh)
        for key, value in values.items():
            if isinstance(value, (Array, list)):
                values[key] = copy(value)
        values_of(own)[name] = fresh
    return own
