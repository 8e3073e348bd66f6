"""Aggregators of Flower by name; Flower is imported here, for federations that need it."""

from collections.abc import Mapping
from typing import Any

from perdure.errors import ConfigError
from perdure.experiment.calls import arguments
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
