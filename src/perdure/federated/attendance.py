"""Clients that take part in each exchange of a federation, and each client's last exchange."""

from collections.abc import Callable, Collection, Sequence

from perdure.federated.client_store import FRESH
from perdure.federated.settings import Federation


class Attendance:
    """Clients of each exchange of a federation, followed from one exchange to the next.

    A client takes part in an exchange if the server accepted its reply. An exchange takes the same
    time late in a run as early.

    Args:
        federation: settings, which draw the clients of a training round.
        all_consolidate: function from an experience's index to True if all clients take part in its
            consolidation, and to False if only the clients that trained in it do.
        holds: function from a client and an experience to False if the client does not hold it, and
            is not asked for it.
        exchange: number of the next exchange.
        previous: last earlier exchange of each client, from a checkpoint; None for a new run.
    """

    def __init__(
        self,
        federation: Federation,
        all_consolidate: Callable[[int], bool],
        holds: Callable[[int, int], bool] = lambda client, experience: True,
        exchange: int = 0,
        previous: Sequence[int] | None = None,
    ) -> None:
        self._federation = federation
        self._all_consolidate = all_consolidate
        self._holds = holds
        self._asked: list[int] | None = None
        self._previous = list(previous or [FRESH] * federation.clients)
        self.exchange = exchange

    @property
    def previous(self) -> Sequence[int]:
        """Number of the last earlier exchange that each client took part in.

        It is FRESH, which is below all numbers of exchanges, if there was none.
        """
        return self._previous

    @property
    def asked(self) -> list[int]:
        """Clients that are asked to take part in the current exchange, ascending."""
        if self._asked is None:
            self._asked = self._drawn()
        return self._asked

    def advance(self, present: Collection[int]) -> None:
        """Go to the next exchange.

        Args:
            present: clients whose replies were accepted.
        """
        for client in present:
            self._previous[client] = self.exchange
        self._asked = None
        self.exchange += 1

    def _drawn(self) -> list[int]:
        federation = self._federation
        experience, number = divmod(self.exchange, federation.rounds + 1)
        if number < federation.rounds:
            return federation.cohort(experience, number, lambda each: self._holds(each, experience))
        if self._all_consolidate(experience):
            return [each for each in range(federation.clients) if self._holds(each, experience)]
        first = self.exchange - number
        return [client for client, last in enumerate(self._previous) if last >= first]
