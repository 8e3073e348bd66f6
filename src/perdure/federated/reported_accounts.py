"""Accounts that private clients have reported to a federation's server, which has no ledger."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from perdure.learner.checkpoint import Store
from perdure.learner.folder_claims import ACCOUNTS
from perdure.planning.budget import elsewhere
from perdure.privacy.ledger.account import NOT_KNOWN, WARM_START, Account
from perdure.privacy.ledger.entries import Entry, Stated
from perdure.privacy.ledger.merged import Merged, Part
from perdure.privacy.ledger.public_account import PublicAccount
from perdure.privacy.ledger.storage import SealedHead

if TYPE_CHECKING:
    from perdure.federated.server import Server

REPORTED = "reported by the client"
"""Purpose of the entries for charges that a client has reported."""
SILENT = "records of a client that reported no charges"
"""Name of the partition of a client that was sent private tasks, and never gave a valid reply."""
NO_LINES = SealedHead(count=0, hash="", mac="")


def reported_accounts(folder: Path) -> dict[int, tuple[int, PublicAccount]]:
    """Read the last public account of each client from a server's checkpoint.

    Args:
        folder: folder of the server's run.

    Returns:
        Number of a client to the exchange of its report, and the account; empty without privacy.

    Raises:
        RunError: if a checkpoint cannot be read.
        LedgerError: if an account cannot be read.
    """
    facts = _facts(folder).get(ACCOUNTS)
    found = facts.items() if isinstance(facts, Mapping) else ()
    return {
        int(name): (int(number), PublicAccount.parse(str(text), where=f"client {name}"))
        for name, (number, text) in sorted(found, key=lambda each: int(each[0]))
    }


def joined_of(source: "Path | Server", owner: Callable[[int], str]) -> Merged:
    """Return the accounts of all clients as one account.

    Its epsilon is infinite if a client was sent a private task and never gave a valid reply,
    because nobody but the client knows what it has charged.

    Args:
        source: server, or the folder of its run.
        owner: function from a client's number to the name of the owner; the names that clients
            report are not used, because two may report the same.

    Returns:
        The account, whose ledgers have no lines; empty without privacy.
    """
    if isinstance(source, Path):
        accounts = {client: account for client, (_, account) in reported_accounts(source).items()}
        begun = cast(Iterable[int], _facts(source).get("begun", ()))
    else:
        known = {int(name): source.heads.account(int(name)) for name in source.heads.accounts}
        accounts = {client: each for client, each in sorted(known.items()) if each}
        begun = source.heads.begun
    silent = sorted(set(begun) - accounts.keys())
    found = [_account_of(account, owner(client)) for client, account in accounts.items()]
    found += [_unknown(owner(client)) for client in silent]
    return Merged([Part(each, (), NO_LINES, keyed=False) for each in found])


def _facts(folder: Path) -> dict[str, object]:
    numbers = Store(folder).numbers()
    return Store(folder).facts(numbers[-1]) if numbers else {}


def _account_of(told: PublicAccount, owner: str) -> Account:
    """Return an account with one entry for each charge that a client has reported."""
    account = Account(owner=owner)
    account.delta = told.delta
    account.sizes = dict(told.sizes)
    account.rules = dict.fromkeys(told.sizes, "")
    account.public_facts = dict.fromkeys(told.sizes, told.public_facts)
    known = cast(Stated, "" if told.independence == NOT_KNOWN else told.independence)
    before = WARM_START if told.continues else REPORTED
    for histories, purpose in ((told.charges, REPORTED), (told.outside, before)):
        for partition, history in histories.items():
            for charge in history:
                entry = elsewhere(charge, partition, told.simulated, purpose, known)
                account.entries.append(entry)
    return account


def _unknown(owner: str) -> Account:
    """Return the account of a client whose charges are not known: as without any noise."""
    account = Account(owner=owner)
    account.sizes[SILENT] = 1
    account.rules[SILENT] = ""
    account.entries.append(
        Entry(
            purpose=SILENT,
            mechanism="none",
            noise_multiplier=0.0,
            clip_norm=1.0,
            first_step=0,
            steps=1,
            sampling="none",
            scope={SILENT: 1.0},
            data="",
            start="",
            simulated=False,
        )
    )
    return account
