"""Collection of the replies to the messages of one exchange, with a deadline."""

import logging
import time
from collections.abc import Callable, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from perdure.federated.flower_adapter import UNREACHABLE

SHORTEST = 0.02
LONGEST = 1.0
"""Shortest and longest pause between two looks for replies, in seconds."""
RETURN = 120.0
"""Seconds in which a node that has left may come back to an exchange without a deadline."""
log = logging.getLogger(__name__)


def collect(
    grid: Grid,
    messages: Sequence[Message],
    *,
    deadline: float | None = None,
    grace: float = 0.0,
    least: int = 0,
    patience: float = RETURN,
    arrived: Callable[[int], None] | None = None,
    repeated: Callable[[Sequence[int]], None] | None = None,
) -> dict[int, Message]:
    """Send messages, and return the replies by the node that was asked.

    A reply belongs to the node whose message it answers: the engine, and not the reply, tells which
    one this is. Replies that come later are never pulled. Without a deadline, a node that leaves
    and comes back gets its message once more, because a process that is started again does not have
    it.

    Args:
        grid: engine that carries the messages.
        messages: one message per node.
        deadline: seconds to wait for replies; None to wait for all of them.
        grace: further seconds to wait while there are fewer than `least` replies.
        least: number of replies without errors that ends the grace.
        patience: seconds to wait for a node that has left; only without a deadline.
        arrived: called with the node of each reply when it arrives.
        repeated: called with the nodes that get their message once more, before it is sent.
    """
    waiting = _pushed(grid, messages)
    # a message cannot be pushed twice, so its parts are kept
    parts = {
        each.metadata.dst_node_id: (each.content, each.metadata.message_type) for each in messages
    }
    replies: dict[int, Message] = {}
    away = _Away(grid, patience if deadline is None else 0.0)
    start = time.monotonic()
    pause = SHORTEST
    while waiting or away:
        for reply in grid.pull_messages(list(waiting)) if waiting else ():
            node = waiting.pop(reply.metadata.reply_to_message_id, None)
            if node is not None:
                replies[node] = reply
                if arrived is not None:
                    arrived(node)
                away.note(node, reply)
        back = away.back()
        if back and repeated is not None:
            repeated(back)
        waiting |= _pushed(grid, [Message(parts[n][0], n, parts[n][1]) for n in back])
        replies = {node: reply for node, reply in replies.items() if node not in back}
        passed = time.monotonic() - start
        enough = sum(not reply.has_error() for reply in replies.values()) >= least
        if deadline is not None and passed > deadline + (0 if enough else grace):
            break
        if waiting or away:
            time.sleep(pause)
            pause = min(LONGEST, 1.5 * pause)
    return replies


def _pushed(grid: Grid, messages: Sequence[Message]) -> dict[str, int]:
    """Push messages, and return the node of each by the identifier of its message."""
    names = list(grid.push_messages(messages)) if messages else []
    return {
        name: message.metadata.dst_node_id
        for name, message in zip(names, messages, strict=False)
        if name
    }


class _Away:
    """Nodes that left while they had a message, and may come back.

    Args:
        grid: engine that tells which nodes are connected.
        patience: seconds to wait for each of them.
    """

    def __init__(self, grid: Grid, patience: float) -> None:
        self._grid = grid
        self._patience = patience
        self._until: dict[int, float] = {}

    def __bool__(self) -> bool:
        return bool(self._until)

    def note(self, node: int, reply: Message) -> None:
        """Note a node if its reply says that it has left, and it is not connected now."""
        left = reply.has_error() and reply.error.code in UNREACHABLE
        if left and self._patience and node not in set(self._grid.get_node_ids()):
            self._until[node] = time.monotonic() + self._patience
            log.warning("node %d has left; waiting up to %g seconds for it", node, self._patience)

    def back(self) -> list[int]:
        """Return the nodes that are connected again, and forget those that stayed away."""
        if not self._until:
            return []
        connected = set(self._grid.get_node_ids())
        back = [node for node in self._until if node in connected]
        now = time.monotonic()
        self._until = {
            node: end for node, end in self._until.items() if node not in back and end > now
        }
        return back
