"""Checks of the learners that a federation's clients bring, before anybody trains."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perdure.errors import ConfigError, FederationError
from perdure.learner.learner import Learner
from perdure.learner.party import OWNER
from perdure.privacy.settings import Privacy


@dataclass(frozen=True, kw_only=True)
class Party:
    """Privacy settings and folder of a client's learner; its model is not kept."""

    owner: str
    privacy: Privacy | None
    folder: Path | None


def party_of(learner: Learner, client: int) -> Party:
    """Return the party that the learner of a client describes."""
    owner = owner_of(learner, client)
    return Party(owner=owner, privacy=learner.privacy, folder=learner.folder)


def owner_of(learner: Learner, client: int) -> str:
    """Name the owner of a client's ledger by its number, unless the learner names it."""
    return f"client-{client}" if learner.owner == OWNER else learner.owner


def refuse_parties(parties: Sequence[Party], folder: Path | None) -> None:
    """Refuse clients of one process that do not fit together.

    Args:
        parties: in the order of their numbers.
        folder: of the run.

    Raises:
        FederationError: for clients without privacy among private ones.
        ConfigError: for a folder of a learner's own, one owner of several ledgers, or secret noise
            without a folder to keep its keys in.
    """
    private = [client for client, each in enumerate(parties) if each.privacy is not None]
    plain = [client for client, each in enumerate(parties) if each.privacy is None]
    if private and plain:
        raise FederationError(
            f"{numbered(plain)} without privacy, but {numbered(private)} with privacy: updates of "
            "the former would be sent without noise, and no ledger would record it; give all "
            "learners privacy=..., or give it to no learner"
        )
    for client, party in enumerate(parties):
        refuse_folder(party.folder, client)
    if private:
        _refuse_namesakes([party.owner for party in parties])
    secret = [client for client in private if _secret(parties[client])]
    if secret and folder is None:
        raise ConfigError(
            f"{numbered(secret)} with secret noise, but no folder for keys and ledgers; give "
            "fit_federated(..., folder=...), or Privacy(seed=...) for a simulation"
        )


def refuse_folder(folder: Path | None, client: int) -> None:
    """Refuse a folder that a federation would not use.

    Raises:
        ConfigError: naming what to give instead.
    """
    if folder is not None:
        raise ConfigError(
            f"client {client}: Learner(folder={str(folder)!r}) is not used in a federation; "
            "allowed: no folder; give fit_federated(..., folder=...) or client_app(..., "
            f"folder=...) instead, which saves this client in its subfolder clients/{client:03d}"
        )


def refuse_privacy(learner: Learner, client: int, *, asked: bool) -> None:
    """Refuse, before it trains, a client whose privacy is off where the server's is on, or reverse.

    Args:
        learner: the client's.
        client: its number.
        asked: whether the server's learner has privacy.

    Raises:
        FederationError: naming the client.
    """
    has = learner.privacy is not None
    if has != asked:
        own, other = ("without", "with") if asked else ("with", "without")
        raise FederationError(
            f"given client {client} {own} privacy and a server {other} it; allowed: all parties of "
            "a federation with privacy, or none; give their learners the same privacy=..."
        )


def numbered(clients: Sequence[int]) -> str:
    """Name clients by their numbers: client 3, clients 0, 2 and 5."""
    *most, last = map(str, clients)
    return f"clients {', '.join(most)} and {last}" if most else f"client {last}"


def _secret(party: Party) -> bool:
    return party.privacy is not None and party.privacy.seed is None


def _refuse_namesakes(owners: Sequence[str]) -> None:
    for owner in owners:
        same = [client for client, each in enumerate(owners) if each == owner]
        if len(same) > 1:
            raise ConfigError(
                f"owner = {owner!r} is given to {numbered(same)}; allowed: a different owner for "
                "each client, because it is the name of the client's ledger; leave owner out to "
                "use client-0, client-1, ..."
            )
