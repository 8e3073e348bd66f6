"""Aggregators and pre-aggregators by name; Flower is imported here, for those who need it."""

from collections.abc import Mapping, Sequence
from typing import Any

from perdure.errors import ConfigError
from perdure.experiment.calls import arguments
from perdure.federated.pre_aggregators import Buckets, ClipUpdates, NearestNeighbours, PreAggregator
from perdure.federated.settings import usable_aggregators

OF_FLOWER = (
    "fraction_train",
    "fraction_evaluate",
    "min_train_nodes",
    "min_evaluate_nodes",
    "min_available_nodes",
    "weighted_by_key",
    "arrayrecord_key",
    "configrecord_key",
    "train_metrics_aggr_fn",
    "evaluate_metrics_aggr_fn",
)
"""Arguments of Flower's aggregators that perdure sets, so that a config may not give them."""


def make_aggregator(name: str, options: Mapping[str, Any]) -> Any:
    """Make the object of Flower that averages the clients' models in a federation.

    Args:
        name: name of a class in flwr.serverapp.strategy, such as "FedAvg".
        options: arguments of the class.

    Raises:
        ConfigError: for an unknown name, and for arguments that the class refuses.
    """
    known = usable_aggregators()
    if name not in known:
        raise ConfigError.of("aggregator", name, ", ".join(known))
    kind = known[name]
    values = arguments(kind, options, "aggregator_options", without=OF_FLOWER)
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError.of(
            "aggregator_options", dict(options), f"options that {name} accepts ({error})"
        ) from error


PRE_AGGREGATORS: dict[str, type[Buckets | ClipUpdates | NearestNeighbours]] = {
    "buckets": Buckets,
    "clip_updates": ClipUpdates,
    "nearest_neighbours": NearestNeighbours,
}
"""Pre-aggregators by their names in a config."""


def make_pre_aggregators(tables: Sequence[Mapping[str, Any]]) -> tuple[PreAggregator, ...]:
    """Make the steps that mix the clients' updates before the aggregator.

    Args:
        tables: for each step its name, and the fields of its class.

    Raises:
        ConfigError: for an unknown name, and for fields that the class refuses.
    """
    steps: list[PreAggregator] = []
    for index, table in enumerate(tables):
        where = f"pre_aggregators[{index}]"
        name = table.get("name")
        if name not in PRE_AGGREGATORS:
            raise ConfigError.of(f"{where}.name", name, ", ".join(PRE_AGGREGATORS))
        given = {key: value for key, value in table.items() if key != "name"}
        values = arguments(PRE_AGGREGATORS[name], given, where)
        steps.append(PRE_AGGREGATORS[name](**values))
    return tuple(steps)


def refuse_few_clients(
    name: str, options: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], asked: int
) -> None:
    """Refuse an aggregator or pre-aggregators that need more clients than a round has.

    Args:
        name: name of the aggregator.
        options: its options.
        steps: tables of the pre-aggregators.
        asked: number of clients of a round.

    Raises:
        ConfigError: names the setting, and the smallest number of clients.
    """
    hostile = options.get("num_malicious_nodes", 0)
    least = {"Bulyan": 4 * hostile + 3, "Krum": 2 * hostile + 3, "MultiKrum": 2 * hostile + 3}
    needed = least.get(name, 0)
    if hostile and asked < needed:
        raise ConfigError.of(
            "aggregator_options.num_malicious_nodes",
            hostile,
            f"fewer hostile clients, or at least {needed} clients a round; a round has {asked}",
        )
    for index, step in enumerate(make_pre_aggregators(steps)):
        if isinstance(step, Buckets):
            asked = -(-asked // step.size)
        elif isinstance(step, NearestNeighbours) and asked <= 2 * step.hostile:
            raise ConfigError.of(
                f"pre_aggregators[{index}].hostile",
                step.hostile,
                f"fewer than half of the updates that it gets, which are {asked}",
            )
