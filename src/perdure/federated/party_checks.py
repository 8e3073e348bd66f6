"""Checks of the learners of all clients in a federation, before training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from perdure.errors import ConfigError, FederationError
from perdure.learner.learner import Learner
from perdure.learner.party_settings import OWNER
from perdure.privacy.settings import Privacy


@dataclass(frozen=True, kw_only=True)
class Party:
    """Privacy settings and folder of a client's learner, without its model."""

    owner: str
    privacy: Privacy | None
    folder: Path | None


def party_of(learner: Learner, client: int) -> Party:
    """Return owner, privacy and folder of a client's learner.

    Raises:
        ConfigError: if the learner has validation.
    """
    refuse_validation(learner, client)
    owner = owner_of(learner, client)
    return Party(owner=owner, privacy=learner.privacy, folder=learner.folder)


def owner_of(learner: Learner, client: int) -> str:
    """Return the owner of a client's ledger: the learner's `owner`, or client-N by its number."""
    return f"client-{client}" if learner.owner == OWNER else learner.owner


def refuse_parties(parties: Sequence[Party], folder: Path | None) -> None:
    """Refuse clients in one process whose settings contradict each other.

    Args:
        parties: clients in the order of their numbers.
        folder: folder of the run.

    Raises:
        FederationError: if some clients have privacy and others do not.
        ConfigError: if a learner has its own folder, two ledgers have the same owner, or secret
            noise has no folder for its keys.
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
    """Refuse a folder in a learner, because a federation would not use it.

    Raises:
        ConfigError: names the argument to use instead.
    """
    if folder is not None:
        raise ConfigError(
            f"client {client}: Learner(folder={str(folder)!r}) is not used in a federation; "
            "allowed: no folder; give fit_federated(..., folder=...) or client_app(..., "
            f"folder=...) instead, which saves this client in its subfolder clients/{client:03d}"
        )


def refuse_validation(learner: Learner, client: int) -> None:
    """Refuse validation, and several processes, in a client's learner.

    The server decides when training ends.

    Raises:
        ConfigError: names the client.
    """
    if learner.processes > 1:
        allowed = f"1 in client {client} of a federation, which trains in one process"
        raise ConfigError.of("processes", learner.processes, allowed)
    if learner.validation is not None:
        raise ConfigError(
            f"client {client}: Learner(validation=...) is not used in a federation, whose server "
            "decides on the steps; allowed: validation=None"
        )


def refuse_privacy(learner: Learner, client: int, *, asked: bool) -> None:
    """Refuse a client, before it trains, if only one of client and server has privacy.

    Args:
        learner: learner of the client.
        client: number of the client.
        asked: True if the server's learner has privacy.

    Raises:
        FederationError: names the client.
    """
    has = learner.privacy is not None
    if has != asked:
        own, other = ("without", "with") if asked else ("with", "without")
        raise FederationError(
            f"client {client} trains {own} privacy, but the server {other} privacy; allowed: all "
            "parties of a federation with privacy, or none; give their learners the same "
            "privacy=..."
        )


def refuse_unplanned(learner: Learner, task: Mapping[str, int]) -> None:
    """Refuse a round that is not in the client's public plan, because its noise is not for it.

    Args:
        learner: learner of the client.
        task: numbers of the exchange, with the client's own `experience`.

    Raises:
        FederationError: names the client and its rounds.
    """
    own = learner.participation
    if own is None or task["round"] in own.taken[task["experience"]]:
        return
    raise FederationError(
        f"client {learner.client} was asked for round {task['round']} of its experience "
        f"{task['experience']}; allowed: rounds {sorted(own.taken[task['experience']])}, for which "
        "its noise is calibrated"
    )


def numbered(clients: Sequence[int]) -> str:
    """Name clients by their numbers in words: client 3, clients 0, 2 and 5."""
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
