"""The ledger: the charges of every partition, written to disk before noise is drawn.

No operation removes or resets a charge.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from perdure.errors import BudgetError, ConfigError, LedgerError
from perdure.privacy.accounting import calibration as accounting
from perdure.privacy.accounting.accountants import MOST_DRAWS
from perdure.privacy.accounting.calibration import check_target
from perdure.privacy.accounting.charges import Charge, Relation, merged
from perdure.privacy.ledger.account import Account, asked_delta, header
from perdure.privacy.ledger.entries import Entry, Unit
from perdure.privacy.ledger.storage import (
    SCHEMA,
    Anchor,
    Body,
    HashChain,
    HeadCopy,
    canonical_json,
)
from perdure.privacy.noise.key import NoiseKey
from perdure.utils.folder_lock import FolderLock


def _silent(point: str) -> None:
    """Default trace function, which does nothing."""


class Ledger(Account):
    """Append-only privacy account of one curator.

    Its lines form a hash chain, and its head has a MAC made with the curator's key.

    Guarantee: when `charge` returns, its entry is on disk, so noise that is drawn afterwards is
    always accounted for. A grant, once written, limits all later charges, also after a restart.

    >>> ledger = Ledger.open(None, key=NoiseKey.from_seed(0))
    >>> ledger.declare("task 0", 12_000)
    >>> entry = Entry(
    ...     purpose="gradient", mechanism="gaussian", noise_multiplier=1.1, clip_norm=1.0,
    ...     first_step=0, steps=469, sampling="poisson", scope={"task 0": 256 / 12_000},
    ...     data="", start="", simulated=True,
    ... )
    >>> ledger.charge(entry) == entry.digest
    True
    >>> round(ledger.epsilon(delta=1e-5), 2)
    2.38
    """

    def __init__(
        self, chain: HashChain, key: NoiseKey, *, owner: str, unit: Unit, relation: Relation
    ) -> None:
        super().__init__(owner=owner, unit=unit, relation=relation)
        self.chain = chain
        self.trace = chain.trace
        self._key = key
        self._digests: set[str] = set()
        self._plans: list[str] = []
        self._allowance: dict[tuple[str, float, float, str], int] = {}
        self._lapsed = False

    @classmethod
    def open(
        cls,
        path: Path | None,
        *,
        key: NoiseKey,
        trace: Callable[[str], None] = _silent,
        owner: str = "",
        unit: Unit = "record",
        relation: Relation = "add-remove",
        delta: float | None = None,
        anchors: Sequence[Anchor] = (),
        copies: Sequence[HeadCopy] = (),
        lock: FolderLock | None = None,
    ) -> "Ledger":
        """Create the ledger at `path`, or verify and load it; None keeps it in memory.

        Lines after the head are dropped: their noise was never drawn.

        Args:
            path: path of the file, usually `ledger.jsonl`; the file of its head is next to it.
            key: noise key of the curator.
            trace: called at "ledger.before-append", "ledger.appended" and "ledger.head-written".
            owner: name of the curator, for example of the client.
            unit: unit that every entry must protect.
            relation: neighbouring relation that every entry must use.
            delta: delta that the run was asked for. It is stored in the ledger, so that every
                reader computes the same epsilon by default; None to store none.
            anchors: heads that were recorded elsewhere, such as in a checkpoint; the ledger must
                contain each of them.
            copies: files that follow the head; the ledger must contain their heads, too.
            lock: lock that is held while the ledger is written; None for none.

        Raises:
            LedgerError: if the ledger is damaged, sealed with another key, or of another owner,
                unit or relation, or if it does not contain an anchor.
            RunError: if another process or learner holds the lock.
        """
        chain = HashChain(path, key, trace, anchors=anchors, copies=copies, lock=lock)
        ledger = cls(chain, key, owner=owner, unit=unit, relation=relation)
        asked = {"owner": owner, "unit": unit, "relation": relation}
        if not ledger.chain.bodies:
            told = {} if delta is None else {"delta": float(delta)}
            ledger._write({"kind": "header", "schema": SCHEMA, **asked, **told})
        found = header(ledger.chain.bodies, str(path))
        if found != asked:
            raise LedgerError(
                f"{path} was made with {found}, but is opened with {asked}; open it with the "
                "first values, or use another file"
            )
        ledger.delta = asked_delta(ledger.chain.bodies[0], f"{path}, line 1")
        for number, body in enumerate(ledger.chain.bodies[1:], 2):
            ledger.read(body, f"{path}, line {number}")
        if delta is not None and delta != ledger.delta:
            ledger._write({"kind": "asked", "delta": float(delta)})
        return ledger

    @property
    def simulated(self) -> bool:
        """Return True if noise comes from a seed that the user chose."""
        return self._key.simulated or super().simulated

    def declare(
        self, partition: str, size: int, rule: str = "", public_facts: Sequence[str] = ()
    ) -> None:
        """Declare a partition and its public size; repeating a declaration changes nothing.

        Args:
            partition: name of the partition.
            size: declared number of its records.
            rule: digest of the public rule that assigned its records; "" if none is known.
            public_facts: facts that were found in its records and are therefore public.

        Raises:
            ConfigError: if the size is below 1 or the name is empty.
            LedgerError: if another size or rule was declared before.
        """
        if size < 1 or not partition:
            raise ConfigError.of("partition", (partition, size), "a name and a size of at least 1")
        known = self.sizes.get(partition)
        told = self.public_facts.get(partition, ())
        facts = list(dict.fromkeys([*told, *public_facts]))
        if known not in (None, size):
            raise LedgerError(
                f"partition {partition!r} was declared with {known} records, now with {size}; "
                f"allowed: {known} again; give the same declared_size, or another folder"
            )
        if known is not None and self.rules[partition] != rule:
            raise LedgerError(
                f"partition {partition!r} was made by another rule than the partition of that "
                "name in this ledger (another data set, order, seed or size); give the same "
                "stream as before, or another folder"
            )
        if known is None or len(facts) > len(told):
            body: Body = {"kind": "partition", "name": partition, "size": int(size)}
            body |= {"rule": rule} if rule else {}
            self._write(body | ({"public_facts": facts} if facts else {}))

    def grant(
        self,
        charges: Mapping[str, Sequence[Charge]],
        *,
        epsilon: float | Mapping[str, float],
        delta: float,
    ) -> None:
        """Reserve a whole plan within a budget; later charges must be part of the plan.

        Each grant is written to the ledger.

        Guarantee: no partition's epsilon, past and planned charges together, exceeds `epsilon` at
        `delta` (under replace-one, the same holds for any two partitions together).

        A plan covers the whole life of the partitions. Charges of the plan that were made before
        are not made again, so a run that is resumed, or continues with new partitions, grants the
        same as one run without a break. A new plan replaces the one before, whose unused part
        expires.

        Args:
            charges: partition to all charges that are planned for it, from the beginning.
            epsilon: largest epsilon that may be spent, above 0; one for all partitions, or one for
                each (add-remove only).
            delta: number in (0, 1).

        Raises:
            BudgetError: if the plan would cost more.
            LedgerError: if a partition was not declared.
        """
        each = (
            dict(epsilon) if isinstance(epsilon, Mapping) else dict.fromkeys(self.groups(), epsilon)
        )
        for target in epsilon.values() if isinstance(epsilon, Mapping) else [epsilon]:
            check_target(target, delta)
        self._known([*charges, *(epsilon if isinstance(epsilon, Mapping) else ())])
        plan = {
            name: [list(asdict(c).values()) for c in merged(planned)]
            for name, planned in charges.items()
        }
        body: Body = {
            "kind": "grant",
            "charges": plan,
            "epsilon": each if isinstance(epsilon, Mapping) else float(epsilon),
            "delta": float(delta),
        }
        text = canonical_json(body)
        if text not in self._plans:
            self._check(charges, each, delta)
            self._write(body)
        self._lapsed = text != self._plans[-1]

    def charge(self, entry: Entry) -> str:
        """Write `entry` to disk and return its digest; only then its noise may be drawn.

        If the entry was written before, nothing is appended, and its noise will be the same.

        Raises:
            BudgetError: if a grant is in force and does not contain the entry.
            LedgerError: if a partition was not declared, or if the unit, relation or kind of noise
                differs from this ledger's.
        """
        for field, own in (
            ("unit", self.unit),
            ("relation", self.relation),
            ("simulated", self._key.simulated),
        ):
            if getattr(entry, field) != own:
                raise LedgerError(
                    f"the entry has {field} = {getattr(entry, field)!r}, but the ledger has "
                    f"{own!r}; make the entry with {field} = {own!r}, or use another ledger"
                )
        self._known(entry.scope)
        self.chain.hold()  # also if nothing is appended, because noise is drawn afterwards
        if entry.digest not in self._digests:
            self._allow(entry)
            self._write({"kind": "entry", **asdict(entry)})
        return entry.digest

    def has(self, entry: Entry) -> bool:
        """Return True if the entry was charged before."""
        return entry.digest in self._digests

    def project(self, entry: Entry, delta: float) -> dict[str, float]:
        """Epsilon of each partition that `entry` touches, computed as if it had been charged.

        The ledger does not change.
        """
        self._known(entry.scope)
        spent = {}
        for partition in entry.scope:
            new = () if entry.digest in self._digests else (entry.charge([partition]),)
            history = [*self.charges(partition), *(charge for charge in new if charge is not None)]
            spent[partition] = accounting.epsilon(history, delta=delta, relation=self.relation)
        return spent

    def take(self, body: Body) -> None:
        """Add one line to the account, and update the charges that the grant still allows."""
        super().take(body)
        if body["kind"] == "grant":
            self._plans.append(canonical_json(body))
            self._allowance = {
                (name, *charge.kind): max(0, charge.steps - self._charged(name).get(charge.kind, 0))
                for name, plan in body["charges"].items()
                for charge in (Charge(*values) for values in plan)
            }
        elif body["kind"] == "entry":
            entry = self.entries[-1]
            self._digests.add(entry.digest)
            for partition, charge in self._each(entry) if self._plans else ():
                self._allowance[partition, *charge.kind] -= charge.steps

    def _write(self, body: Body) -> None:
        self.chain.append(body)
        if body["kind"] != "header":
            self.take(body)
        self.trace("ledger.head-written")

    def _known(self, partitions: Iterable[str]) -> None:
        for partition in partitions:
            if partition not in self.sizes:
                raise LedgerError(
                    f"partition {partition!r} has no declared size; call declare() for it first"
                )

    def _allow(self, entry: Entry) -> None:
        for partition in entry.scope:
            before = self.index.draws.get(partition, 0)
            if before + entry.draws > MOST_DRAWS:
                raise BudgetError(
                    f"partition {partition!r} would need {before + entry.draws} noise values; "
                    f"allowed: at most {MOST_DRAWS}, because the computed epsilon is valid only "
                    "up to this number; train for fewer steps"
                )
        if not self._plans:
            return
        allowance = {} if self._lapsed else self._allowance
        for partition, charge in self._each(entry):
            left = allowance.get((partition, *charge.kind), 0)
            if left < charge.steps:
                rate, sigma, noise = charge.kind
                raise BudgetError(
                    f"partition {partition!r}: given {charge.steps} steps of {noise} noise at "
                    f"sampling rate {rate:g} and noise multiplier {sigma:g}, but the grant allows "
                    f"{left} such steps; grant a plan that contains them"
                )

    def _charged(self, partition: str) -> dict[object, int]:
        """Number of steps charged to the partition so far, by kind of mechanism."""
        return {charge.kind: charge.steps for charge in self.history([partition])}

    def _new(self, partition: str, plan: Iterable[Charge]) -> Iterator[Charge]:
        """Yield the part of the plan that is not yet charged."""
        done = self._charged(partition)
        for charge in merged(plan):
            yield replace(charge, steps=max(0, charge.steps - done.get(charge.kind, 0)))

    def _each(self, entry: Entry) -> Iterator[tuple[str, Charge]]:
        """Yield each partition that the entry touches with the charge of one of its records."""
        for partition in entry.scope:
            charge = entry.charge([partition])
            assert charge is not None
            yield partition, charge

    def _check(
        self, charges: Mapping[str, Sequence[Charge]], targets: Mapping[str, float], delta: float
    ) -> None:
        plans = {
            name: merged(
                [
                    *self.exposure(group),
                    *(c for p in group for c in self._new(p, charges.get(p, ()))),
                ]
            )
            for name, group in self.groups().items()
            if not charges.keys().isdisjoint(group)
        }
        asked = {(plan, targets[name]) for name, plan in plans.items()}
        over = {
            each
            for each in asked
            if not accounting.within(*each, delta=delta, relation=self.relation)
        }
        if not over:
            return
        beyond = {name: plan for name, plan in plans.items() if (plan, targets[name]) in over}
        name, cost = accounting.worst(beyond, delta=delta, relation=self.relation)
        epsilon = targets[name]
        before = self.epsilon(self.groups()[name], delta=delta)
        raise BudgetError(
            f"partition {name!r} would reach epsilon {cost:.4g} ({before:.4g} of it spent "
            "before), which is "
            f"{cost - epsilon:.2g} above the {epsilon:g} granted at delta {delta:g}; plan "
            "fewer steps, a "
            "larger noise multiplier or a larger epsilon"
        )
