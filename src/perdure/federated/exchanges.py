"""Exchanges of messages with the clients: tasks out, valid replies back, absences noted."""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from perdure.errors import FederationError, LedgerError, PerdureError
from perdure.federated.absences import Absence, Cause, log_absences, needed, require_quorum
from perdure.federated.attendance import Attendance
from perdure.federated.client_store import FRESH, older_state
from perdure.federated.client_totals import ClientTotals
from perdure.federated.collection import collect
from perdure.federated.flower_adapter import UNREACHABLE, InProcessGrid, failure
from perdure.federated.held_arrays import message_of
from perdure.federated.ledger_heads import LEDGER, ClientHeads
from perdure.federated.readmission import Loss
from perdure.federated.reply_checks import Expected, ReplyChecks
from perdure.federated.roster import Roster
from perdure.federated.sent_tasks import SentTasks
from perdure.federated.settings import Federation

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Request of the server in one exchange.

    Args:
        task: numbers that all clients get: experience, round, rounds, exchange, private.
        presence: clients that are asked now, and the last earlier exchange of every client.
        state: combined state of the strategy, for clients that do not have it yet.
        round_state: part of it that changes with every round, for the others.
        record: name of the record with tensors in a reply: `arrays` or `state`.
        tensors: the server's own tensors that a reply's must be like.
        round_tensors: its tensors that a reply has besides, in the record `state`.
    """

    task: Mapping[str, int]
    presence: Attendance
    state: ArrayRecord
    round_state: ArrayRecord
    record: str
    tensors: Mapping[str, Tensor]
    round_tensors: Mapping[str, Tensor]


class Exchanges:
    """Exchanges of one run with its clients.

    A client without a valid reply does not end the run while the quorum holds. It has not taken
    part in the exchange then, and goes on from its last valid reply when it is asked again.

    Args:
        federation: settings: quorum, deadline, bound of the updates.
        roster: nodes of the clients.
    """

    def __init__(self, federation: Federation, roster: Roster) -> None:
        self._federation = federation
        self._roster = roster
        self.checks = ReplyChecks()
        self.heads = ClientHeads()
        self.sent = SentTasks(None)
        self.absences: list[Absence] = []
        self.totals = ClientTotals(federation.clients)
        self._readmitted: set[int] = set()

    def ask(self, grid: Grid, messages: Sequence[Message], request: Request) -> dict[int, Message]:
        """Add to each message the task of its client, send all, and return the valid replies.

        Args:
            grid: engine that carries the messages.
            messages: messages to the clients of this exchange.
            request: the present request.

        Returns:
            Reply of each client, by its number, ascending.

        Raises:
            PrivacyError: below the quorum, if the privacy rules of a client refused.
            RunawayError: below the quorum, if the training of a client diverged.
            FederationError: below the quorum, for other reasons.
        """
        federation = self._federation
        if request.task["round"] == 0:
            self.checks.begin()
        clients = {node: client for client, node in self._roster.nodes.items()}
        outgoing = sorted(messages, key=lambda message: clients[message.metadata.dst_node_id])
        contents = {clients[each.metadata.dst_node_id]: each.content for each in outgoing}
        self._readmitted = set()
        self._add_tasks(outgoing, clients, request, request.presence.previous)
        if request.task["private"]:
            self.sent.add(request.task["exchange"], sorted(contents))
        replies = self._collected(grid, outgoing, clients, request)
        replies |= self._asked_again(grid, replies, contents, request)
        sent_to = {clients[message.metadata.dst_node_id] for message in outgoing}
        absences = [
            _absence(request, client, cause, error)
            for client, cause, error in _missing(request.presence.asked, sent_to, replies)
        ]
        accepted, rejected = self._accept(replies, request)
        absences += rejected
        log_absences(absences)
        if request.task["private"]:
            self.heads.begun |= {each.client for each in absences if each.cause != "absent"}
        require_quorum(federation.quorum, request.presence.asked, len(accepted), absences)
        self.absences += absences
        self.totals.end(request.presence.asked, accepted)
        return accepted

    def _collected(
        self,
        grid: Grid,
        outgoing: Sequence[Message],
        clients: Mapping[int, int],
        request: Request,
    ) -> dict[int, Message]:
        for message in outgoing:
            self.totals.count_sent(clients[message.metadata.dst_node_id], message.content)

        def repeated(nodes: Sequence[int]) -> None:
            self.sent.add(request.task["exchange"], sorted(clients[node] for node in nodes))

        arrived: dict[int, float] = {}
        begin = time.perf_counter()
        found = collect(
            grid,
            outgoing,
            arrived=lambda node: arrived.update({node: time.perf_counter() - begin}),
            repeated=repeated if request.task["private"] else None,
            deadline=self._federation.deadline,
            grace=self._federation.grace,
            least=needed(self._federation.quorum, len(request.presence.asked)),
        )
        # In this process all replies arrive together, after the last client has worked.
        seconds = arrived | (grid.seconds if isinstance(grid, InProcessGrid) else {})
        for node, reply in found.items():
            content = reply.content if reply.has_content() else None
            self.totals.count_received(clients[node], content, seconds[node])
        return {clients[node]: reply for node, reply in found.items()}

    def _asked_again(
        self,
        grid: Grid,
        replies: Mapping[int, Message],
        contents: Mapping[int, RecordDict],
        request: Request,
    ) -> dict[int, Message]:
        """Ask clients that lost their state once more, to go on from an older one, or to begin.

        Under privacy the client's ledger must still be there, unless `Federation.readmit` allows a
        new one. Every message has its last head; if the server has none because no reply has come,
        it says that a task may have begun. The client refuses without the ledger. Only a client's
        first task is not known if the server was killed in that exchange.
        """
        older: dict[int, int] = {}
        again = []
        clients = {self._roster.nodes[client]: client for client in replies}
        for client, reply in replies.items():
            if not reply.has_error():
                continue
            state = older_state(reply.error.reason or "", request.presence.previous[client])
            if state is not None:
                older[client] = state
                node, kind = self._roster.nodes[client], reply.metadata.message_type
                again.append(Message(contents[client], node, kind))
                text = "begins anew" if state == FRESH else f"goes on from exchange {state}"
                log.warning("client %d lost its last state, and %s", client, text)
        if not again:
            return {}
        losses = self._losses([client for client in older if older[client] == FRESH], request)
        self._add_tasks(again, clients, request, older, losses)
        return self._collected(grid, again, clients, request)

    def _losses(self, fresh: Sequence[int], request: Request) -> dict[int, Loss]:
        """Return the facts about the ledgers of clients that may begin new ones, if they may."""
        self._readmitted = set()
        if not (self._federation.readmit and request.task["private"]):
            return {}
        exchange = request.task["exchange"]
        found = {}
        for client in fresh:
            if known := self.heads.known(client):
                number, account = known
                sent = self.sent.after(client, number)
                found[client] = Loss(account=account, known=number, sent=sent, exchange=exchange)
        self._readmitted = set(found)
        self.sent.add(exchange, sorted(found), anew=True)
        return found

    def _add_tasks(
        self,
        outgoing: Iterable[Message],
        clients: Mapping[int, int],
        request: Request,
        last: Sequence[int] | Mapping[int, int],
        losses: Mapping[int, Loss] | None = None,
    ) -> None:
        alike = ConfigRecord({**request.task, "previous": 0})
        begin = request.task["exchange"] - request.task["round"]
        for message in outgoing:
            client = clients[message.metadata.dst_node_id]
            previous = last[client]
            task = alike.copy()
            task["previous"] = previous
            records = dict(message.content) | {"task": task}
            # The combined state goes to a client with its first message of an experience only: sent
            # again, it would overwrite what the strategy has changed on the client since then.
            if request.state and previous < begin:
                records["state"] = request.state
            elif request.round_state:
                records["state"] = request.round_state
            records |= self.heads.told(client, (losses or {}).get(client))
            message.content = message_of(records)

    def _accept(
        self, replies: Mapping[int, Message], request: Request
    ) -> tuple[dict[int, Message], list[Absence]]:
        """Return the valid replies by client, ascending, and the absences of the other clients."""
        upto = request.task["experience"] + 1
        expected = Expected(
            record=request.record,
            tensors=_on_cpu(request.tensors),
            round_state=_on_cpu(request.round_tensors),
            exchange=request.task["exchange"],
            private=bool(request.task["private"]),
            sizes={client: sum(own[:upto]) for client, own in self._roster.sizes.items()},
            max_update_norm=self._federation.max_update_norm,
        )
        whole = {client: each for client, each in replies.items() if not each.has_error()}
        accepted, wrong = self.checks.accept(whole, expected)
        for client in wrong:
            with suppress(Exception):  # its steps are charged, although its update is not used
                self._take_head(client, whole[client], request)
        rejected = [
            _absence(
                request,
                client,
                "rejected",
                FederationError(f"the reply of client {client} is rejected: {error}"),
                error.field,
            )
            for client, error in sorted(wrong.items())
        ]
        for client, reply in list(accepted.items()):
            try:
                self._take_head(client, reply, request)
            except LedgerError as error:
                rejected.append(_absence(request, client, "rejected", error, LEDGER))
                del accepted[client]
        return accepted, rejected

    def _take_head(self, client: int, reply: Message, request: Request) -> None:
        exchange = request.task["exchange"]
        self.heads.take(client, reply, exchange, readmitted=client in self._readmitted)
        self.sent.settle(client, exchange)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in tensors.items()}


def _absence(
    request: Request, client: int, cause: Cause, error: PerdureError, field: str = ""
) -> Absence:
    exchange = request.task["exchange"]
    return Absence(exchange=exchange, client=client, cause=cause, error=error, field=field)


def _missing(
    asked: Iterable[int], sent_to: Set[int], replies: Mapping[int, Message]
) -> list[tuple[int, Cause, PerdureError]]:
    """Return the clients that did not reply, or replied with an error."""
    found: list[tuple[int, Cause, PerdureError]] = []
    for client in asked:
        reply = replies.get(client)
        if client not in sent_to:
            told: PerdureError = FederationError(f"no node of client {client} is connected")
            found.append((client, "absent", told))
        elif reply is None:
            told = FederationError(f"no reply from client {client} before the deadline")
            found.append((client, "late", told))
        elif reply.has_error():
            told = failure(client, reply.error.reason or "no reason given")
            away = reply.error.code in UNREACHABLE
            found.append((client, "absent" if away else "failed", told))
    return found
