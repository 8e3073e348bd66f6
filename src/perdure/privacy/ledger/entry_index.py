"""Entries of an account by the partitions that they touch, brought up to date as they come.

A ledger only grows, so what was added up of its entries stays, and only new ones are looked at.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from perdure.privacy.accounting.charges import Charge, History, merged
from perdure.privacy.ledger.entries import Entry


@dataclass(kw_only=True)
class Exposed:
    """Charges of a record of some partitions by the entries so far.

    Args:
        seen: how many entries of the account are added up.
        history: of them.
    """

    seen: int = 0
    history: History = ()


@dataclass(kw_only=True)
class EntryIndex:
    """Entries by partition, and merged histories of groups of partitions.

    Args:
        entries: of one account, which are appended to and never changed.
        touching: partition to the places of the entries that touch it, in order.
        draws: partition to the integers that its entries draw.
        worst: delta to the partition that spent most and its epsilon.
        worst_of: number of entries and the partitions for which `worst` holds.
    """

    entries: list[Entry]
    touching: dict[str, list[int]] = field(default_factory=dict)
    draws: dict[str, int] = field(default_factory=dict)
    worst: dict[float, tuple[str, float]] = field(default_factory=dict)
    worst_of: tuple[int, tuple[str, ...]] = (0, ())
    _read: int = 0
    _exposed: dict[tuple[str, ...], Exposed] = field(default_factory=dict)

    def update(self) -> None:
        """Take in the entries that have come."""
        for place in range(self._read, len(self.entries)):
            entry = self.entries[place]
            for partition in entry.scope:
                self.touching.setdefault(partition, []).append(place)
                self.draws[partition] = self.draws.get(partition, 0) + entry.draws
        self._read = len(self.entries)

    def charges(self, partitions: Sequence[str], since: int = 0) -> list[Charge]:
        """All charges of a record that is in all of `partitions`, in order.

        Args:
            since: place of the first entry that counts.
        """
        places: set[int] = set()
        for partition in partitions:
            touching = self.touching.get(partition, [])
            places.update(touching[bisect_left(touching, since) :])
        charges = (self.entries[place].charge(partitions) for place in sorted(places))
        return [charge for charge in charges if charge is not None]

    def history(self, partitions: tuple[str, ...]) -> History:
        """Return the merged charges of a record that is in all of `partitions`."""
        known = self._exposed.setdefault(partitions, Exposed())
        new = self.charges(partitions, known.seen)
        if new:
            known.history = merged([*known.history, *new])
        known.seen = self._read
        return known.history
