"""Client apps that answer honestly, and whose chosen replies are then spoilt."""

from perdure.federated import Server, client_app
from perdure.federated.flower_adapter import InProcessGrid, error_reply


def spoilt_app(app, spoils, client=1):
    """Return an app whose client `client` changes its replies, on a grid of one process.

    Args:
        app: honest app of all clients.
        spoils: called with an honest reply and its request; returns the reply that is sent.
        client: number of the hostile client.
    """

    def answer(message, context):
        reply = app(message, context)
        if context.node_config["partition-id"] != client or reply.has_error():
            return reply
        return spoils(reply, message)

    return answer


def without(reply, message):
    """Answer with an error, as a client that has failed."""
    return error_reply(message, RuntimeError("gone"))


def serve(make, streams, federation, spoils, *, folder=None, client=1):
    """Run a federation with a hostile client, and return its server."""
    app = client_app(lambda number: (make(number), streams[number]), folder)
    server = Server(
        learner=make(0),
        stream=streams[0],
        federation=federation,
        folder=folder,
        sizes=[[each.train.declared_size for each in own] for own in streams],
    )
    with InProcessGrid(spoilt_app(app, spoils, client), len(streams)).running() as grid:
        server.serve(grid)
    return server
