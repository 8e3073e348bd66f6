"""Epsilon and charges of each partition, computed from the entries of a ledger."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

from perdure.errors import ConfigError, LedgerError
from perdure.privacy.accounting import calibration as accounting
from perdure.privacy.accounting.accountants import Accountant
from perdure.privacy.accounting.charges import Charge, History, Relation
from perdure.privacy.ledger.entries import Entry, Stated, Unit, require_one_of, weakest
from perdure.privacy.ledger.entry_index import EntryIndex
from perdure.privacy.ledger.storage import SCHEMA, Body

WARM_START = "spent before, by the model that was warm-started"
"""Purpose of a ledger entry that carries over the privacy cost of a model's earlier training."""
NOT_KNOWN = "not known"
SAMPLINGS = ("no sampling", "Poisson sampling", "Poisson sampling and full passes")
"""Kinds of sampling of an account, in words."""
NOT_COUNTED = "training before this ledger not counted"
COUNTED = "training before this ledger counted as far as it was recorded"


@dataclass(frozen=True)
class Statement:
    """Epsilon with its delta, unit, neighbouring relation, accountant, sampling and trust model.

    Args:
        units: declared (public) number of units (records, clients) over all partitions; 0 if not
            known.
        before: how epsilon covers the earlier training of the model's first weights, in words.
        public_facts: facts that were found in the records instead of declared, one sentence each;
            epsilon does not cover them.
    """

    epsilon: float
    delta: float
    unit: str
    relation: str
    accountant: str
    sampling: str
    trust: str
    simulated: bool
    units: int = 0
    independence: str = ""
    before: str = NOT_COUNTED
    public_facts: tuple[str, ...] = ()

    @property
    def delta_is_large(self) -> bool:
        """Return True if delta is not below 1 / number of units, so that whole units may leak."""
        return self.delta * self.units >= 1

    def __str__(self) -> str:
        # rounded up, so that the printed value is an upper bound
        value = (
            "infinite"
            if math.isinf(self.epsilon)
            else f"{math.ceil(self.epsilon * 100 - 1e-9) / 100:.2f}"
        )
        relation = self.relation.replace("add-remove", "add/remove")
        delta = f"{self.delta:g}".replace("e-0", "e-")
        facts = (
            self.unit,
            relation,
            f"delta {delta}",
            self.accountant.upper(),
            self.sampling,
            self.trust,
            "declared sizes public",
            *self.public_facts,
            *([f"independence of records {self.independence}"] if self.independence else []),
        )
        warning = "; simulation: not a private release" if self.simulated else ""
        if self.delta_is_large:
            warning += f"; delta is not below 1 / {self.units} {self.unit}s: whole ones may leak"
        return f"epsilon {value} ({', '.join(facts)}; {self.before}{warning})"


class Account:
    """Account of spent privacy: partitions with declared sizes, and entries in order.

    Every ledger can be read as an `Account`.

    Args:
        owner: name of the party that holds the records.
        unit: the protected unit, `record` or `client`.
        relation: neighbouring relation.

    Raises:
        ConfigError: if unit or relation is not known.
    """

    def __init__(
        self, *, owner: str = "", unit: Unit = "record", relation: Relation = "add-remove"
    ) -> None:
        require_one_of("unit", unit, Unit)
        require_one_of("relation", relation, Relation)
        self.owner = owner
        self.unit = unit
        self.relation = relation
        self.delta: float | None = None
        """Delta that the run was asked for; None if it is not known."""
        self.sizes: dict[str, int] = {}
        self.rules: dict[str, str] = {}
        """Partition to the digest of the public rule that assigned its records; "" if not known."""
        self.public_facts: dict[str, tuple[str, ...]] = {}
        """Partition to the facts that were found in its records and are therefore public."""
        self.entries: list[Entry] = []
        """Charges in order; new ones are appended, and existing ones never change."""
        self._indexed = EntryIndex(entries=self.entries)

    @classmethod
    def replay(cls, bodies: Sequence[Body], *, where: str) -> "Account":
        """Rebuild an account from verified lines of a ledger."""
        account = cls(**header(bodies, where))
        account.delta = asked_delta(bodies[0], where)
        for number, body in enumerate(bodies[1:], 2):
            account.read(body, f"{where}, entry {number}")
        return account

    def read(self, body: Body, where: str) -> None:
        """Read one verified line into the account.

        Raises:
            LedgerError: if this version cannot read the line.
        """
        try:
            self.take(body)
        except (KeyError, TypeError, ConfigError) as error:
            raise LedgerError(
                f"{where}: this version of perdure cannot read the line ({error}); read it with "
                "the version that wrote it"
            ) from error

    def take(self, body: Body) -> None:
        """Add one line, written by this version, to the account.

        Raises:
            ConfigError: if the kind of line is unknown, or a value is out of range.
            KeyError, TypeError: if names are missing or unknown.
        """
        kind = body["kind"]
        content = {name: value for name, value in body.items() if name != "kind"}
        if kind == "partition":
            self.sizes[content["name"]] = content["size"]
            self.rules[content["name"]] = content.get("rule", "")
            self.public_facts[content["name"]] = tuple(content.get("public_facts", ()))
        elif kind == "entry":
            self.entries.append(Entry(**content))
        elif kind == "asked":
            self.delta = asked_delta(content, "a line of kind asked")
        elif kind != "grant":
            raise ConfigError.of("kind", kind, ("partition", "entry", "grant", "asked"))

    @property
    def partitions(self) -> tuple[str, ...]:
        """Names of all declared partitions, in order."""
        return tuple(self.sizes)

    @property
    def simulated(self) -> bool:
        """Return True if any noise came from a seed that the user chose."""
        return self.index.simulated

    def charges(self, partition: str) -> tuple[Charge, ...]:
        """All charges of a record of `partition`, in order."""
        return self.exposure([partition])

    def epsilon(
        self,
        partitions: Iterable[str] | None = None,
        *,
        delta: float,
        accountant: Accountant = "pld",
    ) -> float:
        """Compute the epsilon of a record.

        Args:
            partitions: the partitions that all contain the record; under replace-one, all
                partitions of the old and the new record. None for the worst record of one
                partition.
            delta: delta of the epsilon, above 0 and below 1.
            accountant: `pld`, which is tight, or `rdp`.
        """
        if partitions is None and accountant == "pld":
            return self.worst(delta)[1]
        histories = (
            self._histories() if partitions is None else {"": self.history(list(partitions))}
        )
        spent = (
            accounting.epsilon(history, delta=delta, accountant=accountant, relation=self.relation)
            for history in histories.values()
        )
        return max(spent, default=0.0)

    def worst(self, delta: float) -> tuple[str, float]:
        """Partition whose records have the largest PLD epsilon, and this epsilon.

        Under replace-one the name may consist of two partitions.
        """
        index = self.index
        now = (len(self.entries), tuple(self.sizes))
        if index.worst_of != now:
            index.worst.clear()
            index.worst_of = now
        if delta not in index.worst:
            index.worst[delta] = accounting.worst(
                self._histories(), delta=delta, relation=self.relation
            )
        return index.worst[delta]

    def statement(self, delta: float) -> Statement:
        """Return the worst epsilon so far, with everything that it needs to be understood."""
        trust = sorted(
            {"trusted curator" if trust == "curator" else trust for trust in self.index.trusts}
        )
        return Statement(
            epsilon=self.epsilon(delta=delta),
            delta=delta,
            unit=self.unit,
            relation=self.relation,
            accountant="pld",
            sampling=self.sampling,
            trust=" and ".join(trust) or "trusted curator",
            simulated=self.simulated,
            units=sum(self.sizes.values()),
            independence=self.independence,
            public_facts=self.found_in_records,
            before=COUNTED if self.continues else NOT_COUNTED,
        )

    @property
    def sampling(self) -> str:
        """Return the sampling of all entries in words, one of `SAMPLINGS`."""
        kinds = self.index.samplings
        if "poisson" not in kinds:
            return SAMPLINGS[0]
        return SAMPLINGS[1] if "none" not in kinds else SAMPLINGS[2]

    @property
    def found_in_records(self) -> tuple[str, ...]:
        """Return the facts that were found in the records of any partition, each once."""
        return tuple(dict.fromkeys(chain.from_iterable(self.public_facts.values())))

    @property
    def independence(self) -> str:
        """Return the weakest kind of independence of the entries; "not known" if one has none.

        The result is "" if there is no entry.
        """
        return (self.independence_of(self.sizes) or NOT_KNOWN) if self.entries else ""

    def independence_of(self, partitions: Iterable[str]) -> Stated:
        """Return the weakest kind of independence of the entries that touch these partitions."""
        known = self.index.independence
        return weakest(known[partition] for partition in set(partitions) if partition in known)

    @property
    def continues(self) -> bool:
        """Return True if charges of a model's earlier training were carried over."""
        return WARM_START in self.index.purposes

    def exposure(self, partitions: Sequence[str]) -> tuple[Charge, ...]:
        """All charges of a record that is in all of `partitions`, in order."""
        self._require(partitions)
        return tuple(self.index.charges(partitions))

    def history(self, partitions: Sequence[str]) -> History:
        """Return the charges of a record that is in all of `partitions`, merged."""
        self._require(partitions)
        return self.index.history(tuple(partitions))

    @property
    def index(self) -> EntryIndex:
        """Up-to-date index of the entries by partition."""
        if self._indexed.entries is not self.entries:
            self._indexed = EntryIndex(entries=self.entries)
        self._indexed.update()
        return self._indexed

    def groups(self) -> dict[str, tuple[str, ...]]:
        """Groups of partitions that one neighbouring change can affect, by name.

        Each partition is a group; under replace-one every two partitions are one, too.
        """
        groups: list[tuple[str, ...]] = [(partition,) for partition in self.sizes]
        if self.relation == "replace-one":
            groups += list(combinations(self.sizes, 2))
        return {" and ".join(group): group for group in groups}

    def _histories(self) -> dict[str, History]:
        index = self.index
        return {name: index.history(group) for name, group in self.groups().items()}

    def _require(self, partitions: Sequence[str]) -> None:
        for partition in partitions:
            if partition not in self.sizes:
                raise ConfigError.of("partition", partition, self.sizes)


def header(bodies: Sequence[Body], where: str) -> dict[str, Any]:
    """Read owner, unit and relation from the first line of a ledger.

    Raises:
        LedgerError: if the line is not the header of a ledger.
    """
    first = bodies[0] if bodies else {}
    if first.get("kind") != "header" or first.get("schema") != SCHEMA:
        raise LedgerError(
            f"{where}, line 1: this is not the header of a ledger with schema {SCHEMA}; give a "
            "ledger, or restore the file from a backup"
        )
    return {name: first[name] for name in ("owner", "unit", "relation")}


def asked_delta(body: Body, where: str) -> float | None:
    """Delta that a run was asked for, as recorded in its ledger; None if nothing is recorded.

    Raises:
        LedgerError: if the recorded value cannot be a delta.
    """
    delta = body.get("delta")
    if delta is None:
        return None
    if not isinstance(delta, float) or not 0 < delta < 1:
        raise LedgerError(
            f"{where}: delta = {delta!r} is not allowed; allowed: a number between 0 and 1; "
            "restore the file from a backup"
        )
    return delta
