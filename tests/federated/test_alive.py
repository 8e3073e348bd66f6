"""Federations that keep few learners in memory, on disk or without a folder."""

import gc
import weakref
from dataclasses import replace

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from helpers.federations import SIMULATED, hard, maker, outcome, short
from perdure.data.client_splits import dirichlet
from perdure.doctor import Monitor
from perdure.errors import ConfigError
from perdure.federated import Federation, client_app, run_federation
from perdure.federated.client_store import FRESH
from perdure.federated.flower_adapter import InProcessGrid
from perdure.federated.messages import shared, to_record
from perdure.strategies import DER, EWC, Combine, Naive, Replay

STRATEGIES = {
    "naive": Naive(),
    "ewc and replay": Combine(EWC(strength=1.0), Replay(memory_size=20)),
    "der": DER(memory_size=20),
}


def trained(stream, strategy, folder, **changes):
    """Train, and return the outcome, and the largest number of models in memory at a time."""
    streams, federation = hard(stream)
    make = maker(stream, strategy)
    learners = []
    most = []

    def made(number):
        learner = make(number)
        learners.append(weakref.ref(learner.model))
        return learner

    def count(point, server):
        if point == "round.received":
            most.append(sum(each() is not None for each in learners))

    federation = replace(federation, **changes)
    gc.collect()
    gc.disable()  # its passes may come late, and nothing may wait for them
    try:
        server = run_federation(made, streams, federation, folder=folder, callbacks=[count])
    finally:
        gc.enable()
    return outcome(server.learner), max(most)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("on_disk", [True, False], ids=["on disk", "rebuilt"])
def test_few_learners_in_memory_give_the_same_bits(stream, tmp_path, name, on_disk):
    strategy = STRATEGIES[name]
    folder = tmp_path / "few" if on_disk else None
    wanted, _ = trained(stream, strategy, tmp_path / "all" if on_disk else None)
    found, most = trained(stream, strategy, folder, alive=1)
    assert found == wanted
    assert most <= 3  # the first, whose memory others use, the last, and the server's


def test_the_monitor_outlives_the_learners_that_it_watched(stream):
    streams, federation = hard(stream)
    monitor = Monitor()
    make = maker(stream, EWC(strength=1.0), callbacks=[monitor])
    few = replace(federation, alive=1)
    server = run_federation(make, streams, few, callbacks=[monitor.server])
    wanted = run_federation(maker(stream, EWC(strength=1.0)), streams, federation)
    assert outcome(server.learner) == outcome(wanted.learner)
    assert not server.absences
    assert isinstance(monitor.findings, list)


def test_private_clients_on_disk_give_the_same_bits(stream, tmp_path):
    streams, federation = hard(stream)
    make = maker(stream, Naive(), privacy=SIMULATED)
    found = [
        outcome(
            run_federation(
                make, streams, replace(federation, alive=alive), folder=tmp_path / str(alive)
            ).learner
        )
        for alive in (None, 1)
    ]
    assert found[0] == found[1]


def test_private_clients_without_a_folder_are_refused(stream):
    streams, federation = hard(stream)
    make = maker(stream, Naive(), privacy=SIMULATED)
    with pytest.raises(ConfigError, match=r"federation\.alive with privacy = 2"):
        run_federation(make, streams, replace(federation, alive=2))


@pytest.mark.parametrize("alive", [0, -1, 1.5])
def test_a_wrong_number_of_learners_is_refused(alive):
    with pytest.raises(ConfigError, match=r"federation\.alive"):
        Federation(clients=2, rounds=1, alive=alive)


def rounds(stream, plan, alive):
    """Ask client 0 for rounds after the exchanges of the plan; return its replies."""
    streams = dirichlet(short(stream, 1), clients=2, alpha=5.0, min_size=30, exact=False)
    make = maker(stream, Naive())
    arrays = to_record(shared(make(0).model))
    found = []
    app = client_app(lambda number: (make(number), streams[number]), alive=alive)
    with InProcessGrid(app, 2).running() as grid:
        for number, (node, previous) in enumerate(plan):
            task = ConfigRecord(
                {"experience": 0, "round": number, "rounds": 3, "exchange": number}
                | {"previous": previous, "private": 0}
            )
            content = RecordDict({"arrays": arrays, "task": task})
            (reply,) = grid.send_and_receive([Message(content, node, "train")])
            assert not reply.has_error(), reply.error
            record = reply.content["arrays"]
            found.append({name: record[name].numpy().tobytes() for name in record})
    return found


@pytest.mark.parametrize("alive", [None, 1])
def test_a_client_in_memory_goes_on_after_a_lost_reply(stream, alive):
    kept = rounds(stream, [(1, FRESH), (1, 0), (1, 1)], alive)
    lost = rounds(stream, [(1, FRESH), (1, 0), (1, 0)], alive)
    assert lost == kept  # the moments of its optimiser are those after the lost round
