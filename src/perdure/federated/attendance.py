"""Clients that take part in every exchange, and the last one that each took part in."""

from collections.abc import Callable, Sequence

from perdure.federated.client_store import FRESH
from perdure.federated.settings import Federation


class Attendance:
    """Follows the exchanges of a federation, one after another.

    A function of the settings alone, so that a server that was stopped follows them again to where
    it goes on. One exchange costs no more late in a run than early.

    Args:
        federation: draws the clients of a training round.
        all_consolidate: from an experience's index to whether all clients take part in its
            consolidation; else those do that trained in it.
    """

    def __init__(self, federation: Federation, all_consolidate: Callable[[int], bool]) -> None:
        self._federation = federation
        self._all_consolidate = all_consolidate
        self._asked: list[int] | None = None
        self._previous = [FRESH] * federation.clients
        self.exchange = 0

    @property
    def previous(self) -> Sequence[int]:
        """For every client the last exchange before the present one that it took part in.

        FRESH, which is below all numbers of exchanges, for none.
        """
        return self._previous

    @property
    def asked(self) -> list[int]:
        """Clients that take part in the present exchange, ascending."""
        if self._asked is None:
            self._asked = self._drawn()
        return self._asked

    def advance(self) -> None:
        """Go to the next exchange."""
        for client in self.asked:
            self._previous[client] = self.exchange
        self._asked = None
        self.exchange += 1

    def _drawn(self) -> list[int]:
        federation = self._federation
        experience, number = divmod(self.exchange, federation.rounds + 1)
        if number < federation.rounds:
            return federation.cohort(experience, number)
        if self._all_consolidate(experience):
            return list(range(federation.clients))
        first = self.exchange - number
        return [client for client, last in enumerate(self._previous) if last >= first]
