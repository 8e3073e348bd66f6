"""Clients whose replies are missing from an exchange, with the reason, and the quorum."""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from perdure.errors import FederationError, PerdureError, PrivacyError

Cause = Literal["absent", "late", "failed", "rejected"]
"""Reason for a missing reply.

    absent    the client was not connected, or its node stopped
    late      it did not reply before the deadline
    failed    it replied with an error
    rejected  the server refused its reply
"""
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Absence:
    """A client without a usable reply in one exchange.

    Args:
        exchange: number of the exchange.
        client: number of the client.
        cause: see `Cause`.
        field: part of the reply that was wrong, for a rejected one; else "".
        error: exception that tells the reason.
    """

    exchange: int
    client: int
    cause: Cause
    error: PerdureError
    field: str = ""

    @property
    def reason(self) -> str:
        """Reason in one line."""
        return str(self.error)


def needed(quorum: float, asked: int) -> int:
    """Return the number of valid replies that a quorum needs from `asked` clients."""
    # rounded first, so that 0.55 of 20 are 11 replies and not 12
    return max(1, math.ceil(round(quorum * asked, 9))) if asked else 0


def log_absences(absences: Iterable[Absence]) -> None:
    """Log every absence in one line."""
    for each in absences:
        log.warning(
            "exchange %d goes on without client %d (%s): %s",
            each.exchange,
            each.client,
            each.cause,
            each.reason,
        )


def require_quorum(
    quorum: float, asked: Sequence[int], accepted: int, absences: Sequence[Absence]
) -> None:
    """Refuse to go on with fewer valid replies than the quorum.

    Raises:
        PrivacyError: if a client refused by the privacy rules; else the first error of a client
            that stopped; else the reason why the server has no valid reply of the first client.
    """
    least = needed(quorum, len(asked))
    if accepted >= least:
        return
    first = min(absences, key=_rank)
    others = [each for each in absences if each is not first]
    also = f"; also without: {_listed(others)}" if others else ""
    kind = type(first.error)
    shown = kind if issubclass(kind, PerdureError) else FederationError
    raise _raised(
        shown,
        f"{first.reason}; {accepted} of {len(asked)} asked clients gave a valid reply in exchange "
        f"{first.exchange}, federation.quorum = {quorum:g} needs {least}{also}; start the server "
        "again to repeat the exchange",
    ) from first.error


def _rank(absence: Absence) -> int:
    """Return the rank of an absence as the reason of a stop: a client's own reason is first."""
    refused = isinstance(absence.error, PrivacyError)
    if absence.cause == "failed":
        return 0 if refused else 1
    return 2 if refused else 3


def _raised(kind: type[PerdureError], text: str) -> PerdureError:
    """Return an exception of a kind with this text, whatever its own constructor asks for."""
    error = kind.__new__(kind)
    error.args = (text,)
    return error


def _listed(absences: Sequence[Absence]) -> str:
    most = [f"client {each.client} ({each.cause})" for each in absences[:5]]
    return ", ".join(most) + (" ..." if len(absences) > len(most) else "")
