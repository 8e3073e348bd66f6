"""Clients with gaps, that join late or leave, are asked for the experiences that they hold."""

from dataclasses import replace

import pytest
import torch

from helpers.federations import SIMULATED, maker, outcome, short
from perdure.data import iid
from perdure.errors import DataError
from perdure.federated import Federation, Server, client_app, run_federation
from perdure.federated.client_streams import held_experiences, union, without_gaps
from perdure.federated.flower_adapter import InProcessGrid
from perdure.federated.roster import Roster
from perdure.strategies import EWC, Combine, Replay

FEDERATION = Federation(clients=3, rounds=1)


def gap(stream, *indices):
    """Return the stream with no records in some experiences."""
    parts = list(stream.experiences)
    for index in indices:
        none = parts[index].train.take(torch.empty(0, dtype=torch.int64))
        parts[index] = replace(parts[index], train=replace(none, declared_size=0))
    return replace(stream, experiences=tuple(parts))


@pytest.fixture(scope="module")
def parties(stream):
    """Streams of a client that stays, of one that leaves, and of one that joins late."""
    first, second, third = iid(short(stream, 3), clients=3, min_size=8, exact=False)
    return [first, replace(second, experiences=second.experiences[:2]), gap(third, 0)]


def asked(make, streams, **options):
    heard = []

    def listen(message):
        task = message.content.get("task", {}) if not message.has_error() else {}
        if "experience" in task:
            kind = message.metadata.message_type
            heard.append((kind, task["experience"], message.metadata.dst_node_id - 1))

    return run_federation(make, streams, FEDERATION, listen=listen, **options), heard


@pytest.mark.parametrize("privacy", [None, SIMULATED], ids=["plain", "private"])
def test_clients_are_asked_for_the_experiences_they_hold(stream, parties, privacy):
    strategy = Combine(EWC(strength=1.0), Replay(memory_size=20))
    make = maker(stream, strategy, iterations=1, blocks=1, privacy=privacy)
    server, heard = asked(make, parties)
    holders = {0: {0, 1}, 1: {0, 1, 2}, 2: {0, 2}}
    for kind in ("train", "train.finish"):
        for experience, clients in holders.items():
            assert {c for k, e, c in heard if (k, e) == (kind, experience)} == clients
    assert server.absences == []
    assert len(server.learner.matrix) == 3


def test_a_server_that_asks_for_sizes_gives_the_same_result(stream, parties):
    make = maker(stream, EWC(strength=1.0), iterations=1, blocks=1)
    known, _ = asked(make, parties)
    server = Server(learner=make(0), stream=union(parties), federation=FEDERATION)
    app = client_app(lambda number: (make(number), parties[number]))
    with InProcessGrid(app, 3).running() as grid:
        server.serve(grid)
    assert outcome(server.learner) == outcome(known.learner)


@pytest.mark.parametrize("sizes", [[-5, 10], [2.5, 10.0]])
def test_negative_or_fractional_sizes_leave_a_node_out(stream, parties, sizes):
    make = maker(stream, EWC(strength=1.0))
    honest = client_app(lambda number: (make(number), parties[number]))

    def app(message, context):
        reply = honest(message, context)
        reply.content["metrics"]["sizes"] = sizes
        return reply

    roster = Roster(1, None)
    with InProcessGrid(app, 1).running() as grid:
        roster.refresh(grid)
    assert (roster.nodes, roster.sizes) == ({}, {})
    (refusal,) = roster.refused.values()
    assert "allowed: whole numbers from 0" in str(refusal)


def test_the_union_has_every_experience_of_a_holder(parties):
    assert [held_experiences(each) for each in parties] == [[0, 1, 2], [0, 1], [1, 2]]
    late = without_gaps(parties[2], 2)
    assert [each.index for each in late] == [0, 1]
    assert late[0].train is parties[2][1].train
    assert without_gaps(parties[0], 0) is parties[0]
    whole = union([parties[2], parties[1]])
    assert [each.train.declared_size > 0 for each in whole] == [True] * 3
    assert whole[0] is parties[1][0]


def test_a_client_without_any_records_is_refused(stream, parties):
    nothing = gap(parties[0], *range(len(parties[0])))
    with pytest.raises(DataError, match=r"client 1 has no training records.* leave its stream out"):
        run_federation(
            maker(stream, Replay(memory_size=20)), [parties[0], nothing, *parties[2:]], FEDERATION
        )


def empty(stream, *indices):
    """Return the stream with declared records in some experiences, of which none is there."""
    parts = list(stream.experiences)
    for index in indices:
        train = parts[index].train
        none = train.take(torch.empty(0, dtype=torch.int64))
        declared = replace(none, declared_size=train.declared_size)
        parts[index] = replace(parts[index], train=declared)
    return replace(stream, experiences=tuple(parts))


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("folder", [False, True], ids=["in memory", "on disk"])
def test_a_client_without_its_declared_records_has_weight_0(stream, tmp_path, index, folder):
    """It keeps its memory and its state, and the result is that of a run in which it is absent."""
    strategy = Combine(EWC(strength=1.0), Replay(memory_size=20))
    make = maker(stream, strategy, iterations=2, blocks=1)
    streams = iid(short(stream, 3), clients=3, min_size=8, exact=False)
    federation = replace(FEDERATION, rounds=2)

    def run(own, name):
        streams_of_run = [*streams[:2], own]
        return run_federation(
            make, streams_of_run, federation, folder=tmp_path / name if folder else None
        )

    declared = run(empty(streams[2], index), "declared")
    gap_told = run(gap(streams[2], index), "gap")
    assert declared.absences == gap_told.absences == []
    assert outcome(declared.learner) == outcome(gap_told.learner)


def test_a_private_client_hides_that_it_has_no_records(stream):
    """Its reply must not show that it has none."""
    make = maker(stream, Replay(memory_size=20), iterations=2, blocks=1, privacy=SIMULATED)
    streams = iid(short(stream, 3), clients=3, min_size=8, exact=False)
    sizes = []

    def listen(message):
        if message.has_content() and "metrics" in message.content:
            sizes.append(message.content["metrics"].get("num-examples"))

    streams[2] = empty(streams[2], 1)
    server = run_federation(make, streams, FEDERATION, listen=listen)
    assert server.absences == []
    assert all(size for size in sizes if size is not None)
