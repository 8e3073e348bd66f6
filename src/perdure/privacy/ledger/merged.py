"""Several ledgers read as one account."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from perdure.errors import LedgerError
from perdure.privacy.ledger.account import Account, Statement
from perdure.privacy.ledger.ledger import Ledger
from perdure.privacy.ledger.storage import (
    SCHEMA,
    Body,
    SealedHead,
    canonical_json,
    cover,
    head_path,
    load,
    read_lines,
)
from perdure.privacy.noise.key import NoiseKey
from perdure.utils.atomic_files import write_atomically


@dataclass(frozen=True)
class Part:
    """Ledger lines of one curator inside a merged account, with the head of the ledger."""

    account: Account
    lines: tuple[str, ...]
    head: SealedHead
    keyed: bool


class Merged(Account):
    """Accounts of several curators in one, with partitions named `owner/partition`.

    Guarantee: the stated epsilon is the worst over all partitions of all owners, for a record that
    is in one partition. A record that several owners hold is exposed several times: give all its
    partitions to `epsilon(...)`.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        first = parts[0].account if parts else Account()
        super().__init__(unit=first.unit, relation=first.relation)
        self.parts = tuple(parts)
        # the smallest delta, because a statement for it also holds for larger ones
        known = [part.account.delta for part in parts if part.account.delta is not None]
        self.delta = min(known, default=None)
        for part in parts:
            self._join(part.account)

    def _join(self, account: Account) -> None:
        if (account.unit, account.relation) != (self.unit, self.relation):
            raise LedgerError(
                f"the ledger of {account.owner!r} has unit {account.unit} and relation "
                f"{account.relation}, but the other ledgers have unit {self.unit} and relation "
                f"{self.relation}; merge only ledgers with the same unit and relation"
            )
        names = {
            name: f"{account.owner}/{name}" if account.owner else name for name in account.sizes
        }
        if not self.sizes.keys().isdisjoint(names.values()):
            raise LedgerError(
                f"two ledgers have the owner {account.owner!r}; give each learner a different "
                "owner=..., or read the ledgers one by one"
            )
        self.sizes |= {names[name]: size for name, size in account.sizes.items()}
        self.public_facts |= {names[name]: told for name, told in account.public_facts.items()}
        for entry in account.entries:
            self.entries.append(
                replace(entry, scope={names[name]: rate for name, rate in entry.scope.items()})
            )

    @property
    def simulated(self) -> bool:
        """Return True if the noise of any owner came from a seed that somebody chose."""
        return any(part.account.simulated for part in self.parts)

    @property
    def verified(self) -> str:
        """Return the checks that were made when the ledgers were read, in words."""
        if all(part.keyed for part in self.parts):
            return "chains and keyed heads verified"
        return (
            "chains verified, heads not verified: without the key of an owner, the whole history "
            "could be forged"
        )

    def per_client(self, delta: float) -> dict[str, float]:
        """Worst epsilon of each owner; if an owner has several ledgers, the largest one."""
        spent: dict[str, float] = {}
        for part in self.parts:
            own = part.account.epsilon(delta=delta)
            spent[part.account.owner] = max(own, spent.get(part.account.owner, 0.0))
        return spent

    def statement(self, delta: float) -> Statement:
        """Return the statement on the worst epsilon over all owners.

        If the owners are several clients, each trusts its own curator, and the statement says so.
        """
        stated = super().statement(delta)
        if not self._of_several_clients:
            return stated
        return replace(stated, trust=f"{stated.trust} per client")

    @property
    def _of_several_clients(self) -> bool:
        """Return True if several clients have a ledger here; each arm of a run has one ledger."""
        owners = [part.account.owner for part in self.parts]
        # without ARM/client-1, ARM/client-0 is the only party of each arm
        parties = {re.sub(r".*/(client-\d+)", r"\1", owner) for owner in owners}
        return len(parties) > 1 or len(set(owners)) < len(owners)

    def export(self, path: Path) -> None:
        """Write one file with every chain and head, so that a reader can verify each of them.

        The lines of each ledger are copied unchanged.
        """
        lines = [_title(len(self.parts))]
        for part in self.parts:
            lines += [part.head.text(), *part.lines]
        write_atomically(path, "".join(f"{line}\n" for line in lines).encode())


def merge(ledgers: Iterable[Path | Ledger]) -> Merged:
    """Read several ledgers as one account; each is an open ledger or a file, also a merged file.

    Raises:
        LedgerError: if a file is damaged, if two owners are equal, or if units or relations differ.
    """
    parts: list[Part] = []
    for ledger in ledgers:
        if isinstance(ledger, Path):
            parts += read(ledger).parts
        else:
            account = Account.replay(ledger.chain.bodies, where=ledger.owner)
            parts.append(Part(account, tuple(ledger.chain.lines), ledger.chain.head, keyed=True))
    return Merged(parts)


def read(path: Path, keys: Mapping[str, NoiseKey] | None = None) -> Merged:
    """Read a ledger file and its head file, or a file that `export` wrote; no file is changed.

    Args:
        path: path of the ledger or exported file.
        keys: owner to key. The head of an owner without a key is not verified, and `verified` says
            so.

    Raises:
        LedgerError: if a file is damaged; the message names the line.
    """
    if not head_path(path).exists():
        return Merged(list(_parts(path, keys or {})))
    lines, bodies, head = load(path, None)
    if not bodies:  # the run stopped before its first line, so nothing was charged
        return Merged([])
    return Merged([_part(lines, bodies, head, keys or {}, str(path))])


def _parts(path: Path, keys: Mapping[str, NoiseKey]) -> Iterator[Part]:
    lines = read_lines(path)
    start = 1
    for _ in range(_count(lines, path)):
        head = SealedHead.parse(
            lines[start] if start < len(lines) else "", where=f"{path}, line {start + 1}"
        )
        chain = lines[start + 1 : start + 1 + head.count]
        bodies = cover(chain, head, where=str(path), first=start + 2)
        yield _part(chain, bodies, head, keys, f"{path}, line {start + 1}")
        start += 1 + head.count
    if start != len(lines) or not path.read_bytes().endswith(b"\n"):
        raise LedgerError(
            f"{path}, line {start + 1}: the file must end here, after the last ledger, but there "
            "is more text; restore the file from a backup"
        )


def _count(lines: Sequence[str], path: Path) -> int:
    for count in re.findall(r'"ledgers":(\d{1,9}),', lines[0] if lines else ""):
        if lines[0] == _title(int(count)):
            return int(count)
    raise LedgerError(
        f"{path}, line 1: the file is not an exported ledger, and its head {head_path(path).name} "
        "is missing in the same folder"
    )


def _title(count: int) -> str:
    return canonical_json({"kind": "merged", "schema": SCHEMA, "ledgers": count})


def _part(
    lines: Sequence[str],
    bodies: Sequence[Body],
    head: SealedHead,
    keys: Mapping[str, NoiseKey],
    where: str,
) -> Part:
    account = Account.replay(bodies, where=where)
    key = keys.get(account.owner)
    if key is not None:
        head.check(key, where=where)
    return Part(account, tuple(lines), head, keyed=key is not None)
