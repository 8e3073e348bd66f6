"""Whole runs of a federation in this process or on Ray: one call from streams to the result."""

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from perdure.data.experience import Stream
from perdure.data.record_identity import refuse_records_in_two_partitions
from perdure.data.value_checks import check_streams
from perdure.errors import ConfigError
from perdure.federated.client import ClientSessions, app_of
from perdure.federated.client_streams import participation, union, without_gaps
from perdure.federated.flower_adapter import InProcessGrid, Listen, MessageProgress, simulate
from perdure.federated.messages import shared
from perdure.federated.party_checks import party_of, refuse_parties
from perdure.federated.progress import shown_exchanges
from perdure.federated.server import Server, ServerCallback, server_app
from perdure.federated.settings import Federation
from perdure.learner.arguments import check_stream
from perdure.learner.learner import Learner

Engine = Literal["inprocess", "ray"]
"""Carriers of the messages of a federation on one machine."""


def run_federation(
    make_learner: Callable[[int], Learner],
    streams: Sequence[Stream],
    federation: Federation,
    *,
    folder: Path | str | None = None,
    callbacks: Sequence[ServerCallback] = (),
    engine: Engine = "inprocess",
    progress: MessageProgress | None = None,
    show_progress: bool | None = None,
    listen: Listen | None = None,
) -> Server:
    """Train one model on the streams of all clients, and return the server with the model.

    With a folder, a stopped run continues and gives the bit-identical result. Afterwards the
    learners of clients in this process without privacy have the global parameters.

    Args:
        make_learner: function from a client's number to a new learner; all learners must be equal,
            except for effects of the number.
        streams: one stream per client, with the same experiences (see
            `perdure.data.client_splits`). A client is not asked for an experience with a declared
            size of 0, nor for those behind the end of a shorter stream.
        federation: clients, rounds, aggregator.
        folder: folder of the run; None for a run without checkpoints.
        callbacks: called as callback(point, server).
        engine: `inprocess`, or `ray` for Flower's simulation engine.
        progress: called as progress(replies, expected); only with `inprocess`.
        show_progress: None for a bar in a terminal; True also for lines elsewhere; False for none.
        listen: called with every message and every reply; only with `inprocess`, for audits.

    Raises:
        ConfigError: if streams do not fit the federation, a learner has its own folder, two clients
            have the same owner, or there is no folder although `ray` or secret noise needs one.
        FederationError: if some clients have privacy and others do not.
        DataError: before a private run, if training inputs are NaN or infinite.
        GuardError: before a private run, if two clients or partitions hold the same record.
        FederationError, PrivacyError, RunError: see `Server.serve`.
    """
    folder = None if folder is None else Path(folder)
    _check(streams, federation, engine, folder)
    learner = make_learner(0)
    others = (make_learner(client) for client in range(1, federation.clients))
    refuse_parties([party_of(each, i) for i, each in enumerate(chain([learner], others))], folder)
    if learner.privacy and federation.alive is not None and folder is None:
        allowed = "None without a folder, because each client's ledger is in its folder"
        raise ConfigError.of("federation.alive with privacy", federation.alive, allowed)
    # checked here, in the process of the records, because a client's error goes to the server
    own = [without_gaps(stream, client) for client, stream in enumerate(streams)]
    if learner.privacy:
        refuse_records_in_two_partitions(own)
    check_streams(own, training=bool(learner.privacy))
    seats = ClientSessions(
        lambda n: (make_learner(n), streams[n]),
        folder,
        distinct=True,
        alive=federation.alive,
        readmit=federation.readmit,
        participation=participation(federation, streams) if learner.privacy else None,
    )
    client = app_of(seats)
    server = Server(
        learner=learner,
        stream=union(streams),
        federation=federation,
        folder=folder,
        callbacks=callbacks,
        sizes=[[each.train.declared_size for each in stream] for stream in streams],
        tests=[[each.test for each in stream] for stream in streams],
    )
    with shown_exchanges(server, show_progress, progress) as replied:
        if engine == "ray":
            simulate(server_app(server), client, federation.clients)
            return server
        try:
            with InProcessGrid(client, federation.clients, replied, listen).running() as grid:
                server.serve(grid)
        finally:
            seats.part(shared(server.learner.model))
    return server


def _check(
    streams: Sequence[Stream], federation: Federation, engine: str, folder: Path | None
) -> None:
    """Refuse streams and an engine that do not fit."""
    for stream in streams:
        check_stream(stream)
    if len(streams) != federation.clients:
        raise ConfigError.of(
            "streams", len(streams), f"one for each of {federation.clients} clients"
        )
    tasks = {stream.task: stream.task.name for stream in streams}
    if len(tasks) > 1:
        allowed = "the same task for all clients"
        raise ConfigError.of("tasks of the streams", list(tasks.values()), allowed)
    if engine not in get_args(Engine):
        raise ConfigError.of("engine", engine, get_args(Engine))
    if engine == "ray" and folder is None:
        raise ConfigError.of(
            "folder",
            None,
            "a folder for the clients' state, because the processes of Ray share no memory",
        )


def fit_federated(
    make_learner: Callable[[int], Learner],
    streams: Sequence[Stream],
    federation: Federation,
    *,
    folder: Path | str | None = None,
    callbacks: Sequence[ServerCallback] = (),
    engine: Engine = "inprocess",
    progress: MessageProgress | None = None,
    show_progress: bool | None = None,
) -> Tensor:
    """Run a federation and return the accuracy matrix.

    `run_federation` returns the whole server, and describes the errors.

    Args:
        make_learner: function from a client's number to a new learner.
        streams: one stream per client, with the same experiences.
        federation: clients, rounds, aggregator.
        folder: folder of the run; None for a run without checkpoints.
        callbacks: called as callback(point, server).
        engine: `inprocess`, or `ray` for Flower's simulation engine.
        progress: called as progress(replies, expected); only with `inprocess`.
        show_progress: None for a bar in a terminal; True also for lines elsewhere; False for none.

    Returns:
        (T, T) float64, accuracy in percent on the stage of the column after the stage of the row;
        see `Learner.fit`.
    """
    server = run_federation(
        make_learner,
        streams,
        federation,
        folder=folder,
        callbacks=callbacks,
        engine=engine,
        progress=progress,
        show_progress=show_progress,
    )
    return torch.tensor(server.learner.matrix, dtype=torch.float64)
