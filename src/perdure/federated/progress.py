"""Progress of a federation: the share of its exchanges that is done, for a bar or lines."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from perdure.data.experience import Stream
from perdure.federated.flower_adapter import MessageProgress
from perdure.federated.settings import Federation
from perdure.learner.learner import Learner
from perdure.learner.progress import MOST, accuracy_text, experience_text, shown_progress


class Exchanging(Protocol):
    """Parts of a server from which its progress is read."""

    learner: Learner
    stream: Stream
    federation: Federation
    exchanges: int
    callbacks: Sequence[Callable[[str, Any], None]]

    @property
    def exchange(self) -> int:
        """Number of the next exchange, from 0."""

    @property
    def experience(self) -> int:
        """Index of the experience that the next exchange belongs to."""

    @property
    def round(self) -> int:
        """Number of the next exchange in its experience, from 0."""


class ExchangeWatch:
    """Callback of a server that reports how far the federation is, after every reply.

    Args:
        show: called as show(share done, state in words), with a rising share up to `MOST`.
    """

    def __init__(self, show: Callable[[float, str], None]) -> None:
        self._show = show
        self._shown = 0.0
        self._found = ""
        self._server: Exchanging | None = None

    def __call__(self, point: str, server: Exchanging) -> None:
        """Note the server, and the accuracies after an evaluation."""
        self._server = server
        if point in ("round.end", "experience.combined"):
            self._report(server, 1, 1)
        elif point == "evaluated":
            self._found = accuracy_text(server.learner)

    def replied(self, replies: int, expected: int) -> None:
        """Report the replies of the present exchange; see `perdure.federated.InProcessGrid`.

        Args:
            replies: number of replies so far.
            expected: number of clients that were asked.
        """
        if self._server is not None:
            self._report(self._server, replies, expected)

    def _report(self, server: Exchanging, replies: int, expected: int) -> None:
        share = (server.exchange + replies / expected) / server.exchanges
        if not self._shown < share <= MOST:
            return
        rounds = server.federation.rounds
        words = [
            experience_text(server.experience, len(server.stream)),
            "consolidation" if server.round == rounds else f"round {server.round + 1}/{rounds}",
            f"reply {replies}/{expected}" if replies < expected else "",
            self._found,
        ]
        self._shown = share
        self._show(share, ", ".join(filter(None, words)))


@contextmanager
def shown_exchanges(
    server: Exchanging, wanted: bool | None, progress: MessageProgress | None
) -> Iterator[MessageProgress | None]:
    """Context manager that shows the progress of a server; gives the function to call per reply.

    Args:
        server: server that is about to run.
        wanted: as `Learner.show_progress`.
        progress: function of the user that is called per reply, too.
    """
    with shown_progress(wanted) as show:
        if show is None:
            yield progress
            return
        watch = ExchangeWatch(partial(show, "training"))
        server.callbacks = (*server.callbacks, watch)

        def replied(replies: int, expected: int) -> None:
            watch.replied(replies, expected)
            if progress is not None:
                progress(replies, expected)

        yield replied
        show("training", 1.0, accuracy_text(server.learner))
