"""Arrays for Flower's messages that refer to a tensor, and are serialised only if needed.

Within one process, messages are read by the process that wrote them, so arrays need no `np.save`
and `np.load`. Engines that send bytes ask for them, and get a plain `Array`.
"""

from collections.abc import Mapping
from copy import copy
from functools import cache
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

SERIALISED_AS = "numpy.ndarray"
"""Flower's name for arrays that `np.save` has serialised."""


@cache
def name_of(dtype: torch.dtype) -> str:
    """Return NumPy's name of a torch dtype."""
    return str(dtype).removeprefix("torch.")


class HeldArray(Array):
    """Array that refers to a tensor, with the same bytes as a plain `Array`.

    No reader can change it for another reader: `numpy` returns a copy, and every receiver gets a
    copy of the array (see `copied`) with its own attributes.

    Args:
        value: a CPU tensor that no other code writes to.
    """

    def __init__(self, value: Tensor) -> None:
        # not by attributes, because Flower's attributes record every change
        self.__dict__ |= {
            "tensor": value,
            "shape": tuple(value.shape),
            "dtype": name_of(value.dtype),
            "stype": SERIALISED_AS,
        }

    @property
    def tensor(self) -> Tensor | None:
        """Tensor of the array, for reading only; None if its bytes were replaced."""
        value: Tensor | None = self.__dict__["tensor"]
        return value

    @property
    def data(self) -> bytes:
        """Serialised array, computed at each request."""
        return self.plain().data

    @data.setter
    def data(self, value: bytes) -> None:
        self.__dict__["tensor"] = None
        self.__dict__["bytes"] = value

    def plain(self) -> Array:
        """Return Flower's own array with the same numbers."""
        if self.tensor is not None:
            return Array(self.tensor.numpy())
        return Array(self.dtype, self.shape, self.stype, self.__dict__["bytes"])

    def numpy(self) -> Any:
        """Return the numbers as a new NumPy array."""
        return self.plain().numpy() if self.tensor is None else self.tensor.numpy().copy()

    def deflate(self) -> bytes:
        """Serialise the array as a plain one, for an engine that sends bytes."""
        return self.plain().deflate()

    def __copy__(self) -> "HeldArray":
        fresh = object.__new__(HeldArray)
        fresh.__dict__.update(self.__dict__)
        return fresh

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, self.data)


def held(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Make a record that holds copies of the tensors."""
    return record_of(
        {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in tensors.items()
        }
    )


def record_of(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Make a record that holds the tensors themselves; nobody may write to them afterwards."""
    record = ArrayRecord()
    values_of(record).update({name: HeldArray(value) for name, value in tensors.items()})
    return record


def values_of(record: Any) -> dict[str, Any]:
    """Return the dictionary inside a record of Flower, whose checks are slow for small arrays."""
    own: dict[str, Any] = vars(record)["_data"]
    return own


def message_of(records: Mapping[str, ArrayRecord | MetricRecord | ConfigRecord]) -> RecordDict:
    """Return the content of a message from records of the right types, without checks."""
    content = RecordDict()
    values_of(content).update(records)
    return content


def read_only(array: Array) -> Tensor:
    """Return the numbers of an array without a copy, for reading only."""
    value = array.tensor if isinstance(array, HeldArray) else None
    return torch.from_numpy(array.numpy()) if value is None else value


def copied(content: RecordDict) -> RecordDict:
    """Copy the records of a message, so that the receiver may change them.

    Values that cannot change are shared: bytes, numbers and the tensors of held arrays.
    """
    own: dict[str, Any] = {}
    for name, record in content.items():
        own[name] = fresh = record.copy()  # a record of any kind, with values of its own types
        values = values_of(fresh)
        for key, value in values.items():
            if isinstance(value, (Array, list)):
                values[key] = copy(value)
    return message_of(own)
