"""Ledgers of a run under names of their own, and the ones of them that a command is asked for."""

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
"""Name of an owner: ARM/client-N in a run of arms, client-N in a federation."""


def apart(found: Sequence[tuple[Path, Part]], folder: Path) -> list[Part]:
    """Tell ledgers of one owner's name apart by the folders that they lie in.

    Args:
        found: file and ledger.
        folder: of the run, which names begin below.
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
    """Return the account of those owners only that were asked for.

    Raises:
        ConfigError: for an arm or owner that is not there.
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
    """Names that choose an owner: its own, and the one that it shares with others (`apart`)."""
    return {owner} if OWNER.fullmatch(owner) else {owner, owner.rpartition("/")[2]}


def arm_of(owner: str) -> str:
    """Name of the arm that an owner of a run belongs to.

    That of the owner where there are no arms.
    """
    found = OWNER.fullmatch(owner)
    return (found and found[1]) or owner


def named(account: Merged, asked: Sequence[str]) -> list[str]:
    """Partitions of these names, with or without their owner's; all where none is asked for.

    Raises:
        ConfigError: for a name that no partition has.
    """
    own = {name: {name, partition} for name, (_, partition) in places(account).items()}
    for name in asked:
        if not any(name in names for names in own.values()):
            raise ConfigError.of(
                "partition", name, "OWNER/PARTITION, as `perdure ledger show` prints them"
            )
    return [name for name, names in own.items() if not asked or names.intersection(asked)]
