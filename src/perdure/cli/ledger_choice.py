"""Unique names for the ledgers of a run, and selection of ledgers by name."""

import os
import re
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path

from perdure.errors import ConfigError
from perdure.privacy.ledger.merged import Merged, Part
from perdure.report.ledger_tables import places

OWNER = re.compile(r"(?:([A-Za-z0-9._-]+)/)?client-(\d{1,9})")
"""Pattern of an owner's name: ARM/client-N in a run with arms, client-N in a federation."""


def apart(found: Sequence[tuple[Path, Part]], folder: Path) -> list[Part]:
    """Give ledgers of owners with equal names different names, from the folders that contain them.

    Args:
        found: pairs of file and ledger.
        folder: folder of the run, to which the names are relative.
    """
    owners = [part.account.owner for _, part in found]
    parts = []
    for path, part in found:
        if owners.count(part.account.owner) > 1:
            place = Path(os.path.relpath(path.parent.resolve(), folder))
            account = copy(part.account)
            account.owner = "/".join((*place.parts, account.owner))
            parts.append(replace(part, account=account))
        else:
            parts.append(part)
    return parts


def select(account: Merged, arms: Sequence[str], owners: Sequence[str]) -> Merged:
    """Return an account with only the chosen arms and owners.

    Raises:
        ConfigError: if there is no such arm or owner.
    """
    own = {part.account.owner for part in account.parts}
    known = {name for owner in own for name in known_as(owner)}
    for field, asked, allowed in (("arm", arms, set(map(arm_of, own))), ("owner", owners, known)):
        for name in asked:
            if name not in allowed:
                raise ConfigError.of(field, name, sorted(allowed))
    return Merged(
        [
            part
            for part in account.parts
            if (not arms or arm_of(part.account.owner) in arms)
            and (not owners or not known_as(part.account.owner).isdisjoint(owners))
        ]
    )


def known_as(owner: str) -> set[str]:
    """Return the names by which a user can choose an owner, with and without its folders."""
    return {owner} if OWNER.fullmatch(owner) else {owner, owner.rpartition("/")[2]}


def arm_of(owner: str) -> str:
    """Return the name of the arm to which a ledger's owner belongs.

    It is the name of the owner if the run has no arms.
    """
    found = OWNER.fullmatch(owner)
    return (found and found[1]) or owner


def named(account: Merged, asked: Sequence[str]) -> list[str]:
    """Select partitions of an account by name, given as PARTITION or OWNER/PARTITION.

    Args:
        account: ledgers with the partitions.
        asked: names that the user gave; none to select all partitions.

    Raises:
        ConfigError: if no partition has a given name.
    """
    own = {name: {name, partition} for name, (_, partition) in places(account).items()}
    for name in asked:
        if not any(name in names for names in own.values()):
            raise ConfigError.of(
                "partition", name, "OWNER/PARTITION, as `perdure ledger show` prints them"
            )
    return [name for name, names in own.items() if not asked or names.intersection(asked)]
