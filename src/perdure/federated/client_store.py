"""State of a client on disk, saved after each exchange.

Parameters that the server sends are left out, because every exchange begins with the server's.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from perdure.errors import FederationError, RunError
from perdure.federated.messages import shared
from perdure.learner.checkpoint import Snapshot, Store
from perdure.learner.learner import Learner

FRESH = -1
"""Number for the state of a client before its first exchange."""
HELD = "last state "
"""Words in an error before the number of the state that a client still has."""
log = logging.getLogger(__name__)


class LostStateError(FederationError):
    """A client lost its state after the exchange that the server means, but may have an older."""


@dataclass
class ClientSession:
    """Learner of a client, the number of its last exchange, and of its last checkpoint."""

    learner: Learner
    exchange: int = FRESH
    saved: int = 0


@dataclass(frozen=True)
class ClientSnapshot:
    """Memory of a client without its learner, and the number of its last exchange."""

    exchange: int
    snapshot: Snapshot


def save(seat: ClientSession, exchange: int) -> None:
    """Save the learner in its state after `exchange`, if it has a folder.

    Checkpoints are numbered one after another and not by exchange, so that the last but one is kept
    for any number of exchanges without the client.
    """
    seat.exchange = exchange
    seat.saved = seat.saved + 1
    learner = seat.learner
    if learner.folder:
        _tell(learner, "checkpoint.begin")
        learner.session.hold()
        snapshot = _own(learner.checkpoint(), learner)
        facts = {**snapshot.facts, "exchange": exchange}
        Store(learner.folder).save(seat.saved, replace(snapshot, facts=facts))
        _tell(learner, "checkpoint.end")


def restore(learner: Learner, exchange: int) -> ClientSession:
    """Restore a prepared learner to its state after `exchange`.

    Raises:
        LostStateError: if the state after `exchange` is not on the disk, or is damaged.
    """
    if exchange == FRESH:
        return ClientSession(learner)
    store = Store(learner.folder) if learner.folder else None
    held: dict[int, int] = {}
    for number in reversed(store.numbers()) if store else ():
        try:
            snapshot = store.load(number) if store else None
        except RunError as error:
            log.warning("a saved state of client %d is left out: %s", learner.client, error)
            continue
        assert snapshot is not None
        held[number] = int(snapshot.facts["exchange"])
        if held[number] == exchange:
            learner.restore_checkpoint(_whole(snapshot, learner))
            return ClientSession(learner, exchange, number)
    raise _lost(learner.folder, sorted(held.values()), exchange)


def refuse_empty(folder: Path, exchange: int) -> None:
    """Refuse a folder without any saved state, before anything is written to it.

    Raises:
        LostStateError: if the folder should have the state after `exchange`.
    """
    if exchange != FRESH and not Store(folder).numbers():
        raise _lost(folder, [], exchange)


def _lost(folder: Path | None, held: Sequence[int], exchange: int) -> LostStateError:
    older = max((each for each in held if each < exchange), default=FRESH)
    kept = f"{folder} holds {list(held) or 'none'}" if folder else "it has no folder"
    return LostStateError(
        f"{HELD}{older}: the client has no saved state for exchange {exchange} with the server "
        f"({kept}); give the client the folder of this run, or start the run again"
    )


def park(seat: ClientSession) -> ClientSnapshot:
    """Keep what a client without privacy remembers between exchanges, without its learner."""
    return ClientSnapshot(seat.exchange, _own(seat.learner.snapshot(), seat.learner))


def unpark(learner: Learner, parked: ClientSnapshot) -> ClientSession:
    """Give a new learner what `park` kept."""
    learner.restore(_whole(parked.snapshot, learner))
    return ClientSession(learner, parked.exchange)


def _own(snapshot: Snapshot, learner: Learner) -> Snapshot:
    """Leave out the parameters and buffers that the server sends."""
    sent = {f"model.{name}" for name in shared(learner.model)}
    own = {name: value for name, value in snapshot.tensors.items() if name not in sent}
    return replace(snapshot, tensors=own)


def _whole(snapshot: Snapshot, learner: Learner) -> Snapshot:
    """Add what `_own` left out, from a learner that is about to get the server's values."""
    fresh = {f"model.{name}": value for name, value in learner.model.state_dict().items()}
    return replace(snapshot, tensors={**fresh, **snapshot.tensors})


def older_state(reason: str, previous: int) -> int | None:
    """Return the exchange of the state that a client still has, from the reason of its error.

    Args:
        reason: reason of an error reply.
        previous: the state that the client was asked for.

    Returns:
        An exchange before `previous`, FRESH for none; None if the error has another reason.
    """
    kind, _, rest = reason.partition(f": {HELD}")
    number = rest.partition(":")[0]
    if kind != LostStateError.__name__ or not number.removeprefix("-").isdecimal():
        return None
    return int(number) if FRESH <= int(number) < previous else None


def _tell(learner: Learner, point: str) -> None:
    for callback in learner.callbacks:
        callback(point, learner)
