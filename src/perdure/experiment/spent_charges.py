"""Charges of finished trainings, for the table `[[privacy.spent]]` of a later one."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from perdure.errors import LedgerError
from perdure.experiment.results import ledger_files
from perdure.planning.budget import ELSEWHERE
from perdure.privacy.accounting.charges import Charge, History, bounding, merged
from perdure.privacy.ledger.account import Account
from perdure.privacy.ledger.merged import merge


def own_charges(folders: Iterable[Path]) -> History:
    """Return the charges of the worst record in all these trainings together.

    Args:
        folders: folders of private trainings, each with a ledger or with those of its clients.

    Raises:
        LedgerError: if the ledger of a training is missing.
    """
    found: list[Charge] = []
    for folder in folders:
        paths = ledger_files(folder)
        if not paths:
            raise LedgerError(
                f"{folder} has no ledger, so its charges are not known and a restart would forget "
                "them; restore the folder, or run without --heal"
            )
        for part in merge(paths).parts:
            found += bounding(_of_account(part.account))
    return merged(found)


def _of_account(account: Account) -> Iterator[tuple[Charge, ...]]:
    """Yield the charges of each partition that an account's own run made, without earlier ones."""
    own = Account(owner=account.owner, unit=account.unit, relation=account.relation)
    own.sizes |= account.sizes
    own.entries += [entry for entry in account.entries if entry.purpose != ELSEWHERE]
    for partition in account.partitions:
        yield own.charges(partition)


def charge_table(charge: Charge) -> dict[str, Any]:
    """Return a charge as a table of `[[privacy.spent]]`."""
    return {
        "sampling_rate": charge.sampling_rate,
        "noise_multiplier": charge.noise_multiplier,
        "steps": charge.steps,
        "noise": charge.noise,
    }
