"""Index of an account's entries by the partitions that they touch, updated incrementally.

A ledger only grows, so earlier totals stay valid, and only new entries are read.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from perdure.privacy.accounting.charges import Charge, History, merged
from perdure.privacy.ledger.entries import Entry, Sampling, Stated, weakest


@dataclass(kw_only=True)
class Exposed:
    """Merged charges of a record of some partitions, over the entries so far.

    Args:
        seen: number of entries of the account that are included.
        history: merged charges of these entries.
    """

    seen: int = 0
    history: History = ()


@dataclass(kw_only=True)
class EntryIndex:
    """Entries by partition, and merged histories of groups of partitions.

    Args:
        entries: entries of one account; new ones are appended, and existing ones never change.
        touching: partition to the indices of the entries that touch it, in order.
        purposes: purpose to the indices of its entries, in order.
        draws: partition to the number of integers that its entries draw.
        trusts: parties that see raw data, in any entry.
        samplings: kinds of sampling in any entry; at rate 1 a Poisson sample has every record.
        independence: partition to the weakest kind of independence in its entries.
        simulated: True if the noise of any entry came from a seed that the user chose.
        worst: delta to the partition with the largest epsilon, and this epsilon.
        worst_of: number of entries and the partitions for which `worst` holds.
    """

    entries: list[Entry]
    touching: dict[str, list[int]] = field(default_factory=dict)
    purposes: dict[str, list[int]] = field(default_factory=dict)
    draws: dict[str, int] = field(default_factory=dict)
    trusts: set[str] = field(default_factory=set)
    samplings: set[Sampling] = field(default_factory=set)
    independence: dict[str, Stated] = field(default_factory=dict)
    simulated: bool = False
    worst: dict[float, tuple[str, float]] = field(default_factory=dict)
    worst_of: tuple[int, tuple[str, ...]] = (0, ())
    _read: int = 0
    _exposed: dict[tuple[str, ...], Exposed] = field(default_factory=dict)

    def update(self) -> None:
        """Include the entries that were added since the last call."""
        for place in range(self._read, len(self.entries)):
            entry = self.entries[place]
            self.purposes.setdefault(entry.purpose, []).append(place)
            self.trusts.add(entry.trust)
            self.samplings.add("none" if set(entry.scope.values()) == {1.0} else entry.sampling)
            self.simulated = self.simulated or entry.simulated
            for partition in entry.scope:
                known = self.independence.get(partition, entry.independence)
                self.independence[partition] = weakest([known, entry.independence])
                self.touching.setdefault(partition, []).append(place)
                self.draws[partition] = self.draws.get(partition, 0) + entry.draws
        self._read = len(self.entries)

    def charges(self, partitions: Sequence[str], since: int = 0) -> list[Charge]:
        """All charges of a record that is in all of `partitions`, in order.

        Args:
            since: index of the first entry that is included.
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
