"""A client whose process is stopped in a round, and started again, in a run without a deadline."""

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict

from helpers.federations import maker, outcome
from perdure.data import digits, iid, split
from perdure.federated import Federation, InProcessGrid, Server, client_app
from perdure.federated.collection import collect
from perdure.federated.roster import site
from perdure.strategies import Replay

NODE_UNAVAILABLE = 5
"""Flower's code for a node that is no longer connected."""
STOPPED = 2
"""Node that is stopped."""


class StoppingGrid(InProcessGrid):
    """Grid whose node leaves with its message, and comes back after some looks for it.

    Args:
        app: app of the clients.
        number: number of the node's message at which it leaves, from 0.
        looks: number of looks for connected nodes in which the node is away; None for ever.
        trained: True if the node has trained and saved its state, and only the reply is lost.
    """

    def __init__(self, app, *, number, looks, trained):
        super().__init__(app, 3)
        self._number, self._looks, self._trained = number, looks, trained
        self.seen = 0
        self._away = False
        self._gone = {}

    def get_node_ids(self):
        nodes = set(super().get_node_ids())
        if not self._away:
            return nodes
        if self._looks is not None:
            self._looks -= 1
            self._away = self._looks > 0
        return nodes - {STOPPED}

    def push_messages(self, messages):
        names = []
        for message in messages:
            mine = message.metadata.dst_node_id == STOPPED
            leaves = mine and self.seen == self._number
            self.seen += mine
            app = self._app
            if leaves and not self._trained:
                self._app = None  # the message is lost before the client begins
            names += super().push_messages([message])
            self._app = app
            if leaves:
                self._away = True
                error = Error(NODE_UNAVAILABLE, "the node is not connected")
                self._replies[names[-1]] = Message(error, reply_to=message)
        return names


@pytest.fixture(scope="module")
def stream():
    return split(digits(), scenario="class", experiences=2)


def serve(stream, folder, grid=None, **settings):
    """Run a federation of three clients on a grid, and return its server."""
    streams = iid(stream, clients=3, seed=0)
    make = maker(stream, Replay(memory_size=20))
    app = client_app(lambda k: (make(k), streams[k]), folder)
    federation = Federation(clients=3, rounds=2, quorum=1.0, **settings)
    server = Server(learner=make(0), stream=streams[0], federation=federation, folder=folder)
    with (grid(app) if grid else InProcessGrid(app, 3)).running() as running:
        server.serve(running)
    return server


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("number", [1, 3])
def test_a_client_that_comes_back_is_asked_again(stream, tmp_path, number, trained):
    whole = serve(stream, tmp_path / "whole")

    def grid(app):
        return StoppingGrid(app, number=number, looks=4, trained=trained)

    again = serve(stream, tmp_path / "again", grid)
    assert outcome(again.learner) == outcome(whole.learner)
    assert again.absences == []


@pytest.mark.parametrize(("looks", "deadline"), [(None, None), (3, 5.0)])
def test_a_client_that_stays_away_ends_the_wait(stream, looks, deadline):
    """With a deadline, a client that has left is not waited for at all."""
    make = maker(stream, Replay(memory_size=20))
    app = client_app(lambda k: (make(k), stream))
    with StoppingGrid(app, number=0, looks=looks, trained=False).running() as grid:
        content = RecordDict({"task": ConfigRecord({"sizes": 1}), "site": site()})
        asked = [Message(content, node, "query.partition") for node in (1, 2, 3)]
        replies = collect(grid, asked, deadline=deadline, patience=0.3)
    assert grid.seen == 1, "the message was pushed once"
    assert {node: reply.has_error() for node, reply in replies.items()} == {
        1: False,
        2: True,
        3: False,
    }
