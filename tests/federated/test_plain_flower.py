"""Apps of plain Flower under a server of a federation."""

import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from helpers.federations import maker, short
from perdure.errors import FederationError
from perdure.federated import Federation, InProcessGrid, Server
from perdure.strategies import Naive


def test_a_plain_flower_app_is_refused_at_the_first_message(stream):
    app = ClientApp()
    trained = []

    @app.train()
    def train(message, context):
        trained.append(message)
        content = {
            "arrays": message.content["arrays"],
            "metrics": MetricRecord({"num-examples": 8}),
        }
        return Message(RecordDict(content), reply_to=message)

    server = Server(
        learner=maker(stream, Naive())(0),
        stream=short(stream, 1),
        federation=Federation(clients=2, rounds=1),
    )
    allowed = r"node 1: its app does not answer query.partition; .*perdure.federated.client_app"
    with InProcessGrid(app, 2).running() as grid, pytest.raises(FederationError, match=allowed):
        server.serve(grid)
    assert trained == []
