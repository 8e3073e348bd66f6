"""Settings of a federation: number of clients, rounds and aggregator."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from flwr.serverapp import strategy as aggregators

from perdure.errors import ConfigError, PrivacyError
from perdure.federated.pre_aggregators import PreAggregator
from perdure.learner.fingerprint import plain_attributes
from perdure.utils.checked_fields import CheckedFields
from perdure.utils.seeding import generator

MISSING_NOISE = "its noise would be missing from the ledger"
UNSUPPORTED = {
    aggregators.DifferentialPrivacyClientSideAdaptiveClipping: MISSING_NOISE,
    aggregators.DifferentialPrivacyClientSideFixedClipping: MISSING_NOISE,
    aggregators.DifferentialPrivacyServerSideAdaptiveClipping: MISSING_NOISE,
    aggregators.DifferentialPrivacyServerSideFixedClipping: MISSING_NOISE,
    aggregators.FedProx: "its proximal term is part of the loss, in the strategy FedProx",
    aggregators.QFedAvg: "it needs the clients' training losses",
    aggregators.FedXgbBagging: "it aggregates trees",
    aggregators.FedXgbCyclic: "it aggregates trees",
}


def usable_aggregators() -> dict[str, type[aggregators.Strategy]]:
    """Return the aggregators of Flower that a federation may have, by name."""
    found = {name: value for name, value in vars(aggregators).items() if isinstance(value, type)}
    return {
        name: value
        for name, value in sorted(found.items())
        if issubclass(value, aggregators.Strategy)
        and value is not aggregators.Strategy
        and value not in UNSUPPORTED
    }


@dataclass(frozen=True, kw_only=True)
class Federation(CheckedFields):
    """Settings of a federation: number of clients, rounds per experience, and aggregator.

    Args:
        clients: number of clients.
        rounds: number of training rounds per experience.
        local_epochs: passes over its records of each client in every round. It replaces `epochs`
            and `iterations` of the clients' learners. If neither this nor `local_steps` is given,
            the steps that the learners ask for are divided over the rounds of an experience.
        local_steps: optimiser steps of each client in every round, instead of `local_epochs`.
        fraction: share of the clients that train in a round, rounded to at least one client. The
            clients of a round are drawn from `seed`, so they are public, and epsilon has no
            amplification by the choice; the noise of a client is calibrated for its own rounds.
        aggregator: any Flower aggregator of model parameters; FedAvg by default. It gets only the
            replies of the clients of this round.
        seed: seed of the choice of clients.
        quorum: smallest share of the asked clients whose replies must be valid. While it holds, an
            exchange goes on without clients that are absent, late, failed or rejected.
        deadline: seconds that clients have for an exchange; None to wait for every reply, and up to
            two minutes for a client that left, which is asked again when it is back.
        grace: further seconds to wait after the deadline while the quorum is not reached.
        max_update_norm: largest allowed L2 norm of a client's update; None for 100 times the
            median of the round's updates.
        pre_aggregators: steps that mix the clients' updates before a robust aggregator gets them,
            in order (see `NearestNeighbours`, `Buckets`, `ClipUpdates`).
        alive: largest number of clients whose learners are in memory between exchanges, in a
            process that has several; None for all. The others are read from the folder of the run
            or, without a folder, built again around what they remember, which is in a temporary
            file without a name (in TMPDIR) that ends with the process. The result is the same, bit
            for bit. Clients with privacy need the folder. A learner that left has no session, so
            callbacks must not keep it.
        readmit: True if a client with privacy that lost its folder, and with it its ledger, may go
            on with a new ledger. The new one begins with an upper bound of all charges of the lost
            one, and its noise is calibrated for what is left of the budget. False to leave the
            client out until its folder is restored.
        mode: `open`: the server can read every update. The modes `central` and `secure` are not
            implemented.

    Raises:
        ConfigError: if a value is out of range, or the aggregator needs more than parameters.
        PrivacyError: if the mode or aggregator promises a guarantee that cannot be kept.
    """

    clients: int
    rounds: int
    local_epochs: int | None = None
    local_steps: int | None = None
    fraction: float = 1.0
    aggregator: aggregators.Strategy = field(default_factory=aggregators.FedAvg)
    seed: int = 0
    quorum: float = 0.5
    deadline: float | None = None
    grace: float = 0.0
    max_update_norm: float | None = None
    pre_aggregators: Sequence[PreAggregator] = ()
    alive: int | None = None
    readmit: bool = False
    mode: Literal["open"] = "open"

    def __post_init__(self) -> None:
        for name in ("clients", "rounds", "local_epochs", "local_steps", "alive"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ConfigError.of(f"federation.{name}", number, "whole numbers from 1")
        if self.local_epochs is not None and self.local_steps is not None:
            both = f"{self.local_steps}, beside local_epochs = {self.local_epochs}"
            raise ConfigError.of("federation.local_steps", both, "only one of the two")
        for name in ("fraction", "quorum"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError.of(
                    f"federation.{name}", getattr(self, name), "a number above 0 and at most 1"
                )
        for name in ("deadline", "max_update_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError.of(f"federation.{name}", value, "a number above 0, or None")
        if not 0 <= self.grace < math.inf:
            raise ConfigError.of("federation.grace", self.grace, "seconds from 0")
        if self.mode != "open":
            raise PrivacyError(
                f"federation.mode = {self.mode!r} is not implemented; allowed: 'open'"
            )
        for kind, reason in UNSUPPORTED.items():
            if isinstance(self.aggregator, kind):
                raise ConfigError(
                    f"federation.aggregator = {kind.__name__} is not allowed: {reason}; use FedAvg"
                )

    def cohort(
        self, experience: int, number: int, holds: Callable[[int], bool] = lambda client: True
    ) -> list[int]:
        """Clients that train in round `number` of the experience, ascending.

        The result depends on the seed, and on the clients that hold the experience.

        Args:
            experience: index of the experience.
            number: number of the round.
            holds: function from a client's number to True if it holds the experience.
        """
        order = torch.randperm(
            self.clients, generator=generator(self.seed, "cohort", experience, number)
        )
        holders = [client for client in order.tolist() if holds(client)]
        return sorted(holders[: max(1, round(self.fraction * len(holders)))])

    @property
    def local_work(self) -> dict[str, int]:
        """Rounds of an experience, local epochs and local steps; 0 for those not given."""
        return {
            "rounds": self.rounds,
            "local_epochs": self.local_epochs or 0,
            "local_steps": self.local_steps or 0,
        }

    def facts(self) -> dict[str, Any]:
        """Return the settings that must not change when a stopped run is resumed."""
        kind = type(self.aggregator).__name__
        return {
            "clients": self.clients,
            "rounds": self.rounds,
            "local_epochs": self.local_epochs,
            "local_steps": self.local_steps,
            "fraction": self.fraction,
            "aggregator": kind,
            "seed": self.seed,
            "max_update_norm": self.max_update_norm,
            "pre_aggregators": [plain_attributes(each) for each in self.pre_aggregators],
            "mode": self.mode,
        }
