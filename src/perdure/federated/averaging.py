"""Flower's FedAvg over arrays that this process holds, to the same bits, without serialising any.

Flower's own goes through `np.save` and `np.load` for every round, and copies each client's arrays
twice.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, Strategy

from perdure.federated.held_arrays import HeldArray, read_only, record_of

CONTENT = {"arrays", "metrics"}
"""Records of a client's reply to a round."""


class HeldFedAvg(FedAvg):
    """FedAvg for the replies of clients in this process; Flower's own for any other reply.

        sum_k w_k x_k / sum_k w_k,  added up in the order of the replies

    Args:
        settings: a plain `FedAvg`, whose attributes are taken over.
    """

    def __init__(self, settings: FedAvg) -> None:
        vars(self).update(vars(settings))

    @staticmethod
    def replaces(aggregator: Strategy) -> TypeGuard[FedAvg]:
        """Tell if an aggregator is FedAvg itself, and averages metrics as Flower does."""
        if type(aggregator) is not FedAvg:
            return False
        return aggregator.train_metrics_aggr_fn is FedAvg().train_metrics_aggr_fn

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the arrays of all replies."""
        answers = list(replies)
        contents = [reply.content for reply in answers if not reply.has_error()]
        if len(contents) < len(answers) or not are_held(contents, self.weighted_by_key):
            return super().aggregate_train(server_round, answers)
        weights = [cast(float, each["metrics"][self.weighted_by_key]) for each in contents]
        records = [cast(ArrayRecord, each["arrays"]) for each in contents]
        return mean_of(records, weights), MetricRecord()


def are_held(contents: Sequence[RecordDict], weight: str) -> bool:
    """Tell if these replies are all of one model's arrays, held, beside a weight alone."""
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
    """Average records by the weights, with the operations of Flower's `aggregate_arrayrecords`."""
    whole = sum(weights)
    total: dict[str, Any] = {}
    product: dict[str, Any] = {}
    for record, weight in zip(records, weights, strict=True):
        factor = weight / whole
        for name, array in record.items():
            values = read_only(array).numpy()
            if name not in total:
                total[name] = np.asarray(values * factor)
                product[name] = np.empty_like(total[name])
            else:
                np.multiply(values, factor, out=product[name])
                total[name] += product[name]
    return record_of({name: torch.from_numpy(value) for name, value in total.items()})
