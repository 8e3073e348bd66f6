"""Conversions between tensors and the records of Flower's messages."""

from collections.abc import Mapping
from typing import cast

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from torch import Tensor, nn

from perdure.errors import FederationError
from perdure.federated.held_arrays import held, read_only
from perdure.types import Params
from perdure.utils.modules import state_of


def to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Copy named tensors to a record, in order and with their dtypes.

    An engine serialises the record only if it needs to.

    Raises:
        FederationError: if NumPy does not have the dtype of a tensor.
    """
    for name, value in tensors.items():
        if value.dtype == torch.bfloat16:
            raise FederationError(
                f"{name} is bfloat16, which Flower cannot send; keep the model in float32"
            )
    return held(tensors)


def from_record(record: ArrayRecord) -> Params:
    """Return the tensors of a record as copies, by name."""
    return {name: torch.from_numpy(np.asarray(array.numpy())) for name, array in record.items()}


def load_record(model: nn.Module, record: ArrayRecord) -> None:
    """Write a record of parameters and buffers to the model; see `load_shared`."""
    load_shared(model, {name: read_only(array) for name, array in record.items()})


def read_tensors(message: Message, record: str) -> Params:
    """Return copies of the tensors in one array record of a message."""
    return from_record(cast(ArrayRecord, message.content[record]))


def read_metric(message: Message, name: str) -> float:
    """Return one number of a message's record `metrics`."""
    return float(cast(float, cast(MetricRecord, message.content["metrics"])[name]))


def shared(model: nn.Module) -> Params:
    """Floating-point and complex parameters and buffers of a model.

    Integers, such as the counters of BatchNorm, stay with the client. The tensors are those of the
    model, not detached.
    """
    return {
        name: value
        for name, value in state_of(model).items()
        if value.is_floating_point() or value.is_complex()
    }


def load_shared(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors that `shared` returned to the model, in its own dtypes and on its device.

    Raises:
        FederationError: if names or shapes differ from the model's.
    """
    own = shared(model)
    wrong = sorted(own.keys() ^ tensors.keys()) or [
        n for n, t in own.items() if t.shape != tensors[n].shape
    ]
    if wrong:
        raise FederationError(
            f"{', '.join(wrong[:3])}: the model has no parameter of this name and shape; build "
            "the same model on all parties"
        )
    with torch.no_grad():
        torch._foreach_copy_(list(own.values()), [tensors[name] for name in own])
