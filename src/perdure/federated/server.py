"""Server of a federation: rounds of a Flower aggregator for every experience.

Each experience ends with consolidation, evaluation and a checkpoint.

An *exchange* is one request to clients and their replies: `rounds` training rounds and one
consolidation for every experience, numbered from 0 over the whole run. An exchange of the server
depends only on its number, the seed and the last checkpoint, so a stopped run continues to the
bit-identical result.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from perdure.contract.plan import MODELLED
from perdure.contract.state import State
from perdure.data.experience import Stream
from perdure.data.records import Records
from perdure.federated.absences import Absence
from perdure.federated.aggregation import aggregated
from perdure.federated.attendance import Attendance
from perdure.federated.averaging import ready
from perdure.federated.client_accuracy import own_accuracies
from perdure.federated.client_totals import ClientTotals
from perdure.federated.exchanges import Exchanges, Request
from perdure.federated.flower_adapter import (
    Cohort,
    contained,
    recall,
    remind,
)
from perdure.federated.ledger_heads import ClientHeads
from perdure.federated.local_work import set_local_work
from perdure.federated.messages import (
    load_record,
    load_shared,
    read_metric,
    read_tensors,
    shared,
    to_record,
)
from perdure.federated.reply_checks import ReplyChecks
from perdure.federated.roster import Roster
from perdure.federated.sent_tasks import SentTasks
from perdure.federated.settings import Federation
from perdure.federated.state_merging import combine, combine_round, sent, sent_every_round
from perdure.learner.arguments import check_stream
from perdure.learner.checkpoint import Position, Store
from perdure.learner.fingerprint import plain_attributes
from perdure.learner.folder_claims import ACCOUNTS, HEADS
from perdure.learner.learner import Learner
from perdure.privacy.ledger.account import Statement
from perdure.utils.folder_lock import locked
from perdure.utils.modules import detached_copies

ServerCallback = Callable[[str, "Server"], None]
"""Function that is called at every named point of the server's loop; the names are `POINTS`."""

POINTS = (
    "round.begin",
    "round.received",
    "round.end",
    "experience.received",
    "experience.combined",
    "evaluated",
    "checkpoint.begin",
    "checkpoint.end",
)
"""Points at which callbacks are called, and at which tests stop and resume a run."""


@dataclass(kw_only=True)
class Server:
    """Server of a federation: trains one model on a whole stream with the clients of a Flower grid.

    Args:
        learner: learner like the learners of the clients; it holds the global parameters and the
            combined state. It must have no privacy, folder or adversary, because it gets no
            training record. `learner.matrix` is the result.
        stream: public part of the clients' stream: classes, declared sizes and test records.
        federation: clients, rounds, aggregator.
        folder: folder of the run, for checkpoints; None for no checkpoints.
        callbacks: called as callback(point, server).
        sizes: declared sizes of every client, one number an experience; None to ask each client
            when it connects, and to believe it.
        tests: public test records of every client, one set an experience; None if only the clients
            have them, so that their accuracy is not known here.
    """

    learner: Learner
    stream: Stream
    federation: Federation
    folder: Path | None = None
    callbacks: Sequence[ServerCallback] = ()
    sizes: Sequence[Sequence[int]] | None = None
    tests: Sequence[Sequence[Records]] | None = None

    def __post_init__(self) -> None:
        check_stream(self.stream)
        self.folder = None if self.folder is None else Path(self.folder)
        bare: dict[str, Any] = {
            "privacy": None,
            "adversary": None,
            "defence": None,
            "folder": None,
            "callbacks": (),
            "matrix": [],
        }
        # privacy of the clients is a setting of the run, although the server has no private data
        self._settings: dict[str, object] = {
            "federation": self.federation.facts()
            | {"aggregator": plain_attributes(self.federation.aggregator)},
            "privacy": self.learner.privacy,
            "adversary": self.learner.adversary,
        }
        if self.learner.defence:
            self._settings["defence"] = self.learner.defence
        self.learner = replace(self.learner, **bare)
        set_local_work(self.learner, self.federation.local_work)
        self.stream = public(self.stream)
        self.exchanges = len(self.stream) * (self.federation.rounds + 1)
        self._initial = detached_copies(shared(self.learner.model))
        self._aggregator = ready(self.federation.aggregator)
        given = None if self.sizes is None else dict(enumerate(map(list, self.sizes)))
        self._roster = Roster(self.federation.clients, given)
        self._exchanges = Exchanges(self.federation, self._roster)
        self._attendance = self._attend()

    @property
    def heads(self) -> ClientHeads:
        """Last head of the ledger of each client."""
        return self._exchanges.heads

    @property
    def absences(self) -> Sequence[Absence]:
        """Clients without a valid reply, since this server was started."""
        return self._exchanges.absences

    @property
    def private(self) -> bool:
        """True if the clients train with privacy."""
        return self._settings["privacy"] is not None

    def client_epsilons(self) -> dict[int, Statement]:
        """Return the epsilon of each client's records so far, as the clients have reported it.

        It contains the charges of ledgers that a client has lost. A client without a valid reply is
        left out. The result is empty without privacy.
        """
        accounts = {int(name): self.heads.account(int(name)) for name in self.heads.accounts}
        return {n: each.statement() for n, each in sorted(accounts.items()) if each is not None}

    @property
    def clients(self) -> ClientTotals:
        """Participation, bytes and seconds of every client since the start of the run."""
        return self._exchanges.totals

    def client_accuracies(self) -> list[float | None]:
        """Evaluate the model on each client's own public test records, after an evaluation.

        Returns:
            Mean over the stages so far that the client holds, in the unit of the task's metric;
            None for a client whose test records are not known here.
        """
        if self.tests is None or self.sizes is None:
            return [None] * self.federation.clients
        return own_accuracies(self.learner, self.tests, self.sizes)

    @property
    def exchange(self) -> int:
        """Number of the next exchange, from 0."""
        return self._attendance.exchange

    @property
    def experience(self) -> int:
        """Index of the experience that the next exchange belongs to."""
        return self.exchange // (self.federation.rounds + 1)

    @property
    def round(self) -> int:
        """Number of the next exchange in its experience, from 0.

        Training rounds come first; `federation.rounds` is the consolidation.
        """
        return self.exchange % (self.federation.rounds + 1)

    def serve(self, grid: Grid) -> None:
        """Run the whole stream on this grid, or continue a stopped run.

        Raises:
            FederationError: if a client or the aggregator cannot continue.
            PrivacyError: if the privacy rules of a client refuse.
            RunawayError: if training diverged.
            RunError: if the folder is in use, or has a run with other settings.
        """
        with contained(), locked(self.folder):
            self.learner.driven_by = self._settings
            self.learner.prepare(self.stream)
            if self.private:
                self.learner.session.trained_by = "trained by clients, who hold the ledgers"
            self._resume()
            while self.exchange < self.exchanges:
                if not self._roster.nodes:
                    self._roster.wait(grid, self.federation.quorum)
                self._roster.refresh(grid)
                consolidating = self.round == self.federation.rounds
                present = (self._consolidate if consolidating else self._train)(grid)
                self._attendance.advance(present)
                self._save()

    # ------------------------------------------------------------------ one exchange

    def _train(self, grid: Grid) -> list[int]:
        """Run one round: the aggregator chooses messages, and combines the replies to one model.

        Returns:
            Clients whose replies were accepted.
        """
        learner = self.learner
        if self.round == 0 and learner.training.of(self.stream[self.experience]).restart:
            load_shared(learner.model, self._initial)
            self._aggregator = ready(self.federation.aggregator)
        self._notify("round.begin")
        number = self.experience * self.federation.rounds + self.round + 1
        cohort = [self._roster.nodes[client] for client in self._reachable()]
        before = shared(learner.model)
        messages: Iterable[Message] = ()
        if cohort:  # without a node, an aggregator would wait for one forever
            messages = self._aggregator.configure_train(
                number, to_record(before), ConfigRecord(), Cohort(grid, cohort)
            )
        replies = self._ask(grid, messages, "arrays", before)
        self._notify("round.received")
        weighty = [each for each in replies.values() if read_metric(each, "num-examples")]
        if weighty:
            self._combine_round(weighty)
            result = aggregated(
                self._aggregator,
                number,
                weighty,
                detached_copies(before),
                before.keys() & {name for name, _ in learner.model.named_buffers()},
                self.federation,
            )
            load_record(learner.model, result)
        learner.session.mark_model(learnt=True)
        self._notify("round.end")
        return list(replies)

    def _combine_round(self, replies: Sequence[Message]) -> None:
        """Combine the state that follows every round, and take it out of the replies."""
        learner = self.learner
        old = sent_every_round(learner.state)
        if not old:
            return
        states = [State(read_tensors(reply, "state"), old.rules) for reply in replies]
        for reply in replies:  # an aggregator allows one record of tensors only
            del reply.content["state"]
        new = combine_round(old, states, self.federation.clients)
        moved = {name: value.to(learner.device) for name, value in new.items()}
        learner.session.state = learner.strategy.derive(learner.state.replace(moved))

    def _consolidate(self, grid: Grid) -> list[int]:
        """Consolidate the experience with the global parameters, on the clients that need it.

        The states of the clients are combined, and the model is evaluated.

        Returns:
            Clients whose replies were accepted.
        """
        learner = self.learner
        content = {"arrays": to_record(shared(self.learner.model))}
        messages = [
            Message(RecordDict(dict(content)), self._roster.nodes[client], "train.finish")
            for client in self._reachable()
        ]
        replies = self._ask(grid, messages, "state", sent(learner.state))
        self._notify("experience.received")
        rules = sent(learner.state).rules
        weighty = [each for each in replies.values() if read_metric(each, "num-examples")]
        states = [State(read_tensors(reply, "state"), rules) for reply in weighty]
        weights = [read_metric(reply, "num-examples") for reply in weighty]
        if states:
            combined = combine(learner.state, states, weights)
            learner.session.state = learner.strategy.derive(
                learner.state.replace({n: t.to(learner.device) for n, t in combined.items()})
            )
        learner.session.position = Position(experience=self.experience + 1)
        self._notify("experience.combined")
        if learner.is_measured(self.experience):
            learner.measure()
            self._notify("evaluated")
        return list(replies)

    def _reachable(self) -> list[int]:
        """Return the clients of this exchange whose nodes are connected."""
        return [client for client in self._attendance.asked if self._roster.connected(client)]

    def _ask(
        self, grid: Grid, messages: Iterable[Message], record: str, tensors: Mapping[str, Tensor]
    ) -> dict[int, Message]:
        """Send messages with the tasks of their clients, and return the valid replies by client.

        Args:
            grid: engine that carries the messages.
            messages: messages to the clients of this exchange.
            record: name of the record with tensors in a reply.
            tensors: the server's own tensors that a reply's must be like.
        """
        task = self.federation.local_work | {
            "experience": self.experience,
            "round": self.round,
            "exchange": self.exchange,
            "private": int(self.private),
        }
        own = self.learner.state
        round_state = sent_every_round(own)
        request = Request(
            task=task,
            presence=self._attendance,
            state=to_record(sent(own)),
            round_state=to_record(round_state),
            record=record,
            tensors=tensors,
            round_tensors=round_state if record == "arrays" else {},
        )
        return self._exchanges.ask(grid, list(messages), request)

    def _all_consolidate(self, experience: int) -> bool:
        """Return True if clients that did not train in an experience consolidate it, too.

        They need not if no state is combined and nothing depends on the global model, as with a
        memory that is filled at random. Then each client consolidates when it is asked next, with
        the same bits, and the time of a consolidation does not grow with the number of clients.
        """
        learner = self.learner
        memory = learner.training.of(self.stream[experience]).memory
        return (
            sent(learner.state).keys() > sent_every_round(learner.state).keys()
            or any(map(learner.strategy.uses, ("after_experience", "remember")))
            or (memory is not None and memory.selection in MODELLED)
        )

    # ------------------------------------------------------------------ stopping and going on

    def _save(self) -> None:
        """Write the learner's checkpoint with the exchange and the state of the aggregator."""
        if self.folder:
            self._notify("checkpoint.begin")
            arrays, kinds = recall(self._aggregator)
            snapshot = self.learner.checkpoint()
            tensors = {
                **snapshot.tensors,
                **{f"aggregator.{name}": value for name, value in arrays.items()},
                **self.clients.tensors(),
            }
            facts = {**snapshot.facts, "exchange": self.exchange, "aggregator": kinds}
            facts[HEADS], facts["begun"] = self.heads.texts, sorted(self.heads.begun)
            facts[ACCOUNTS] = {name: list(each) for name, each in self.heads.accounts.items()}
            facts["sent"] = self._exchanges.sent.lines
            facts["previous"] = list(self._attendance.previous)
            facts["norms"] = self._exchanges.checks.norms
            Store(self.folder).save(self.exchange, replace(snapshot, tensors=tensors, facts=facts))
            self._notify("checkpoint.end")

    def _resume(self) -> None:
        snapshot = Store(self.folder).load() if self.folder else None
        least = snapshot.facts.get("sent", 0) if snapshot else 0
        self._exchanges.sent = SentTasks(self.folder, least)
        if snapshot is None:
            return
        cut = {
            n.removeprefix("aggregator."): t
            for n, t in snapshot.tensors.items()
            if n.startswith("aggregator.")
        }
        self.learner.restore_checkpoint(snapshot, where=self.folder)
        self.clients.restore(snapshot.tensors)
        remind(self._aggregator, cut, snapshot.facts["aggregator"])
        self._attendance = self._attend(snapshot.facts["exchange"], snapshot.facts["previous"])
        self._exchanges.checks = ReplyChecks(snapshot.facts["norms"])
        told = (snapshot.facts.get("begun", ()), snapshot.facts.get(ACCOUNTS))
        self._exchanges.heads = ClientHeads(snapshot.facts[HEADS], *told)

    def _attend(self, exchange: int = 0, previous: Sequence[int] | None = None) -> Attendance:
        holds = self._roster.holds
        return Attendance(self.federation, self._all_consolidate, holds, exchange, previous)

    def _notify(self, point: str) -> None:
        for callback in self.callbacks:
            callback(point, self)


def server_app(server: Server) -> ServerApp:
    """Build the Flower app of the server, for any engine."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        server.serve(grid)

    return app


def public(stream: Stream) -> Stream:
    """Return the stream without its training records: classes, declared sizes and test records."""
    experiences = []
    for experience in stream:
        train = experience.train
        none = train.take(torch.empty(0, dtype=torch.int64, device=train.inputs.device))
        train = replace(none, declared_size=train.declared_size)
        experiences.append(replace(experience, train=train))
    return replace(stream, experiences=tuple(experiences))
