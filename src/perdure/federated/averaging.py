"""Flower's FedAvg for arrays in this process, with the same bits but without serialisation.

Flower's own FedAvg uses `np.save` and `np.load` in every round, and copies the arrays of each
client twice.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, Strategy
from numpy.typing import NDArray
from torch import Tensor

from perdure.federated.held_arrays import HeldArray, read_only, record_of

CONTENT = {"arrays", "metrics"}
"""Names of the records in a client's reply to a round."""
PIECE = 65_536
"""Number of values that are averaged at a time; their bytes fit into the cache of one core."""


class HeldFedAvg(FedAvg):
    """FedAvg for replies of clients in this process; other replies are left to Flower's FedAvg.

        sum_k w_k x_k / sum_k w_k,  added up in the order of the replies

    Args:
        settings: a plain `FedAvg`, whose attributes are copied.
    """

    def __init__(self, settings: FedAvg) -> None:
        vars(self).update(vars(settings))

    @staticmethod
    def replaces(aggregator: Strategy) -> TypeGuard[FedAvg]:
        """Return True if an aggregator is FedAvg itself, and averages metrics as Flower does."""
        if type(aggregator) is not FedAvg:
            return False
        return aggregator.train_metrics_aggr_fn is FedAvg().train_metrics_aggr_fn

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the arrays of all replies, weighted as in FedAvg."""
        answers = list(replies)
        contents = [reply.content for reply in answers if not reply.has_error()]
        if len(contents) < len(answers) or not are_held(contents, self.weighted_by_key):
            return super().aggregate_train(server_round, answers)
        weights = [cast(float, each["metrics"][self.weighted_by_key]) for each in contents]
        records = [cast(ArrayRecord, each["arrays"]) for each in contents]
        return mean_of(records, weights), MetricRecord()


def are_held(contents: Sequence[RecordDict], weight: str) -> bool:
    """Return True if all replies hold the arrays of one model in memory, and only a weight."""
    if not contents or any(set(each) != CONTENT for each in contents):
        return False
    names = list(contents[0]["arrays"])
    return all(
        list(each["metrics"]) == [weight]
        and list(each["arrays"]) == names
        and all(type(array) is HeldArray for array in each["arrays"].values())
        for each in contents
    )


def mean_of(records: Sequence[ArrayRecord], weights: Sequence[float]) -> ArrayRecord:
    """Average records by weights, with the operations of Flower's `aggregate_arrayrecords`."""
    whole = sum(weights)
    factors = [weight / whole for weight in weights]
    averaged: dict[str, Tensor] = {}
    for name in records[0]:
        tensors = [read_only(record[name]) for record in records]
        total = _weighted_sum([tensor.numpy().reshape(-1) for tensor in tensors], factors)
        averaged[name] = torch.from_numpy(total.reshape(tensors[0].shape))
    return record_of(averaged)


def _weighted_sum(arrays: Sequence[NDArray[Any]], factors: Sequence[float]) -> NDArray[Any]:
    """Add up flat arrays with factors, piece by piece, in the order of the arrays.

    A piece of the sum stays in the processor's cache while all arrays are added to it, so every
    array is read once, and nothing else goes through the memory.
    """
    total = np.empty(len(arrays[0]), (arrays[0][:0] * factors[0]).dtype)
    scaled = np.empty(min(PIECE, len(total)), total.dtype)
    for start in range(0, len(total), PIECE):
        piece = total[start : start + PIECE]
        product = scaled[: len(piece)]
        np.multiply(arrays[0][start : start + PIECE], factors[0], out=piece)
        for array, factor in zip(arrays[1:], factors[1:], strict=True):
            np.multiply(array[start : start + PIECE], factor, out=product)
            piece += product
    return total


def ready(aggregator: Strategy) -> Strategy:
    """Return a copy of a user's aggregator that asks every client of a round, however few.

    The copy uses perdure's names for the records in messages.
    """
    fresh = copy.deepcopy(aggregator)
    if HeldFedAvg.replaces(fresh):
        fresh = HeldFedAvg(fresh)
    settings: dict[str, object] = {
        "fraction_train": 1.0,
        "min_train_nodes": 1,
        "min_available_nodes": 1,
        "arrayrecord_key": "arrays",
    }
    for name, value in settings.items():
        if hasattr(fresh, name):
            setattr(fresh, name, value)
    return fresh
