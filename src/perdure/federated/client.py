"""Client of a federation: a learner that trains one block of its loop in each round.

    Requests and replies:

    train            receives global parameters, trains a block of the experience, sends parameters,
                     the declared size, and the state that is combined after every round
    train.finish     receives final global parameters, consolidates and updates memory, sends the
                     strategy's shared state
    query.partition  receives the server's version, sends its own, the number of the partition that
                     this node holds, and its declared sizes if the server does not know them

A client's private state (optimiser, strategy state, memory, ledger, key) never leaves it. It is
saved on the client's disk after every exchange, so that a client that is asked again after a crash
goes back to that exchange and gives the identical reply.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import cast
from weakref import ReferenceType, ref

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from perdure.data.experience import Stream
from perdure.data.record_identity import refuse_records_in_two_partitions
from perdure.errors import FederationError, LedgerError
from perdure.federated.client_store import (
    FRESH,
    ClientSession,
    park,
    refuse_empty,
    restore,
    save,
    unpark,
)
from perdure.federated.client_streams import held_experiences, without_gaps
from perdure.federated.flower_adapter import error_reply
from perdure.federated.held_arrays import message_of
from perdure.federated.ledger_heads import LEDGER, loss_in, refuse_lost, reported, require_known
from perdure.federated.local_work import set_local_work
from perdure.federated.messages import (
    load_record,
    load_shared,
    read_tensors,
    shared,
    to_record,
)
from perdure.federated.parked_clients import ParkedClients
from perdure.federated.party_checks import (
    owner_of,
    refuse_folder,
    refuse_privacy,
    refuse_unplanned,
    refuse_validation,
)
from perdure.federated.readmission import Readmission, has_ledger, refuse_readmission
from perdure.federated.reply_checks import EXCHANGE
from perdure.federated.roster import require_site, site
from perdure.federated.state_merging import sent, sent_every_round
from perdure.learner.folder_claims import client_folder
from perdure.learner.learner import Learner
from perdure.planning.training_plan import Participation, TrainingPlan
from perdure.types import Params
from perdure.utils.modules import own_memory, share_memory

MakeParty = Callable[[int], tuple[Learner, Stream]]
"""Function from a client's number to its new learner and its stream."""
Handler = Callable[[Message, Context], Message]


class ClientSessions:
    """Learners of the clients in this process, each in its state after some exchange.

    Args:
        make: function that builds a client's learner and stream.
        folder: folder of the run; None to write no files.
        distinct: True if it is known that no two clients have the same record.
        alive: largest number of learners that are kept between exchanges; None for all. The
            memory of the others is in their folders or, without a folder, in a temporary file
            without a name.
        participation: function from a client's number to the rounds in which it trains; None if
            they are not known, and a private plan has all rounds.
        readmit: True if a private client that lost its ledger may begin a new one.
    """

    def __init__(
        self,
        make: MakeParty,
        folder: Path | None,
        *,
        distinct: bool = False,
        alive: int | None = None,
        participation: Callable[[int], Participation] | None = None,
        readmit: bool = False,
    ) -> None:
        self._make = make
        self._may_readmit = readmit
        self._participation = participation
        self._alive = alive
        self._parked = ParkedClients()
        self._folder = folder
        self._distinct = distinct
        self._streams: dict[int, Stream] = {}
        self._seats: dict[int, ClientSession] = {}
        self._declared: dict[int, list[int]] = {}
        self._holdings: dict[int, list[int]] = {}
        self._open: Learner | None = None
        self._first: Learner | None = None
        self._sharing: list[ReferenceType[Learner]] = []
        self.private = True

    def take(
        self, client: int, task: Mapping[str, int], message: Message | None = None
    ) -> ClientSession:
        """Return the client in its state after its last exchange.

        Afterwards give the client back with `put`; without this, the next call builds the client
        again from the disk.

        A learner in another state (after a failed exchange, or from another process) is not used,
        because its ledger may be old. But a client without a folder whose last reply was lost or
        rejected goes on from its state after that exchange, because it has no other.

        Args:
            client: number of the client.
            task: numbers of the present exchange; `previous` is the client's last one.
            message: message of the server, with what it knows of the client's ledger.

        Raises:
            LostStateError: if the folder has no state after the client's last exchange.
            LedgerError: if the client cannot go on with a new ledger.
        """
        exchange = task["previous"]
        seat = self._seats.pop(client, None)
        parked = self._parked.pop(client)
        if seat and self._is_current(seat.exchange, exchange) and self._held(seat.learner):
            return seat
        self.private = True  # the message of a later error may contain values of a record
        learner, whole = self._make(client)
        self.private = learner.privacy is not None
        stream = without_gaps(whole, client, present=not self.private)
        self._declared[client] = held_experiences(whole)
        self._holdings[client] = held_experiences(whole, present=not self.private)
        set_local_work(learner, task)
        refuse_folder(learner.folder, client)
        refuse_validation(learner, client)
        self._first = self._first or learner
        learner.share_initial(self._first)
        learner.owner = owner_of(learner, client)
        if self.private and not self._distinct and client not in self._streams:
            self._streams[client] = stream
            refuse_records_in_two_partitions([self._streams[n] for n in sorted(self._streams)])
        if self._participation is not None:
            learner.participation = self._participation(client)
        learner.client = client
        if self._folder:
            learner.folder = client_folder(self._folder, client)
            refuse_empty(learner.folder, exchange)
            if self.private and message is not None:
                self._readmit(learner, stream, task, message)
        self._open = learner
        learner.prepare(stream)
        received = shared(learner.model)
        learner.session.received = frozenset(received)
        if learner.privacy is None and self._first.privacy is None:
            # Every exchange begins with the server's parameters, so a client needs none between
            # exchanges, and the memory that all clients use stays in the processor's cache.
            share_memory(received, shared(self._first.model))
            self._sharing.append(ref(learner))
        if parked and self._is_current(parked.exchange, exchange):
            return unpark(learner, parked)
        return restore(learner, exchange)

    def _readmit(
        self, learner: Learner, stream: Stream, task: Mapping[str, int], message: Message
    ) -> None:
        """Give a learner its new ledger if its folder lost the old one, now or before."""
        folder, held = learner.folder, self._holdings[learner.client]
        assert folder is not None
        refuse_lost(folder, message)
        loss = loss_in(message)
        if loss and not has_ledger(folder):
            refuse_readmission(self._may_readmit)
            plan = _plan_of(learner, stream)
            Readmission.after(loss, plan, task["rounds"], held).keep(folder)
        if known := Readmission.recall(folder):
            known.apply(learner, task["rounds"], held)

    def _is_current(self, held: int, exchange: int) -> bool:
        """Return True if a client goes on from its state after `held`.

        Args:
            held: last exchange of the state that the client has.
            exchange: the client's last exchange that the server knows; FRESH at the start of a run.
        """
        if exchange == FRESH:
            return False
        return held == exchange or (self._folder is None and held > exchange)

    def own_index(self, client: int, experience: int) -> int | None:
        """Return the index of the federation's experience in the client's stream without gaps.

        It is None if a client without privacy declares records of the experience, but has none.

        Raises:
            FederationError: if the client does not declare it.
        """
        held = self._holdings[client]
        if experience in held:
            return held.index(experience)
        declared = self._declared[client]
        if experience in declared:
            return None
        raise FederationError(
            f"the client was asked for experience {experience}; allowed: {declared}, of which it "
            "has records; give the server the sizes that the client declares"
        )

    def declared_sizes(self, client: int) -> list[int]:
        """Return the declared number of a client's records in every experience."""
        return [each.train.declared_size for each in self._make(client)[1]]

    def put(self, client: int, seat: ClientSession, exchange: int) -> None:
        """Save the client, and keep it in its state after `exchange`."""
        save(seat, exchange)
        seat.learner.session.rest()
        self._seats[client] = seat
        if self._alive is not None and len(self._seats) > self._alive:
            self._leave(next(iter(self._seats)))  # the one that was not asked for longest

    def _leave(self, client: int) -> None:
        """Let a client's learner go, after keeping what is not in its folder."""
        learner = self._seats[client].learner
        if learner.folder is None:
            if learner.privacy is not None:  # its ledger and key are nowhere else
                return
            self._parked.put(client, park(self._seats[client]))
        del self._seats[client]
        self._sharing = [each for each in self._sharing if each() not in (None, learner)]
        learner.release()

    def close(self) -> None:
        """Release the lock on the folder of the last client."""
        if self._open is not None:
            self._open.close()
        self._open = None

    def part(self, values: Params) -> None:
        """Give every learner that shares memory its own again, with the server's parameters.

        Args:
            values: parameters and buffers of the server's model, as `shared` returns them.
        """
        for learner in filter(None, [each() for each in self._sharing]):
            own_memory(shared(learner.model))
            with suppress(FederationError):  # a model that does not fit was refused when it came
                load_shared(learner.model, values)
        self._sharing = []

    def _held(self, learner: Learner) -> bool:
        """Lock a learner's folder again; return False if its ledger was written to meanwhile."""
        self._open = learner
        try:
            learner.session.hold()
        except LedgerError:
            return False
        return True


def client_app(
    make: MakeParty,
    folder: Path | str | None = None,
    *,
    distinct: bool = False,
    alive: int | None = None,
    readmit: bool = False,
) -> ClientApp:
    """Build the Flower app that every client runs, on any engine.

    Guarantee: under privacy, a reply contains only released parameters, released state, declared
    numbers and the head of the client's ledger. It contains the text of an error only if the text
    has no value of a record. The app does not test values of records, because an error about them
    would reach the server. So each holder of records must call `perdure.data.check_finite` on its
    stream first.

    Args:
        make: function from a client's number to its new learner and its stream; client number and
            folder are set by the app. The models of all parties must start with the same
            parameters, from one seed: SI's anchor and CWR*'s base are the client's own first
            parameters. All clients of this process without privacy keep their parameters in the
            same memory, so read a client's model only in callbacks of its learner, where it has
            the client's own.
        folder: folder of the run; the state of client 3 is in its subfolder `clients/003`. None to
            keep the state in this process only. If a learner has no owner, the owner of its ledger
            is client-3.
        distinct: under privacy, True if no two clients of this process hold the same record; if
            False, the ids of their records are compared when each client is built.
        alive: largest number of learners in this process between exchanges; see `Federation`.
        readmit: under privacy, True if a client that lost its folder may go on with a new ledger,
            for which the server, too, needs `Federation(readmit=True)`. The new ledger counts what
            the server says the lost one has charged, so a server that is not trusted to repeat it
            must not be allowed this.
    """
    place = None if folder is None else Path(folder)
    seats = ClientSessions(make, place, distinct=distinct, alive=alive, readmit=readmit)
    return app_of(seats)


def app_of(seats: ClientSessions) -> ClientApp:
    """Build the Flower app that answers messages with the learners of `seats`."""
    app = ClientApp()

    def answering(handler: Handler) -> Handler:
        @wraps(handler)
        def handle(message: Message, context: Context) -> Message:
            try:
                return handler(message, context)
            except Exception as error:
                return error_reply(message, error, private=seats.private)
            finally:
                # the folder is free between exchanges, so another server may use it
                seats.close()

        return handle

    @app.query("partition")
    @answering
    def partition(message: Message, context: Context) -> Message:
        require_site(message.content.get("site"))
        facts = MetricRecord({"partition": _number(context)})
        if cast(ConfigRecord, message.content["task"])["sizes"]:
            facts["sizes"] = seats.declared_sizes(_number(context))
        return Message(RecordDict({"metrics": facts, "site": site()}), reply_to=message)

    @app.train()
    @answering
    def train(message: Message, context: Context) -> Message:
        task, seat, held = _opened(message, context, seats)
        learner = seat.learner
        if held:
            refuse_unplanned(learner, task)
            index, number = learner.position.experience, task["round"]
            block = learner.training.block(index, number, task["rounds"])
            if len(block):
                learner.train(block)
                learner.session.adopt_average()
        seats.put(_number(context), seat, task["exchange"])
        records = {"arrays": to_record(shared(learner.model))}
        if round_state := sent_every_round(learner.state):
            records["state"] = to_record(round_state)
        return _reply(message, learner, task, records, held=held)

    @app.train("finish")
    @answering
    def finish(message: Message, context: Context) -> Message:
        task, seat, held = _opened(message, context, seats)
        learner = seat.learner
        if held:
            learner.finish()
        seats.put(_number(context), seat, task["exchange"])
        records = {"state": to_record(sent(learner.state))}
        return _reply(message, learner, task, records, held=held)

    return app


def _opened(
    message: Message, context: Context, seats: ClientSessions
) -> tuple[dict[str, int], ClientSession, bool]:
    """Prepare a client for an exchange: load its own state, the server's message, and its records.

    Returns:
        Numbers of the exchange from the message, the client's session, and False if the client has
        no record of the experience, so that it takes part with weight 0.
    """
    sent_task = cast(ConfigRecord, message.content["task"])
    task = {name: int(cast(int, value)) for name, value in sent_task.items()}
    seat = seats.take(_number(context), task, message)
    own = seats.own_index(_number(context), task["experience"])
    learner = seat.learner
    refuse_privacy(learner, _number(context), asked=bool(task["private"]))
    require_known(learner.private_sum, message, learner.lost)
    # First of all, because until now the model has the parameters of the client's last exchange, or
    # of the client that used the memory last. Callbacks and rankings of records read the model.
    load_record(learner.model, cast(ArrayRecord, message.content["arrays"]))
    if own is None:
        return task, seat, False
    task["experience"] = own
    while learner.position.experience < task["experience"]:
        # The client did not train in this experience. The server asks it to consolidate only if
        # this needs the global model or other clients.
        learner.begin(learner.position.experience)
        learner.finish()
    learner.begin(task["experience"])
    if "state" in message.content:
        new = read_tensors(message, "state")
        combined = learner.state.replace(
            {name: value.to(learner.device) for name, value in new.items()}
        )
        learner.session.state = learner.strategy.derive(combined)
    return task, seat, True


def _reply(
    message: Message,
    learner: Learner,
    task: dict[str, int],
    records: Mapping[str, ArrayRecord],
    *,
    held: bool,
) -> Message:
    size = learner.training.declared_pool_size(task["experience"]) if held else 0
    # with its number, so that an answer to an earlier exchange is not taken for the present one
    exchange = ConfigRecord({EXCHANGE: task["exchange"]})
    answer: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {
        **records,
        "metrics": MetricRecord({"num-examples": size}),
        EXCHANGE: exchange,
    }
    if learner.private_sum is not None:
        answer[LEDGER] = reported(learner.private_sum, learner.lost)
    return Message(message_of(answer), reply_to=message)


def _plan_of(learner: Learner, stream: Stream) -> TrainingPlan:
    """Return the plan of a learner that is not prepared yet."""
    return TrainingPlan(
        stream=stream,
        strategy=learner.strategy,
        batch_size=learner.batch_size,
        epochs=learner.epochs,
        iterations=learner.iterations,
        blocks=learner.blocks,
        privacy=learner.privacy,
    )


def _number(context: Context) -> int:
    return int(cast(int, context.node_config["partition-id"]))
