"""Client state on disk, between one exchange and the next."""

from dataclasses import dataclass, replace

from perdure.errors import FederationError
from perdure.learner.checkpoint import Store
from perdure.learner.learner import Learner

FRESH = -1
"""The exchange before the first: a client that nothing was sent to yet."""


@dataclass
class ClientSession:
    """A client's learner, the exchange at whose end it stands, and its last checkpoint's number."""

    learner: Learner
    exchange: int = FRESH
    saved: int = 0


def save(seat: ClientSession, exchange: int) -> None:
    """Write the learner as it stands after `exchange`, when it has a folder.

    Checkpoints are numbered by how many there are, not by exchange: the one before the last must
    survive however many exchanges a client was not part of.
    """
    seat.exchange = exchange
    seat.saved = seat.saved + 1
    learner = seat.learner
    if learner.folder:
        _tell(learner, "checkpoint.begin")
        learner.session.hold()
        snapshot = learner.checkpoint()
        facts = {**snapshot.facts, "exchange": exchange}
        Store(learner.folder).save(seat.saved, replace(snapshot, facts=facts))
        _tell(learner, "checkpoint.end")


def restore(learner: Learner, exchange: int) -> ClientSession:
    """Bring a prepared learner to where it stood after `exchange`.

    Raises:
        FederationError: when that state is not kept (any more).
    """
    if exchange == FRESH:
        return ClientSession(learner)
    store = Store(learner.folder) if learner.folder else None
    held: dict[int, int] = {}
    for number in reversed(store.numbers()) if store else ():
        snapshot = store.load(number) if store else None
        assert snapshot is not None
        held[number] = int(snapshot.facts["exchange"])
        if held[number] == exchange:
            learner.restore_checkpoint(snapshot)
            return ClientSession(learner, exchange, number)
    kept = (
        f"{learner.folder} holds {sorted(held.values()) or 'none'}" if store else "it has no folder"
    )
    raise FederationError(
        f"the client has no saved state for exchange {exchange} with the server ({kept}); give "
        "the client the folder of this run, or start the run again from the beginning"
    )


def _tell(learner: Learner, point: str) -> None:
    for callback in learner.callbacks:
        callback(point, learner)
