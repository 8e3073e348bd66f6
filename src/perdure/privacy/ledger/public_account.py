"""Public account of a ledger: its charges without its lines, which another party may hold.

The server of a federation holds one of each client. It states the client's epsilon from it, and
after a client lost its ledger, it tells the client what the lost one had charged.
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, astuple, dataclass, fields, replace
from typing import Any

from perdure.errors import ConfigError, LedgerError
from perdure.privacy.accounting import calibration as accounting
from perdure.privacy.accounting.charges import Charge, History, covers, merged
from perdure.privacy.ledger.account import (
    COUNTED,
    NOT_COUNTED,
    NOT_KNOWN,
    SAMPLINGS,
    Account,
    Statement,
)
from perdure.privacy.ledger.entries import STATED
from perdure.privacy.ledger.storage import canonical_json

LONGEST = 1_000_000
MOST_CHARGES = 1_000
"""Largest number of characters of an account in a message, and of charges of a partition."""
LEAST_RATE = 1e-12
NOISES = (1e-12, 1e15)
MOST_STEPS = 10**12
"""Bounds of a charge that another party reports, within which an accountant can compute."""
KINDS = {"owner": str, "simulated": bool, "continues": bool, "lost": int, "delta": float}
CHOICES: Mapping[str, Collection[str]] = {
    "unit": ("record",),
    "relation": ("add-remove",),
    "sampling": SAMPLINGS,
    "independence": (*STATED, NOT_KNOWN),
}
"""Types, and allowed values, of the fields of an account that another party has sent."""


@dataclass(frozen=True, kw_only=True)
class PublicAccount:
    """Public facts about a ledger: partitions, charges, and everything that epsilon needs.

    Args:
        owner: owner of the ledger.
        unit: protected unit.
        relation: neighbouring relation.
        delta: delta that the run was asked for.
        simulated: True if any noise was simulated.
        sampling: sampling in words, as in `Account.sampling`.
        independence: how records are known to be independent, as in `Account.independence`.
        public_facts: facts that were found in the records, as in `Statement`.
        continues: True if charges of a model's earlier training were carried over.
        lost: number of earlier ledgers of the owner that were lost; their charges are included.
        noise: noise multiplier of a step in each experience.
        sizes: declared size of every partition.
        charges: charges of the run to every partition, also those in lost ledgers.
        outside: charges from outside the run, with which a new ledger would begin, too.
    """

    owner: str
    unit: str
    relation: str
    delta: float
    simulated: bool
    sampling: str
    independence: str
    public_facts: tuple[str, ...]
    continues: bool
    lost: int
    noise: tuple[float, ...]
    sizes: Mapping[str, int]
    charges: Mapping[str, History]
    outside: Mapping[str, History]

    @classmethod
    def of(
        cls, account: Account, *, outside: Collection[str], noise: tuple[float, ...], lost: int = 0
    ) -> "PublicAccount":
        """Return the public account of a ledger.

        Args:
            account: the ledger; its delta must be known.
            outside: purposes of the entries for charges from outside the run.
            noise: noise multiplier of a step in each experience.
            lost: number of earlier ledgers that were lost.
        """
        assert account.delta is not None
        before = _charges_for(account, outside)
        own = {
            name: _without(account.history([name]), before.get(name, ())) for name in account.sizes
        }
        return cls(
            owner=account.owner,
            unit=account.unit,
            relation=account.relation,
            delta=account.delta,
            simulated=account.simulated,
            sampling=account.sampling,
            independence=account.independence,
            public_facts=account.found_in_records,
            continues=account.continues,
            lost=lost,
            noise=noise,
            sizes=dict(account.sizes),
            charges=own,
            outside=before,
        )

    def text(self) -> str:
        """Return the account as canonical JSON, which `parse` reads."""
        histories = {
            name: {key: [list(astuple(each)) for each in charges] for key, charges in found.items()}
            for name, found in (("charges", self.charges), ("outside", self.outside))
        }
        return canonical_json(asdict(self) | histories)

    @classmethod
    def parse(cls, text: str, *, where: str) -> "PublicAccount":
        """Read an account that another party has sent; nothing in it is believed unchecked.

        Args:
            text: the text.
            where: name of the party, for the message.

        Raises:
            LedgerError: if the text is not an account.
        """
        try:
            if len(text) > LONGEST:
                raise ValueError(f"{len(text)} characters, above {LONGEST}")
            return cls(**_checked(json.loads(text)))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ConfigError) as e:
            told = str(e)[:200]
            raise LedgerError(
                f"{where} reports an account that cannot be read ({told}); allowed: the text of "
                "PublicAccount; install the same perdure on all sites"
            ) from e

    def continues_from(self, old: "PublicAccount") -> bool:
        """Return True if this account has all charges of an older one of the same party."""
        return all(covers(self.charges.get(name, ()), old.charges[name]) for name in old.charges)

    def statement(self) -> Statement:
        """Return the worst epsilon of the owner's records, with the facts that it needs."""
        histories = {
            name: [*self.charges[name], *self.outside.get(name, ())] for name in self.sizes
        }
        return Statement(
            epsilon=accounting.worst(histories, delta=self.delta)[1],
            delta=self.delta,
            unit=self.unit,
            relation=self.relation,
            accountant="pld",
            sampling=self.sampling,
            trust="trusted curator",
            simulated=self.simulated,
            units=sum(self.sizes.values()),
            independence=self.independence,
            public_facts=self.public_facts,
            before=COUNTED if self.continues else NOT_COUNTED,
        )


def _charges_for(account: Account, purposes: Collection[str]) -> dict[str, History]:
    """Return the charges of all entries with these purposes, by partition."""
    found: dict[str, list[Charge]] = {}
    for purpose in purposes:
        for place in account.index.purposes.get(purpose, ()):
            entry = account.entries[place]
            for partition in entry.scope:
                charge = entry.charge([partition])
                assert charge is not None
                found.setdefault(partition, []).append(charge)
    return {name: merged(each) for name, each in found.items()}


def _without(history: History, some: Collection[Charge]) -> History:
    """Return a history without the steps of some of its charges."""
    less = {charge.kind: charge.steps for charge in some}
    return merged(replace(each, steps=each.steps - less.get(each.kind, 0)) for each in history)


def _history(rows: list[Any]) -> History:
    """Read the charges of a partition."""
    if len(rows) > MOST_CHARGES:
        raise ValueError(f"{len(rows)} charges of a partition, above {MOST_CHARGES}")
    charges = [Charge(*each) for each in rows]
    for each in charges:
        noisy = not each.noise_multiplier or NOISES[0] <= each.noise_multiplier <= NOISES[1]
        if not noisy or each.sampling_rate < LEAST_RATE or each.steps > MOST_STEPS:
            raise ValueError(f"the charge {each}")
    return merged(charges)


def _checked(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an account after checking type and range of each."""
    if set(facts) != {each.name for each in fields(PublicAccount)}:
        raise ValueError(f"the fields {sorted(facts)}")
    sizes, noise, told = dict(facts["sizes"]), tuple(facts["noise"]), tuple(facts["public_facts"])
    wrong = [name for name, kind in KINDS.items() if type(facts[name]) is not kind]
    wrong += [name for name, values in CHOICES.items() if facts[name] not in values]
    valid = {
        "delta": 0 < facts["delta"] < 1,
        "lost": facts["lost"] >= 0,
        "sizes": all(type(size) is int and size > 0 for size in sizes.values()),
        "noise": bool(noise) and all(type(each) is float and 0 < each < math.inf for each in noise),
        "public_facts": all(type(each) is str for each in told),
    }
    wrong += [name for name, right in valid.items() if not right]
    if wrong:
        raise ValueError(f"the field {wrong[0]}")
    charges, outside = (
        {str(key): _history(rows) for key, rows in facts[name].items()}
        for name in ("charges", "outside")
    )
    if charges.keys() != sizes.keys() or not outside.keys() <= sizes.keys():
        raise ValueError("partitions without a size")
    return facts | {
        "sizes": sizes,
        "noise": noise,
        "public_facts": told,
        "charges": charges,
        "outside": outside,
    }
