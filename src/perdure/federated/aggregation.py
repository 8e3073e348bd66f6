"""Aggregation of one round: mixed updates to Flower's aggregator, and buffers by their mean."""

from collections.abc import Mapping, Sequence, Set
from typing import Any, cast

from flwr.app import ArrayRecord, Message
from flwr.app.exception import AppExitException
from flwr.serverapp.strategy import FedAvgM, Strategy
from flwr.serverapp.strategy.fedopt import FedOpt
from torch import Tensor

from perdure.errors import FederationError
from perdure.federated.averaging import mean_of
from perdure.federated.held_arrays import read_only, values_of
from perdure.federated.messages import read_metric
from perdure.federated.pre_aggregators import pre_aggregated_replies
from perdure.federated.settings import Federation
from perdure.utils.finite_numbers import all_finite
from perdure.utils.seeding import generator

STEPPING = (FedOpt, FedAvgM)
"""Aggregators that take a step of their own from the mean of the replies."""


def aggregated(
    aggregator: Strategy,
    number: int,
    replies: Sequence[Message],
    before: Mapping[str, Tensor],
    buffers: Set[str],
    federation: Federation,
) -> ArrayRecord:
    """Return the new parameters and buffers of a round.

    Args:
        aggregator: aggregator, after its `configure_train` of this round.
        number: number of the round over the whole run, from 1.
        replies: valid replies of clients with records, in ascending order of the clients.
        before: copies of the global parameters and buffers before the round.
        buffers: names of the buffers.
        federation: settings, with the steps before the aggregator.

    Raises:
        FederationError: if the aggregator fails, or returns nothing or numbers that are not finite.
    """
    name = type(federation.aggregator).__name__
    place = generator(federation.seed, "pre_aggregators", *divmod(number - 1, federation.rounds))
    mixed = pre_aggregated_replies(replies, before, federation.pre_aggregators, place)
    means = mean_buffers(aggregator, mixed, buffers)
    try:
        result, _ = aggregator.aggregate_train(number, mixed)
    except AppExitException as error:
        raise FederationError(
            f"the aggregator {name} failed: {error}; correct its options, or use another aggregator"
        ) from error
    if result is None:
        raise FederationError(
            f"the aggregator {name} returned no parameters for {len(mixed)} updates; use another "
            "aggregator, or one with fewer hostile clients"
        )
    values_of(result).update(means)
    wrong = [key for key, each in result.items() if not all_finite(read_only(each))]
    if wrong:
        raise FederationError(
            f"the aggregator {name} returned NaN or infinite numbers in {wrong[0]}; set "
            "federation.max_update_norm, lower the aggregator's learning rate, or use another one"
        )
    return result


def mean_buffers(
    aggregator: Strategy, replies: Sequence[Message], buffers: Set[str]
) -> dict[str, Any]:
    """Return the mean buffers of a round, for an aggregator that would step them.

    FedAdam and its like move a running variance as they move a weight, and it becomes negative.

    Args:
        aggregator: aggregator of the round.
        replies: replies to the round, before the aggregator has read them.
        buffers: names of the buffers.

    Returns:
        Array of each buffer, averaged by the sizes; empty for an aggregator that takes no step.
    """
    if not (buffers and replies and isinstance(aggregator, STEPPING)):
        return {}
    records = [cast(ArrayRecord, reply.content["arrays"]) for reply in replies]
    parts = [ArrayRecord() for _ in records]
    for part, record in zip(parts, records, strict=True):
        values_of(part).update({name: record[name] for name in record if name in buffers})
    return values_of(mean_of(parts, [read_metric(reply, "num-examples") for reply in replies]))
