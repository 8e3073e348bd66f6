"""State of a client on disk, saved after each exchange."""

from dataclasses import dataclass, replace

from perdure.errors import FederationError
from perdure.learner.checkpoint import Store
from perdure.learner.learner import Learner

FRESH = -1
"""Number for the state of a client before its first exchange."""


@dataclass
class ClientSession:
    """Learner of a client, the number of its last exchange, and of its last checkpoint."""

    learner: Learner
    exchange: int = FRESH
    saved: int = 0


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
        snapshot = learner.checkpoint()
        facts = {**snapshot.facts, "exchange": exchange}
        Store(learner.folder).save(seat.saved, replace(snapshot, facts=facts))
        _tell(learner, "checkpoint.end")


def restore(learner: Learner, exchange: int) -> ClientSession:
    """Restore a prepared learner to its state after `exchange`.

    Raises:
        FederationError: if the state after `exchange` is not on the disk, or was removed.
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
