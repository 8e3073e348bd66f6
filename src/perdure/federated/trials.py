"""Several trainings over one Flower app: every message names its training.

A run of perdure trains several arms one after another, but a deployment has one server app and one
client app. So the server adds the name of the training to each message, and the client app passes
the message to the app of this training.
"""

from collections.abc import Callable, Iterable
from typing import cast

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from perdure.errors import FederationError
from perdure.federated.flower_adapter import Cohort, error_reply

TRIAL = "trial"
"""Name of the record that holds the name of the training in a message."""


class TrialGrid(Cohort):
    """Grid of a deployment that adds the name of a training to every message.

    Args:
        grid: grid of all nodes.
        name: name of the training.
    """

    def __init__(self, grid: Grid, name: str) -> None:
        super().__init__(grid, [])
        self._name = name

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes that are connected now."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages with the name of the training."""
        return super().push_messages(list(map(self._named, messages)))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages with the name of the training, and return the replies."""
        return super().send_and_receive(list(map(self._named, messages)), timeout=timeout)

    def _named(self, message: Message) -> Message:
        message.content[TRIAL] = ConfigRecord({"name": self._name})
        return message


def app_of_trials(make: Callable[[str, Context], ClientApp]) -> ClientApp:
    """Build the client app of a deployment, which passes each message to the app of its training.

    Guarantee: the text of an error of `make` is sent only if it has no value of a record; see
    `client_app`.

    Args:
        make: function from the name of a training, and the context of the node, to the client app
            of this training. It is called once for each training and node in a process.
    """
    app = ClientApp()
    opened: dict[tuple[str, int], ClientApp] = {}

    def answer(message: Message, context: Context) -> Message:
        try:
            place = (_name_of(message), context.node_id)
            if place not in opened:
                opened[place] = make(place[0], context)
        except Exception as error:
            return error_reply(message, error, private=True)
        return opened[place](message, context)

    app.query("partition")(answer)
    app.train()(answer)
    app.train("finish")(answer)
    return app


def _name_of(message: Message) -> str:
    if TRIAL not in message.content:
        raise FederationError(
            "the message names no training; allowed: messages of a server app that "
            "perdure.deployment.server_app_of made"
        )
    return str(cast(ConfigRecord, message.content[TRIAL])["name"])
