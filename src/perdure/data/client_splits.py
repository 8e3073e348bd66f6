"""Split a stream over the clients of a simulated federation.

In a real federation the split is given; here it follows from a seed. The client of a record is
decided by a hash of its id and by the shares of its label, so that a record that occurs in several
experiences stays with one client.

With `exact=True`, the default, every client gets at least `min_size` records, if necessary from
another client. Removing one record can then move others, which privacy does not allow. With
`exact=False` the hash alone decides, and removing one record moves no other. A minimum size then
holds for expected numbers, through the public shares, and sizes are declared: given as arguments,
or computed from the shares and the sizes that the stream declares.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from perdure.data.experience import Experience, Stream, placed_again, require_stream, size_of_each
from perdure.data.records import Records
from perdure.data.scenarios import hashable, public_coin
from perdure.errors import ConfigError
from perdure.tasks import SingleLabel, refuse_other_tasks
from perdure.utils.checked_arguments import checked_arguments
from perdure.utils.seeding import derive

Shares = Callable[[str, int], Tensor]
"""Function from (partition, label) to (clients,) float64 shares of the label, with sum 1."""
ACTUAL_SIZES = "None with exact=True, which declares the actual sizes; use exact=False"
"""Sizes that are allowed where records are counted."""


@checked_arguments
def dirichlet(
    stream: Stream,
    *,
    clients: int,
    alpha: float,
    min_size: int = 1,
    seed: int = 0,
    exact: bool = True,
    declared_size: int | Sequence[int] | None = None,
    client_sizes: Sequence[Sequence[int]] | None = None,
) -> list[Stream]:
    """Split every experience over the clients by a Dirichlet distribution of label shares.

        shares of label y ~ Dir(alpha, ..., alpha)
        client(record) = the client whose share contains u, where u in [0, 1) is a hash of the
        record's id and the seed

    `exact=True`: a client with less than `min_size` records of an experience gets records of the
    largest client, one at a time; declared sizes are the actual numbers. `exact=False`: all shares
    move towards 1 / clients, by the smallest amount that gives every client `min_size` expected
    records. Every client gets all test records, which are public. The partition of client 3 and
    experience 0 is called client-3/experience-0.

    Guarantee: with `exact=False`, the client of a record depends only on the record and public
    facts. With `exact=True` it also depends on other records, and `assigned_by_record` of the
    streams is False.

    Args:
        stream: stream to split.
        clients: number of clients.
        alpha: concentration; near 0 all records of a label go to one client, and for large values
            all clients have similar data.
        min_size: smallest number of records of each client in each experience; with `exact=False`
            an expected number, computed with equally large classes.
        seed: public seed of the label shares and of the hash u.
        exact: True for exact sizes, False for declared sizes (needed under privacy).
        declared_size: public number of records of an experience over all clients; one for all
            experiences, or one for each; only with `exact=False`. Default: the sizes that the
            stream declares.
        client_sizes: public number of records of every client (outer) in every experience (inner),
            0 for a gap; only without `exact`. Default: the expected numbers.

    Raises:
        ConfigError: if a value is out of range, an experience has fewer than clients * min_size
            records, or declared sizes are given with `exact`.

    Source: Hsu, Qi, Brown 2019, "Measuring the effects of non-identical data distribution for
    federated visual classification", section 3.
    """
    require_stream(stream)
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError.of("alpha", alpha, "a finite number above 0")
    reason = "shares differ from class to class; perdure.data.iid splits records of every task"
    refuse_other_tasks(stream.task, (SingleLabel,), "dirichlet", reason)

    def shares(partition: str, label: int) -> Tensor:
        draw = np.random.default_rng(derive(seed, "dirichlet", partition, label))
        return torch.from_numpy(draw.dirichlet(np.full(clients, alpha)))

    split = ClientSplit(
        clients=clients, min_size=min_size, seed=seed, shares=shares, rule=f"dirichlet {alpha!r}"
    )
    return split.of(stream, exact, declared_size, client_sizes)


@checked_arguments
def iid(
    stream: Stream,
    *,
    clients: int,
    min_size: int = 1,
    seed: int = 0,
    exact: bool = True,
    declared_size: int | Sequence[int] | None = None,
    client_sizes: Sequence[Sequence[int]] | None = None,
) -> list[Stream]:
    """Split every experience evenly over the clients.

    Every record goes to each client with the same probability. See `dirichlet` for the guarantee.

    Args:
        stream: stream to split.
        clients: number of clients.
        min_size: smallest number of records of each client in each experience; with `exact=False`
            an expected number.
        seed: public seed of the choice of clients.
        exact: True for exact sizes, False for declared sizes (needed under privacy).
        declared_size: public number of records of an experience over all clients; one for all
            experiences, or one for each; only with `exact=False`. Default: the sizes that the
            stream declares.
        client_sizes: public number of records of every client (outer) in every experience (inner),
            0 for a gap; only without `exact`. Default: the expected numbers.

    Raises:
        ConfigError: if a value is out of range, an experience has fewer than clients * min_size
            records, or declared sizes are given with `exact`.
    """
    require_stream(stream)
    split = ClientSplit(
        clients=clients,
        min_size=min_size,
        seed=seed,
        shares=lambda partition, label: torch.ones(clients).double() / clients,
        rule="iid",
    )
    return split.of(stream, exact, declared_size, client_sizes)


@dataclass(frozen=True, kw_only=True)
class ClientSplit:
    """Rule that splits streams over clients.

    Args:
        clients: number of clients.
        min_size: smallest number of records of each client in each experience.
        seed: public seed of the hash.
        shares: function that gives the public shares of every label.
        rule: name of the distribution of the shares, part of the digest `placed_by`.
    """

    clients: int
    min_size: int
    seed: int
    shares: Shares
    rule: str

    def __post_init__(self) -> None:
        for field in ("clients", "min_size"):
            if getattr(self, field) < 1:
                raise ConfigError.of(field, getattr(self, field), "whole numbers from 1")

    def of(
        self,
        stream: Stream,
        exact: bool,
        declared_size: int | Sequence[int] | None,
        client_sizes: Sequence[Sequence[int]] | None,
    ) -> list[Stream]:
        """Return the streams of all clients; see `dirichlet` for the arguments."""
        if not exact:
            return self._by_record(stream, declared_size, client_sizes)
        for field, value in (("declared_size", declared_size), ("client_sizes", client_sizes)):
            if value is not None:
                raise ConfigError.of(field, value, ACTUAL_SIZES)
        homes: dict[str, dict[int, int]] = {}
        coin = derive(self.seed, "owner")
        owners = [
            _owners(
                e,
                homes.setdefault(e.train.partition, {}),
                self.clients,
                self.min_size,
                coin,
                self.shares,
            )
            for e in stream
        ]
        whole = replace(stream, assigned_by_record=placed_again(stream, by_record=False))
        unknown = [[None] * self.clients] * len(stream)
        return of_clients(whole, owners, self.clients, unknown, "")

    def _by_record(
        self,
        stream: Stream,
        declared_size: int | Sequence[int] | None,
        client_sizes: Sequence[Sequence[int]] | None,
    ) -> list[Stream]:
        totals = [
            e.train.declared_size if size is None else size
            for e, size in zip(stream, size_of_each(declared_size, len(stream)), strict=True)
        ]
        tables = self._tables(stream, totals)
        owners = []
        homes: dict[str, dict[int, int]] = {}
        for experience, table in zip(stream, tables, strict=True):
            known = homes.setdefault(experience.train.partition, {})
            owners.append(_hashed_owners(experience, known, table, derive(self.seed, "owner")))
        sizes = self._declared(tables, totals, client_sizes)
        whole = replace(stream, assigned_by_record=placed_again(stream, hashable(stream)))
        settings = [self.rule, self.clients, self.min_size, self.seed, list(totals), sizes]
        return of_clients(whole, owners, self.clients, sizes, repr(settings))

    def _tables(self, stream: Stream, totals: Sequence[int]) -> list[Tensor]:
        """Return, for every experience, the share of each label that each client gets.

        Each tensor is (classes, clients), and gives every client `min_size` expected records.
        Experiences of one partition have the same shares for the same class, so that copies of a
        record stay with one client, as far as declared facts allow this.
        """
        first: dict[str, Experience] = {}
        tables = []
        evened: dict[str, float] = {}
        for experience, total in zip(stream, totals, strict=True):
            partition = experience.train.partition
            # a permuted copy in a task-incremental stream has the labels of another task
            origin = first.setdefault(partition, experience).classes
            same = len(origin) == len(experience.classes)
            keys = _strata(experience, origin if same else experience.classes)
            table = torch.stack([self.shares(partition, key) for key in keys])
            need = self._evening(experience, table.mean(0), total)
            evened[partition] = max(evened.get(partition, 0.0), need)
            tables.append(table)
        return [
            torch.lerp(table, torch.full_like(table, 1 / self.clients), evened[e.train.partition])
            for e, table in zip(stream, tables, strict=True)
        ]

    def _evening(self, experience: Experience, expected: Tensor, total: int) -> float:
        """Return the weight in [0, 1] with which the shares are moved towards equal shares.

        It is the smallest that gives every client `min_size` expected records.
        """
        if total < self.clients * self.min_size:
            allowed = (
                f"at most {total // self.clients}: experience {experience.index} has {total} "
                f"declared records for {self.clients} clients"
            )
            raise ConfigError.of("min_size", self.min_size, allowed)
        least = total * float(expected.min())
        even = total / self.clients
        if least >= self.min_size:
            return 0.0
        return min(1.0, (self.min_size - least) / (even - least))

    def _declared(
        self,
        tables: Sequence[Tensor],
        totals: Sequence[int],
        client_sizes: Sequence[Sequence[int]] | None,
    ) -> list[list[int]]:
        """Return the declared size of every client (inner) in every experience (outer)."""
        if client_sizes is None:
            expected = [total * table.mean(0) for table, total in zip(tables, totals, strict=True)]
            return [[max(1, round(size)) for size in row.tolist()] for row in expected]
        return sizes_by_experience(client_sizes, self.clients, len(tables))


def sizes_by_experience(
    client_sizes: Sequence[Sequence[int]], clients: int, experiences: int
) -> list[list[int]]:
    """Return declared sizes with the experiences outside and the clients inside.

    Args:
        client_sizes: size of every client (outer) in every experience (inner), 0 for a gap.
        clients: number of clients.
        experiences: number of experiences.

    Raises:
        ConfigError: for another number of sizes, a negative size, or a client of gaps alone.
    """
    shape = (len(client_sizes), *{len(row) for row in client_sizes})
    least = min((size for row in client_sizes for size in row), default=0)
    if shape != (clients, experiences) or least < 0 or not all(map(any, client_sizes)):
        allowed = (
            f"{clients} rows (one per client) of {experiences} sizes from 0 (one per experience), "
            "with a size above 0 in each"
        )
        raise ConfigError.of("client_sizes", [list(row) for row in client_sizes], allowed)
    return [list(column) for column in zip(*client_sizes, strict=True)]


def _hashed_owners(
    experience: Experience, homes: dict[int, int], table: Tensor, seed: int
) -> Tensor:
    """(n,) client of each training record, from its hash and the row of `table` for its label.

    A record that occurred before keeps its client: `homes` maps record ids to clients.
    """
    records = experience.train
    strata = _strata(experience, experience.classes)
    row_of = torch.zeros(max(strata) + 1, dtype=torch.int64)
    row_of[list(strata)] = torch.arange(len(strata))
    coins = public_coin(records.ids, seed=seed)
    owners = _in_shares(coins, table.cumsum(1), row_of[_stratum(records)])
    ids = records.ids.tolist()
    if homes:
        known = [homes.get(i, owner) for i, owner in zip(ids, owners.tolist(), strict=True)]
        owners = torch.tensor(known, dtype=torch.int64)
    homes.update(zip(ids, owners.tolist(), strict=True))
    return owners


def _owners(
    experience: Experience,
    homes: dict[int, int],
    clients: int,
    min_size: int,
    seed: int,
    shares: Shares,
) -> Tensor:
    """Return (n,) client of each training record; `homes` maps the ids of records to clients."""
    records = experience.train
    if len(records) < clients * min_size:
        allowed = (
            f"at most {len(records) // clients}: experience {experience.index} has "
            f"{len(records)} records"
        )
        raise ConfigError.of("min_size", min_size, f"{allowed} for {clients} clients")
    coins = public_coin(records.ids, seed=seed)
    owners = _by_coin(records, coins, shares)
    ids = records.ids.tolist()
    movable = torch.tensor([i not in homes for i in ids])
    owners = torch.tensor(
        [homes.get(i, owner) for i, owner in zip(ids, owners.tolist(), strict=True)]
    )
    owners = _levelled(owners, movable, coins, clients, min_size)
    homes.update(zip(ids, owners.tolist(), strict=True))
    return owners


def _by_coin(records: Records, coins: Tensor, shares: Shares) -> Tensor:
    """Return (n,) client of each record: the one whose share contains the record's hash."""
    labels, row = torch.unique(_stratum(records), return_inverse=True)
    table = torch.stack([shares(records.partition, label) for label in labels.tolist()]).cumsum(1)
    return _in_shares(coins, table, row)


def _strata(experience: Experience, classes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the labels that have their own client shares; only 0 for records without a class."""
    return classes if isinstance(experience.task, SingleLabel) else (0,)


def _stratum(records: Records) -> Tensor:
    """Return (n,) int64 label of each record, among the labels of `_strata`, on the CPU."""
    if isinstance(records.task, SingleLabel):
        return records.labels.cpu()
    return torch.zeros(len(records), dtype=torch.int64)


def _levelled(
    owners: Tensor, movable: Tensor, coins: Tensor, clients: int, min_size: int
) -> Tensor:
    """Move records from the largest client to the smallest until all have `min_size`.

    Records with the highest hash move first.
    """
    owners = owners.clone()
    sizes = torch.bincount(owners, minlength=clients)
    while sizes.min() < min_size:
        spare = torch.bincount(owners[movable], minlength=clients).clamp(max=1) * sizes
        giver = int(spare.argmax())
        receiver = int(sizes.argmin())
        if spare[giver] <= min_size:
            raise ConfigError.of(
                "min_size",
                min_size,
                "a smaller number, because the records that could be moved already belong to "
                "clients since earlier experiences",
            )
        row = torch.where(movable & (owners == giver), coins, -1.0).argmax()
        owners[row] = receiver
        sizes[giver] -= 1
        sizes[receiver] += 1
    return owners


def of_clients(
    stream: Stream,
    owners: list[Tensor],
    clients: int,
    sizes: Sequence[Sequence[int | None]],
    rule: str,
) -> list[Stream]:
    """Return the part of a stream that belongs to each client, with declared sizes.

    A declared size of 0 leaves the records of the experience out: the client has a gap there.

    Args:
        stream: stream of all clients.
        owners: (n,) client of each record, for every experience; another number for nobody.
        clients: number of clients.
        sizes: declared size of every client (inner) in every experience (outer), 0 for a gap; None
            for the actual size.
        rule: rule that assigned records to clients; "" if it depends on other records.
    """
    rows = [_rows_of(each, clients) for each in owners]
    return [
        replace(
            stream,
            experiences=tuple(
                _of_client(experience, client, rows[index][client], sizes[index][client], rule)
                for index, experience in enumerate(stream)
            ),
        )
        for client in range(clients)
    ]


def _of_client(
    experience: Experience, client: int, rows: Tensor, size: int | None, rule: str
) -> Experience:
    train = experience.train
    own = rows if size != 0 else rows[:0]
    mine = train.take(own.to(train.inputs.device)).declared(size or None)
    known = f"{train.placed_by}, {rule}" if train.placed_by and rule else ""
    mine = replace(mine, partition=f"client-{client}/{train.partition}", placed_by=known)
    return replace(experience, train=mine)


def _rows_of(owners: Tensor, clients: int) -> list[Tensor]:
    """Return the positions of the records of each client, ascending."""
    order = torch.argsort(owners, stable=True)
    bounds = torch.searchsorted(owners[order], torch.arange(clients + 1))
    return [order[first:last] for first, last in itertools.pairwise(bounds.tolist())]


def _in_shares(coins: Tensor, bounds: Tensor, row: Tensor) -> Tensor:
    """Return (n,) number of the share that contains each coin.

    Args:
        coins: (n,) numbers in [0, 1).
        bounds: (rows, clients) upper ends of the shares, ascending.
        row: (n,) row of `bounds` for each coin.
    """
    owners = torch.empty(len(coins), dtype=torch.int64)
    # the last share ends at 1 except for rounding, so no number may be above it
    for number, ends in enumerate(bounds[:, :-1].contiguous()):
        own = row == number
        owners[own] = torch.searchsorted(ends, coins[own], right=True)
    return owners
