"""Tables of a ledger: partitions, their charges, and their epsilons.

They are used by the command `perdure ledger`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from perdure.errors import PrivacyError
from perdure.privacy.accounting import calibration as accounting
from perdure.privacy.accounting.charges import Charge
from perdure.privacy.ledger.entries import Entry
from perdure.privacy.ledger.merged import Merged
from perdure.report.wording import epsilon_number

TERMS = (
    "q: sampling rate · sigma: noise multiplier · C: clip norm · epsilon of one record of the "
    "partition, rounded up"
)


@dataclass(frozen=True, kw_only=True)
class ChargeSummary:
    """Charges of one mechanism to the records of a partition, with equal charges added up.

    Args:
        purpose: purpose in the ledger's entries.
        mechanism: mechanism in the ledger's entries.
        accounted: kind of noise that the accountant uses (see `Charge`).
        sampling: sampling in the ledger's entries.
        sampling_rate: probability that a record was in a step.
        noise_multiplier: noise multiplier in the ledger's entries.
        clip_norm: clip norm in the ledger's entries.
        steps: number of steps.
        participations: largest number of the steps that contained one record; all of them if
            records were sampled at random.
    """

    purpose: str
    mechanism: str
    accounted: str
    sampling: str
    sampling_rate: float
    noise_multiplier: float
    clip_norm: float
    steps: int
    participations: int

    def __str__(self) -> str:
        rate = "" if self.sampling == "none" else f"q {self.sampling_rate:.4g}, "
        strength = f"{rate}sigma {self.noise_multiplier:.4g}, C {self.clip_norm:.4g}"
        few = (
            f", a record in {self.participations} of them"
            if self.participations < self.steps
            else ""
        )
        return f"{self.steps} x {self.purpose} ({self.mechanism}{few}) at {strength}"


@dataclass(frozen=True, kw_only=True)
class Exposed:
    """Privacy cost of one partition of one owner.

    Args:
        owner: name of the owner.
        partition: name of the partition.
        declared_size: declared number of records of the partition.
        uses: charges of the partition.
        epsilon_pld: epsilon that is reported.
        epsilon_rdp: looser epsilon, for comparison; None if RDP has no bound.
        worst: True if no other partition has a larger epsilon (under replace-one, True for both
            partitions of the worst pair).
    """

    owner: str
    partition: str
    declared_size: int
    uses: tuple[ChargeSummary, ...]
    epsilon_pld: float
    epsilon_rdp: float | None
    worst: bool = False


@dataclass(frozen=True, kw_only=True)
class Projected:
    """Epsilon of one partition now, and after one more charge."""

    owner: str
    partition: str
    before: float
    after: float


def silent() -> None:
    """Default of the arguments `tick`: a callback that does nothing."""


def places(account: Merged) -> dict[str, tuple[str, str]]:
    """Map each partition of a merged account to its owner, and its name in the owner's ledger."""
    own = [(part.account.owner, name) for part in account.parts for name in part.account.sizes]
    return dict(zip(account.partitions, own, strict=True))


def exposures(account: Merged, delta: float, tick: Callable[[], None] = silent) -> list[Exposed]:
    """Compute the privacy cost of each partition of an account, in the order of the ledgers.

    Args:
        account: account with the charges.
        delta: delta of the epsilons, in (0, 1).
        tick: called after every partition; each can take a second.
    """
    rows = []
    for name, (owner, partition) in places(account).items():
        rows.append(
            Exposed(
                owner=owner,
                partition=partition,
                declared_size=account.sizes[name],
                uses=uses(account.entries, name),
                epsilon_pld=account.epsilon([name], delta=delta),
                epsilon_rdp=renyi(account, name, delta),
            )
        )
        tick()
    group, spent = account.worst(delta)
    touched = account.groups()[group] if spent else ()
    return [
        replace(row, worst=name in touched or 0 < spent == row.epsilon_pld)
        for name, row in zip(account.partitions, rows, strict=True)
    ]


def uses(entries: Iterable[Entry], partition: str) -> tuple[ChargeSummary, ...]:
    """Return the charges of a partition, in the order of the ledger's entries.

    The steps of equal mechanisms are added up.
    """
    found: dict[ChargeSummary, ChargeSummary] = {}
    for entry in entries:
        charge = entry.charge([partition])
        if charge:
            kind = ChargeSummary(
                purpose=entry.purpose,
                mechanism=entry.mechanism,
                accounted=charge.noise,
                sampling=entry.sampling,
                clip_norm=entry.clip_norm,
                sampling_rate=charge.sampling_rate,
                noise_multiplier=entry.noise_multiplier,
                steps=0,
                participations=0,
            )
            sofar = found.get(kind, kind)
            steps = sofar.steps + entry.steps
            participations = sofar.participations + charge.steps
            found[kind] = replace(kind, steps=steps, participations=participations)
    return tuple(found.values())


def renyi(account: Merged, partition: str, delta: float) -> float | None:
    """Compute epsilon by RDP; None if RDP has no bound."""
    try:
        return account.epsilon([partition], delta=delta, accountant="rdp")
    except PrivacyError:
        return None


def projections(
    account: Merged,
    charge: Charge,
    delta: float,
    chosen: Sequence[str],
    tick: Callable[[], None] = silent,
) -> list[Projected]:
    """Compute the epsilon of each chosen partition before and after one more charge.

    Args:
        account: account with the charges so far.
        charge: charge that is added.
        delta: delta of the epsilons, in (0, 1).
        chosen: names of partitions in the merged account.
        tick: called after every partition; each can take a second.
    """
    rows = []
    own = places(account)
    for name in chosen:
        history = account.charges(name)
        relation = account.relation
        before = accounting.epsilon(history, delta=delta, relation=relation)
        after = accounting.epsilon((*history, charge), delta=delta, relation=relation)
        rows.append(
            Projected(owner=own[name][0], partition=own[name][1], before=before, after=after)
        )
        tick()
    return rows


# --------------------------------------------------------------------------- tables


def exposure_table(rows: Sequence[Exposed]) -> Table:
    """Draw a table with one row per partition below its owner, with the worst one in bold."""
    drawn = _empty("records", "exposed to", "epsilon\nby PLD", "by RDP", "")
    drawn.caption = Text(TERMS)
    for owner, own in groupby(rows, key=lambda row: row.owner):
        _head(drawn, owner)
        for row in own:
            cells = (
                f"  {printable(row.partition)}",
                str(row.declared_size),
                told(row.uses),
                epsilon_number(row.epsilon_pld),
                epsilon_number(row.epsilon_rdp),
                "worst" if row.worst else "",
            )
            drawn.add_row(*map(Text, cells), style="bold" if row.worst else "")
    return drawn


def projection_table(rows: Sequence[Projected]) -> Table:
    """Draw a table with one row per partition below its owner, the worst one after it in bold."""
    drawn = _empty("epsilon now", "epsilon after")
    most = max((row.after for row in rows), default=0.0)
    for owner, own in groupby(rows, key=lambda row: row.owner):
        _head(drawn, owner)
        for row in own:
            cells = (
                f"  {printable(row.partition)}",
                epsilon_number(row.before),
                epsilon_number(row.after),
            )
            drawn.add_row(*map(Text, cells), style="bold" if row.after == most else "")
    return drawn


def _empty(*columns: str) -> Table:
    drawn = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, caption_justify="left"
    )
    drawn.add_column("owner, partition", overflow="fold")
    for name in columns:
        text = name == "exposed to"
        drawn.add_column(
            name, overflow="fold", justify="left" if text else "right", no_wrap=not text
        )
    return drawn


def _head(drawn: Table, owner: str) -> None:
    drawn.add_section()
    drawn.add_row(Text(printable(owner)))


def told(uses: Sequence[ChargeSummary]) -> str:
    """Describe charges in words, one line per mechanism."""
    return "\n".join(printable(str(use)) for use in uses) or "nothing yet"


def printable(text: str) -> str:
    """Replace characters of a ledger's text that could control a terminal by their escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


# --------------------------------------------------------------------------- for machines


def document(rows: Iterable[Exposed]) -> list[dict[str, Any]]:
    """Convert rows to objects that strict JSON can hold.

    Null means an infinite epsilon, or no bound by RDP.
    """
    return [finite(asdict(row)) for row in rows]


def finite(row: Mapping[str, object]) -> dict[str, object]:
    """Replace infinite numbers in a row by null, because JSON has no infinity."""
    return {n: None if isinstance(v, float) and math.isinf(v) else v for n, v in row.items()}
