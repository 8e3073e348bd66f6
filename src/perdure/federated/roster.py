"""Nodes of the clients, which may connect late, leave and come back under another node id."""

import logging
import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, cast

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from perdure.errors import FederationError
from perdure.federated.absences import needed
from perdure.federated.collection import collect

QUERY = "query.partition"
"""Type of the first message to a node."""
UNANSWERED = "No query function registered"
"""Part of Flower's error for an app that answers no such message, as an app of plain Flower."""
PROTOCOL = 4
"""Number of the form of the messages; parties with another one cannot work together."""
WAIT = 120.0
PAUSE = 0.1
"""Seconds to wait for all clients at the start, and seconds between two checks."""
FIRST_DEADLINE = 300.0
"""Seconds that a node has to answer its first message, for which Ray starts all its processes."""
log = logging.getLogger(__name__)


def site() -> ConfigRecord:
    """Return the versions of this party, for the first message and its reply."""
    return ConfigRecord({"perdure": version("perdure"), "protocol": PROTOCOL})


def require_site(record: Any) -> None:
    """Refuse a party that sends other messages.

    Raises:
        FederationError: names both versions.
    """
    given = dict(record) if isinstance(record, ConfigRecord) else {}
    if given != dict(site()):
        raise FederationError(
            f"the other party has the versions {given or 'unknown'}; allowed: {dict(site())}, as "
            "here; install the same perdure on all sites"
        )


class Roster:
    """Nodes of all clients that have introduced themselves.

    Sizes that clients declare are trusted: a client that declares more records than it has gets
    more weight in the mean. Give the sizes, if they are known, so that no client is asked.

    Args:
        clients: number of clients.
        sizes: declared sizes by client, one number an experience; None to ask the clients.
    """

    def __init__(self, clients: int, sizes: Mapping[int, list[int]] | None) -> None:
        self._clients = clients
        self._asks_sizes = sizes is None
        self.sizes = dict(sizes or {})
        self.nodes: dict[int, int] = {}
        self.refused: dict[int, FederationError] = {}
        self._connected: set[int] = set()

    def connected(self, client: int) -> bool:
        """Return True if the node of a client is connected now."""
        return self.nodes.get(client) in self._connected

    def holds(self, client: int, experience: int) -> bool:
        """Return False if a client has declared that it holds no record of an experience."""
        sizes = self.sizes.get(client)
        return sizes is None or (experience < len(sizes) and sizes[experience] > 0)

    def refresh(self, grid: Grid) -> None:
        """Look which nodes are connected, and ask new ones for their partitions."""
        self._connected = set(grid.get_node_ids())
        known = {*self.nodes.values(), *self.refused}
        new = sorted(self._connected - known)
        if new:
            self._ask(grid, new)

    def wait(self, grid: Grid, quorum: float) -> None:
        """Wait until all clients are connected, or long enough and the quorum is.

        Raises:
            FederationError: if too few clients are connected.
        """
        patience = time.monotonic() + WAIT
        self.refresh(grid)
        while len(self.nodes) < self._clients and time.monotonic() < patience:
            if len(self._connected) >= self._clients:
                break
            time.sleep(PAUSE)
            self.refresh(grid)
        least = needed(quorum, self._clients)
        if len(self.nodes) < least:
            reasons = "".join(f"; node {n}: {e}" for n, e in sorted(self.refused.items()))
            raise FederationError(
                f"{len(self.nodes)} of {self._clients} clients are connected, "
                f"{sorted(self.nodes)}; federation.quorum = {quorum:g} needs {least}; start a node "
                f"for each partition 0 .. {self._clients - 1}{reasons}"
            )

    def _ask(self, grid: Grid, nodes: list[int]) -> None:
        task = ConfigRecord({"sizes": int(self._asks_sizes)})
        messages = [
            Message(RecordDict({"task": task.copy(), "site": site()}), node, QUERY)
            for node in nodes
        ]
        replies = collect(grid, messages, deadline=FIRST_DEADLINE)
        for node, reply in sorted(replies.items()):
            try:
                self._introduce(node, reply)
            except Exception as error:  # a foreign reply may break any reader of its parts
                own = isinstance(error, FederationError)
                refusal = error if own else FederationError(f"its answer cannot be read: {error!r}")
                self.refused[node] = cast(FederationError, refusal)
                log.warning("node %d is left out: %s", node, refusal)

    def _introduce(self, node: int, reply: Message) -> None:
        if reply.has_error():
            reason = reply.error.reason or "it gave no reason"
            if UNANSWERED in reason:
                reason = (
                    f"its app does not answer {QUERY}; allowed: apps that "
                    "perdure.federated.client_app has built; build the app of this node with it"
                )
            raise FederationError(reason)
        require_site(reply.content.get("site"))
        metrics = cast(MetricRecord, reply.content["metrics"])
        client = metrics["partition"]
        if type(client) is not int or not 0 <= client < self._clients:
            raise FederationError(
                f"it has the partition {client}; allowed: 0 .. {self._clients - 1}"
            )
        if self.connected(client):
            raise FederationError(
                f"it has the partition {client} of node {self.nodes[client]}; allowed: each "
                "partition once"
            )
        if self._asks_sizes:
            declared = _whole(metrics["sizes"])
            if client in self.sizes and self.sizes[client] != declared:
                raise FederationError(
                    f"client {client} declares the sizes {declared}; allowed: {self.sizes[client]},"
                    " as before"
                )
            self.sizes[client] = declared
        self.nodes[client] = node


def _whole(sizes: object) -> list[int]:
    if isinstance(sizes, list) and all(type(each) is int and each >= 0 for each in sizes):
        return sizes
    raise FederationError(f"it declares the sizes {sizes}; allowed: whole numbers from 0")
