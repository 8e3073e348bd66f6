"""Clients of one process, whose parameters use the same memory, do not change each other."""

from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from torch import nn

from helpers.federations import SIMULATED, maker, short
from perdure.contract import MemoryPlan, Plan
from perdure.data.client_splits import dirichlet
from perdure.errors import FederationError
from perdure.federated import Federation, client_app, run_federation
from perdure.federated.client_store import FRESH
from perdure.federated.flower_adapter import InProcessGrid
from perdure.federated.held_arrays import copied
from perdure.federated.messages import shared, to_record
from perdure.strategies import EWC, GDumb, Naive


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


def numbers(model):
    return {n: value.detach().numpy().tobytes() for n, value in model.state_dict().items()}


def numbers_of(record):
    return {name: record[name].numpy().tobytes() for name in record}


@dataclass(frozen=True, kw_only=True)
class Herded(Naive):
    """Train on a memory whose records are ranked by the model when an experience opens."""

    def plan(self, experience):
        return Plan(pool="memory", memory=MemoryPlan(capacity=12, selection="herding"))


@pytest.mark.parametrize(
    "strategy",
    [Naive(), Herded(), GDumb(memory_size=12), EWC(strength=1.0)],
    ids=["Naive", "Herded", "GDumb", "EWC"],
)
def test_parameters_at_every_point_are_those_of_a_lone_client(stream, strategy):
    streams = dirichlet(short(stream, 2), clients=3, alpha=5.0, min_size=8, exact=False)
    seen = []
    make = maker(
        stream,
        strategy,
        iterations=4,
        blocks=2,
        callbacks=[lambda at, learner: seen.append((learner.client, at, numbers(learner.model)))],
    )
    received, began, sent = [], [], []

    def listen(message):
        to = message.metadata.dst_node_id
        if to and message.metadata.message_type != "query.partition":
            began.append(len(seen))
            received.append((to - 1, message.metadata.message_type, copied(message.content)))
        elif "arrays" in message.content:
            sent.append((message.metadata.src_node_id - 1, numbers_of(message.content["arrays"])))

    # client 0 is first asked in the last round, so it catches up on the first experience
    federation = Federation(clients=3, rounds=2, fraction=0.5, seed=10)
    assert [federation.cohort(i // 2, i % 2) for i in range(4)] == [[1, 2], [1, 2], [1, 2], [0, 1]]
    run_federation(make, streams, federation, listen=listen)
    for (client, _, content), first in zip(received, began, strict=True):
        assert seen[first] == (client, "experience.begin", numbers_of(content["arrays"]))
    together = seen.copy()
    for client in range(3):
        seen.clear()
        app = client_app(lambda number: (make(number), streams[number]))
        with InProcessGrid(app, 3).running() as grid:
            mine = [each for each in received if each[0] == client]
            messages = [Message(content, client + 1, kind) for _, kind, content in mine]
            replies = [each.content for each in grid.send_and_receive(messages)]
        assert seen == [each for each in together if each[0] == client]
        arrays = [numbers_of(each["arrays"]) for each in replies if "arrays" in each]
        assert arrays == [each for number, each in sent if number == client]


@pytest.mark.parametrize("stops", [False, True], ids=["finished", "stopped"])
def test_learners_have_the_global_parameters_after_a_run(streams, stream, stops):
    learners, last = {}, []

    def stop(point, server):
        last[:] = [server]
        if stops and point == "round.received":
            raise FederationError("stop")

    def make(number):
        learners[number] = maker(stream, Naive(), iterations=2, blocks=1)(number)
        return learners[number]

    try:
        run_federation(make, streams, Federation(clients=3, rounds=1), callbacks=[stop])
    except FederationError:
        assert stops
    models = [learners[number].model for number in range(3)]
    expected = numbers(last[0].learner.model)
    assert [numbers(model) for model in models] == [expected] * 3
    with torch.no_grad():
        for value in models[0].parameters():
            value.fill_(7.0)
    assert [numbers(model) for model in models[1:]] == [expected] * 2


class Phased(nn.Module):
    """Classifier with complex weights, and with a parameter that no message contains."""

    def __init__(self, size):
        super().__init__()
        self.phases = nn.Parameter(torch.randn(size, 6, dtype=torch.complex64) / size)
        self.count = nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False)
        self.head = nn.Linear(6, 10)

    def features(self, x):
        return (x.flatten(1).to(self.phases.dtype) @ self.phases).abs()

    def forward(self, x):
        return self.head(self.features(x))


def test_complex_parameters_are_averaged_and_whole_numbers_kept(streams, stream):
    torch.manual_seed(0)
    first = Phased(stream[0].train.inputs[0].numel())
    start = numbers(first)
    learners, replies = {}, {}

    def make(number):
        learners[number] = maker(
            stream, Naive(), model=deepcopy(first), iterations=2, blocks=1, callbacks=[count]
        )(number)
        return learners[number]

    def count(point, learner):
        if point == "block.end":
            learner.model.count.data += 1 + learner.client

    def listen(message):
        if "arrays" in message.content and message.metadata.dst_node_id == 0:
            replies[message.metadata.src_node_id] = numbers_of(message.content["arrays"])["phases"]

    server = run_federation(make, streams, Federation(clients=3, rounds=1), listen=listen)
    assert len({*replies.values(), start["phases"]}) == 4
    phases = server.learner.model.phases
    assert numbers(server.learner.model)["phases"] != start["phases"]
    assert all(torch.equal(each.model.phases, phases) for each in learners.values())
    assert [int(learners[number].model.count) for number in range(3)] == [1, 2, 3]
