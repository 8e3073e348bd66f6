"""Collection of the replies to the messages of one exchange, with a deadline."""

import time
from collections.abc import Sequence

from flwr.app import Message
from flwr.serverapp import Grid

SHORTEST = 0.02
LONGEST = 1.0
"""Shortest and longest pause between two looks for replies, in seconds."""


def collect(
    grid: Grid,
    messages: Sequence[Message],
    *,
    deadline: float | None = None,
    grace: float = 0.0,
    least: int = 0,
) -> dict[int, Message]:
    """Send messages, and return the replies by the node that was asked.

    A reply belongs to the node whose message it answers: the engine, and not the reply, tells which
    one this is. Replies that come later are never pulled.

    Args:
        grid: engine that carries the messages.
        messages: one message per node.
        deadline: seconds to wait for replies; None to wait for all of them.
        grace: further seconds to wait while there are fewer than `least` replies.
        least: number of replies without errors that ends the grace.
    """
    names = list(grid.push_messages(messages))
    waiting = {
        name: message.metadata.dst_node_id
        for name, message in zip(names, messages, strict=False)
        if name
    }
    replies: dict[int, Message] = {}
    start = time.monotonic()
    pause = SHORTEST
    while waiting:
        for reply in grid.pull_messages(list(waiting)):
            node = waiting.pop(reply.metadata.reply_to_message_id, None)
            if node is not None:
                replies[node] = reply
        passed = time.monotonic() - start
        enough = sum(not reply.has_error() for reply in replies.values()) >= least
        if deadline is not None and passed > deadline + (0 if enough else grace):
            break
        if waiting:
            time.sleep(pause)
            pause = min(LONGEST, 1.5 * pause)
    return replies
