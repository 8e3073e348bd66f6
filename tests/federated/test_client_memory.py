"""Clients of one process, whose parameters use the same memory, do not change each other."""

from functools import partial

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from helpers.federations import SIMULATED, maker, short
from perdure.data.client_splits import dirichlet
from perdure.federated import Federation, client_app, run_federation
from perdure.federated.client_store import FRESH
from perdure.federated.flower_adapter import InProcessGrid
from perdure.federated.messages import shared, to_record
from perdure.strategies import EWC, Naive


@pytest.fixture(scope="module")
def streams(stream):
    return dirichlet(short(stream, 1), clients=3, alpha=5.0, min_size=30, exact=False)


def test_replies_keep_their_numbers_after_later_rounds(streams, stream):
    replies = []

    def listen(message):
        if not message.has_error() and "arrays" in message.content:
            record = message.content["arrays"]
            replies.append((record, {name: record[name].numpy().tobytes() for name in record}))

    make = maker(stream, Naive(), iterations=6)
    run_federation(make, streams, Federation(clients=3, rounds=3), listen=listen)
    assert len({values["head.weight"] for _, values in replies}) > 9
    for record, values in replies:
        assert {name: record[name].numpy().tobytes() for name in record} == values


def visits(app, make, plan):
    """Ask clients for rounds of their own, from the initial model; return arrays or errors.

    Args:
        app: app of the clients.
        make: function from a client's number to its learner.
        plan: pairs of a client and the number of its round.
    """
    found = []
    with InProcessGrid(app, 3).running() as grid:
        for client, number in plan:
            task = ConfigRecord(
                {"experience": 0, "round": number, "rounds": 3, "exchange": number}
                | {"previous": number - 1 if number else FRESH, "private": 0}
            )
            content = RecordDict({"arrays": to_record(shared(make(0).model)), "task": task})
            (reply,) = grid.send_and_receive([Message(content, client + 1, "train")])
            arrays = {} if reply.has_error() else reply.content["arrays"]
            found.append((client, {name: arrays[name].numpy().tobytes() for name in arrays}))
    return found


@pytest.mark.parametrize("strategy", [Naive(), EWC(strength=1.0)], ids=["Naive", "EWC"])
def test_clients_of_one_process_do_not_change_each_other(streams, stream, strategy):
    make = maker(stream, strategy, optimizer=partial(torch.optim.Adam, lr=1e-2))
    app = partial(client_app, lambda number: (make(number), streams[number]))
    plan = [(client, number) for number in range(3) for client in range(3)]
    together = visits(app(), make, plan)
    alone = [visits(app(), make, [each for each in plan if each[0] == c]) for c in range(3)]
    assert len({values["head.weight"] for _, values in together}) == 9
    assert together == [alone[client][number] for client, number in plan]


def test_a_failed_client_leaves_nothing_to_the_next(streams, stream):
    def spoil(point, learner):
        if point == "step.gradient" and learner.client == 1 and learner.position.step == 1:
            with torch.no_grad():
                for value in learner.model.parameters():
                    value.fill_(float("nan"))
            raise ValueError("stop")

    plain = maker(stream, Naive())
    spoilt = maker(stream, Naive(), callbacks=[spoil])
    good = visits(client_app(lambda n: (plain(n), streams[n])), plain, [(0, 0), (2, 0), (0, 1)])
    bad = visits(
        client_app(lambda n: (spoilt(n), streams[n])), plain, [(0, 0), (1, 0), (2, 0), (0, 1)]
    )
    assert bad[1] == (1, {})
    assert [bad[0], *bad[2:]] == good


@pytest.mark.parametrize("privacy", [None, SIMULATED], ids=["plain", "private"])
def test_only_clients_without_privacy_share_memory(streams, stream, privacy):
    learners = []

    def make(number):
        learners.append(maker(stream, Naive(), iterations=2, blocks=1, privacy=privacy)(number))
        return learners[-1], streams[number]

    app = client_app(make)
    with InProcessGrid(app, 3).running() as grid:
        task = ConfigRecord(
            {"experience": 0, "round": 0, "rounds": 1, "exchange": 0, "previous": FRESH}
            | {"private": int(privacy is not None)}
        )
        arrays = to_record(shared(make(0)[0].model))
        contents = [RecordDict({"arrays": arrays, "task": task}) for _ in range(2)]
        replies = grid.send_and_receive(
            [Message(content, node, "train") for node, content in enumerate(contents, 1)]
        )
    assert not [reply.error for reply in replies if reply.has_error()]
    places = {next(each.model.parameters()).data_ptr() for each in learners[1:]}
    assert len(places) == (1 if privacy is None else 2)
