"""Table `[federation]` of a config; Flower is imported only to check an aggregator."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from perdure.errors import ConfigError
from perdure.experiment.field_checks import COUNTS, check, counts
from perdure.utils.checked_fields import CheckedFields


@dataclass(frozen=True, kw_only=True)
class FederationConfig(CheckedFields):
    """Clients, rounds and split of a federation.

    Args:
        clients: number of parties.
        rounds: rounds in each experience.
        local_epochs: passes over its records of each client in every round, in place of
            `training.epochs`; without it and `local_steps`, the steps that `[training]` asks for
            are divided over the rounds.
        local_steps: steps of each client in every round, in place of `training.iterations`.
        fraction: share of the clients that train in a round.
        aggregator: class of flwr.serverapp.strategy.
        aggregator_options: arguments of the aggregator, such as {server_learning_rate = 0.5}.
        pre_aggregators: steps before the aggregator, in order: tables with name =
            `nearest_neighbours`, `buckets` or `clip_updates`, and their own fields (see
            `perdure.federated`).
        split: `dirichlet` for an uneven split of the records over the clients, `iid` for an even
            one, `by_attribute` for a client for each value of the records' `attribute`.
        alpha: concentration of the Dirichlet split by class; a small value is an uneven split.
        attribute: name of the attribute of the split `by_attribute`, such as "workclass".
        values: value of the attribute of each client, in their order; records of other values are
            left out. Left out for 0, 1, 2, ..., which then are all values.
        min_size: fewest records of a client in an experience (dirichlet, iid).
        client_sizes: public number of training records, a list for every client with a number for
            every experience, 0 where the client has none. Left out for the actual numbers or, with
            `[privacy]`, for those that the shares of `dirichlet` and `iid` give; `by_attribute`
            needs them then, and so do sites that hold only their own records.
        engine: `inprocess`, or `ray` for Flower's simulation engine.
        quorum: smallest share of the asked clients whose replies must be valid; while it holds, a
            run goes on without clients that are absent, late, failed or rejected.
        deadline: seconds that clients have for an exchange; left out to wait for every reply, and
            up to two minutes for a client that left, which is asked again when it is back.
        grace: further seconds to wait after the deadline while the quorum is not reached.
        max_update_norm: largest allowed L2 norm of a client's update; left out for 100 times the
            median of a round's updates.
        alive: largest number of clients whose learners are in memory between exchanges; left out
            for all. The result is the same.
        readmit: true if a private client that lost its folder, and with it its ledger, may go on
            with a new ledger, which begins with the charges of the lost one; false to leave it out.
    """

    clients: int = 10
    rounds: int = 3
    local_epochs: int | None = None
    local_steps: int | None = None
    fraction: float = 1.0
    aggregator: str = "FedAvg"
    aggregator_options: Mapping[str, Any] = field(default_factory=dict)
    pre_aggregators: tuple[Mapping[str, Any], ...] = ()
    split: Literal["dirichlet", "iid", "by_attribute"] = "dirichlet"
    alpha: float = 1.0
    attribute: str | None = None
    values: tuple[int, ...] | None = None
    min_size: int = 10
    client_sizes: tuple[tuple[int, ...], ...] | None = None
    engine: Literal["inprocess", "ray"] = "inprocess"
    quorum: float = 0.5
    deadline: float | None = None
    grace: float = 0.0
    max_update_norm: float | None = None
    alive: int | None = None
    readmit: bool = False

    def __post_init__(self) -> None:
        check(self, "clients rounds local_epochs local_steps min_size alive", counts, COUNTS)
        if self.local_epochs is not None and self.local_steps is not None:
            both = f"{self.local_steps}, beside local_epochs = {self.local_epochs}"
            raise ConfigError.of("local_steps", both, "only one of the two")
        share = "a number above 0 and at most 1"
        check(self, "fraction quorum", lambda value: 0 < value <= 1, share)
        check(self, "deadline max_update_norm", lambda v: 0 < v < math.inf, "a number above 0")
        check(self, "grace", lambda value: 0 <= value < math.inf, "seconds from 0")
        check(self, "alpha", lambda value: 0 < value <= 1e9, "a number above 0 and at most 1e9")
        self._check_attribute()
        if self.aggregator != "FedAvg" or self.aggregator_options:
            from perdure.experiment.federation_config import make_aggregator

            make_aggregator(self.aggregator, self.aggregator_options)
        if self.pre_aggregators or "num_malicious_nodes" in self.aggregator_options:
            from perdure.experiment.federation_config import refuse_few_clients

            asked = max(1, round(self.fraction * self.clients))
            steps = self.pre_aggregators
            refuse_few_clients(self.aggregator, self.aggregator_options, steps, asked)

    def _check_attribute(self) -> None:
        """Refuse a split by an attribute without one, and an attribute of another split."""
        by_attribute = self.split == "by_attribute"
        if by_attribute and self.attribute is None:
            raise ConfigError.of(
                "attribute", None, 'the name of an attribute of the records with "by_attribute"'
            )
        for name in ("attribute", "values"):
            given = getattr(self, name)
            if given is not None and not by_attribute:
                raise ConfigError.of(name, given, 'left out, or split = "by_attribute"')
        values = self.values
        if values is None:
            return
        if len(set(values)) != len(values) or len(values) != self.clients or min(values) < 0:
            allowed = f"a whole number from 0 for each of the {self.clients} clients, each once"
            raise ConfigError.of("values", values, allowed)


def length_of(
    federation: FederationConfig | None, epochs: int | None, iterations: int | None
) -> tuple[int | None, int | None]:
    """Return epochs and iterations of an experience, from those of the table `[training]`."""
    if federation is None:
        return epochs, iterations
    if federation.local_steps is not None:
        return None, federation.rounds * federation.local_steps
    if federation.local_epochs is not None:
        return federation.rounds * federation.local_epochs, None
    return epochs, iterations


def with_length(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """Add `epochs` to the tables of training if the federation says how long clients train.

    Args:
        table: content of a config file.
    """
    given = table.get("federation")
    if not isinstance(given, Mapping) or not given.keys() & {"local_epochs", "local_steps"}:
        return table
    added = {
        name: {**own, "epochs": 1}  # `length_of` replaces it
        for name in ("training", "private_training")
        if isinstance(own := table.get(name), Mapping) and not own.keys() & {"epochs", "iterations"}
    }
    return {**table, **added}
