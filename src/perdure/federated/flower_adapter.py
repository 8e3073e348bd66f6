"""Adapter to Flower, and the only module that uses its private parts.

It contains the engines, the saved state of an aggregator, and the cleaning up after a run.

`Grid` is Flower's word for the server's view of the nodes. `InProcessGrid` calls the client app
directly; `simulate` runs the same two apps on Flower's Ray engine. It is written for Flower 1.41; a
test pins the names used here.
"""

import importlib.util
import logging
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from flwr.app import (
    ArrayRecord,
    Context,
    Error,
    Message,
    RecordDict,
    UserConfig,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy as Aggregator
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from perdure import errors
from perdure.errors import (
    BudgetError,
    FederationError,
    GuardError,
    LedgerError,
    PerdureError,
    PrivacyError,
    RunawayError,
)
from perdure.federated.client_store import LostStateError
from perdure.federated.held_arrays import copied
from perdure.federated.messages import to_record
from perdure.types import Params

Listen = Callable[[Message], None]
"""Function that is called with every message to a client and every reply, unchanged."""
MessageProgress = Callable[[int, int], None]
"""Function that is called as progress(replies so far, replies expected) after every reply."""

IDENTITY = {"_task_id": 1, "_run_id": 1, "_node_id": 0}
"""Identity of the process that Flower needs before messages can be created."""
CLIENT_FAILED = 2
UNREACHABLE = {3, 4, 5}
"""Flower's codes of errors for messages and replies that did not arrive."""
TELLING_NOTHING: frozenset[type[Exception]] = frozenset(
    {BudgetError, FederationError, GuardError, LedgerError, LostStateError}
)
"""Errors of a private client whose text may go to the server, because it has no value of a record.

They are about ledger, budget and messages, or from a guard that uses synthetic records. Subclasses
do not count.
"""
IN_THE_LOG = "see the client's log"
RAY_USAGE = "RAY_USAGE_STATS_ENABLED"
log = logging.getLogger(__name__)


class InProcessGrid(Grid):
    """Flower grid that calls the client app in this process, one node after another.

    Every node gets its own copy of a message, so a client that writes into its message does not
    change the messages of others. An exception in the client app becomes an error reply.

    Args:
        app: client app of all nodes.
        clients: number of nodes; node k + 1 is partition k.
        progress: function that is called after every reply.
        listen: function that gets every message and every reply; for audits.
        node_config: further keys of the config of every node; a list for those of each node.
    """

    def __init__(
        self,
        app: ClientApp,
        clients: int,
        progress: MessageProgress | None = None,
        listen: Listen | None = None,
        node_config: Mapping[str, str] | Sequence[Mapping[str, str]] | None = None,
    ) -> None:
        self._app = app
        self._listen = listen
        self._progress = progress
        self._contexts: dict[int, Context] = {}
        for number in range(clients):
            place: UserConfig = {"partition-id": number, "num-partitions": clients}
            own = node_config or {}
            place |= own if isinstance(own, Mapping) else own[number]
            self._contexts[number + 1] = Context(
                run_id=IDENTITY["_run_id"],
                node_id=number + 1,
                node_config=place,
                state=RecordDict(),
                run_config={},
            )
        self._run = Run.create_empty(IDENTITY["_run_id"])
        self._replies: dict[str, Message] = {}
        self._sent = 0
        self.seconds: dict[int, float] = {}
        """Seconds in which each node gave its last reply."""

    @contextmanager
    def running(self) -> Iterator["InProcessGrid"]:
        """Context manager that gives this process an identity of Flower, which messages need."""
        before = {name: getattr(TaskIdentity, name) for name in IDENTITY}
        try:
            _identify(IDENTITY)
            yield self
        finally:
            _identify(before)

    def set_run(self, run: Run) -> None:
        """Set Flower's identifier of the run that all messages belong to."""
        self._run = run

    @property
    def run(self) -> Run:
        """Flower's identifier of the run that all messages belong to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message to one node.

        Args:
            content: records of the message.
            message_type: kind of the message, such as `train`.
            dst_node_id: the node that receives it.
            group_id: name of the group of messages.
            ttl: seconds until the message expires; None for Flower's default.
        """
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids: 1, 2, 3, ..."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver the messages at once, and keep the replies until they are pulled."""
        waiting = list(messages)
        ids = []
        for done, message in enumerate(waiting, 1):
            self._sent += 1
            ids.append(str(self._sent))
            message.metadata.__dict__["_message_id"] = ids[-1]
            message.content = copied(message.content)
            if self._listen:
                self._listen(message)
            begin = time.perf_counter()
            reply = self._reply(message)
            self.seconds[message.metadata.dst_node_id] = time.perf_counter() - begin
            if self._listen:
                self._listen(reply)
            self._replies[ids[-1]] = reply
            if self._progress:
                self._progress(done, len(waiting))
        return ids

    def _reply(self, message: Message) -> Message:
        """Return a node's reply, or an error in its place."""
        before = dict(vars(message.metadata))
        asked = (message.metadata.dst_node_id, message.metadata.message_id)
        failed: Exception
        try:
            reply = self._app(message, self._contexts[asked[0]])
            if not isinstance(reply, Message):
                raise FederationError(f"the app returned {type(reply).__name__} for a message")
            given = (reply.metadata.src_node_id, reply.metadata.reply_to_message_id)
        except Exception as error:
            failed = error
        else:
            if given == asked:
                return reply
            # A SuperLink knows its nodes by their keys; here nobody else can notice a false name.
            failed = FederationError(
                f"it says that it is node {given[0]} and answers message {given[1]}; allowed: node "
                f"{asked[0]} and message {asked[1]}"
            )
        vars(message.metadata).update(before)  # the client may have changed the sender here, too
        return error_reply(message, failed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages, each once."""
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Deliver the messages, and return the replies in the same order; there is no timeout."""
        return self.pull_messages(self.push_messages(messages))


class Cohort(Grid):
    """Grid that shows only some of the nodes of another grid.

    Any Flower aggregator then samples exactly these nodes.
    """

    def __init__(self, grid: Grid, node_ids: Sequence[int]) -> None:
        self._grid = grid
        self._node_ids = list(node_ids)

    def set_run(self, run: Run) -> None:
        """Set Flower's identifier of the run in the grid of all nodes."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """Identifier that Flower gave to the run, from the grid of all nodes."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message to one node."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids of the cohort."""
        return list(self._node_ids)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages to the whole grid."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull replies from the whole grid."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages to the whole grid, and return the replies."""
        return self._grid.send_and_receive(messages, timeout=timeout)


def error_reply(message: Message, error: Exception, *, private: bool = False) -> Message:
    """Create a reply with the type and the first line of an error.

    Guarantee: with `private`, only texts of errors in `TELLING_NOTHING` are sent, because they have
    no value of a record. All other texts stay in the client's log, also those of perdure's own
    errors: a `DataError` names row, column and value.
    """
    told = type(error) in TELLING_NOTHING or not private
    if not told or not isinstance(error, PerdureError):
        log.error("a client app stopped", exc_info=error)
    text = (str(error).strip().splitlines() or ["no message"])[0] if told else IN_THE_LOG
    return Message(Error(CLIENT_FAILED, f"{type(error).__name__}: {text}"), reply_to=message)


def failure(client: int, reason: str) -> PerdureError:
    """Return the exception for an error reply of a client.

    A refusal by the privacy rules becomes a PrivacyError, diverged training a RunawayError.
    """
    line = (reason.strip().splitlines() or ["no reason given"])[0]
    kind, _, text = line.partition(": ")
    known = getattr(errors, kind, None)
    if known is RunawayError:
        return RunawayError(f"client {client} diverged: {text}")
    if isinstance(known, type) and issubclass(known, PrivacyError):
        return known(f"client {client}: {text}")
    return FederationError(f"client {client} stopped: {line}")


@contextmanager
def contained() -> Iterator[None]:
    """Context manager in which Flower logs only warnings.

    It restores log level and random state.
    """
    logger = logging.getLogger("flwr")
    state = random.getstate()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
        random.setstate(state)


def refuse_missing_engine(engine: str) -> None:
    """Refuse the engine `ray` where Ray is not installed.

    Raises:
        FederationError: names the command that installs it.
    """
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise FederationError(
            "engine = 'ray' needs Ray, which is not installed; run pip install perdure[simulation]"
        )


def simulate(server: ServerApp, client: ClientApp, clients: int) -> None:
    """Run both apps on Flower's Ray engine.

    Raises:
        FederationError: if Ray is not installed.
    """
    refuse_missing_engine("ray")
    from flwr.simulation import run_simulation

    before = {name: getattr(TaskIdentity, name) for name in IDENTITY}
    logger = logging.getLogger("flwr")
    level = logger.level
    # Flower marks this entry as deprecated, but has no other one for app objects
    logger.setLevel(logging.ERROR)
    try:
        with _unobserved():
            run_simulation(server, client, num_supernodes=clients)
    finally:
        logger.setLevel(level)
        _identify(before)


@contextmanager
def _unobserved() -> Iterator[None]:
    """Context manager that stops Flower and Ray from sending usage reports.

    Settings in the user's environment take precedence.
    """
    from flwr.supercore import telemetry

    if "FLWR_TELEMETRY_ENABLED" not in os.environ:
        # telemetry stays off, because threads that outlive the run send events
        telemetry.FLWR_TELEMETRY_ENABLED = "0"
    before = os.environ.get(RAY_USAGE)
    os.environ[RAY_USAGE] = before or "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[RAY_USAGE]


def _identify(identity: dict[str, int]) -> None:
    for name, value in identity.items():
        setattr(TaskIdentity, name, value)


def recall(aggregator: Aggregator) -> tuple[Params, dict[str, str]]:
    """Return the arrays that an aggregator keeps between rounds, and the type of each container.

    An example are the moments of FedAdam.
    """
    tensors: Params = {}
    kinds: dict[str, str] = {}
    for name, value in vars(aggregator).items():
        if isinstance(value, ArrayRecord):
            kind = "record"
            arrays = {key: array.numpy() for key, array in value.items()}
        elif isinstance(value, dict):
            kind = "dict"
            arrays = value
        elif isinstance(value, list):
            kind = "list"
            arrays = {str(i): array for i, array in enumerate(value)}
        else:
            continue
        # settings may be containers, too, and an empty container does not show its purpose
        numeric = all(isinstance(array, np.ndarray | np.generic) for array in arrays.values())
        if kind == "record" or (arrays and numeric):
            kinds[name] = kind
            tensors |= {f"{name}.{key}": torch.tensor(np.asarray(arrays[key])) for key in arrays}
    return tensors, kinds


def remind(aggregator: Aggregator, tensors: Mapping[str, Tensor], kinds: Mapping[str, str]) -> None:
    """Restore arrays of an aggregator that `recall` returned."""
    for name, kind in kinds.items():
        own = {
            n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.startswith(f"{name}.")
        }
        arrays = {key: value.numpy() for key, value in own.items()}
        in_order = [arrays[str(i)] for i in range(len(arrays))] if kind == "list" else arrays
        setattr(aggregator, name, to_record(own) if kind == "record" else in_order)
