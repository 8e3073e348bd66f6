"""Memory: the rows that a curator keeps for replay.

Memory is not a partition: its use is charged to the partitions that its rows came from.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from perdure.contract.plan import MemoryPlan
from perdure.data.records import Batch
from perdure.data.row_view import joined_rows, view_rows
from perdure.tasks import SingleLabel, Task
from perdure.utils.hashing import hashed


def concatenate(parts: list[Batch]) -> Batch:
    """Combine batches into one, in order; all must have the same names of stored tensors."""
    if len(parts) == 1:
        return parts[0]
    tensors = [part.tensors() for part in parts]
    columns = {name: [part[name] for part in tensors] for name in tensors[0]}
    return Batch.from_tensors(
        {
            name: torch.cat(rows) if rows[0].dim() == 1 else joined_rows(rows)
            for name, rows in columns.items()
        }
    )


def reordered(rows: Batch, order: Tensor) -> Batch:
    """Return the rows at int64 positions (m,), without copying long rows."""
    places = order.to(rows.inputs.device)
    return rows.map(
        lambda value: (
            value.index_select(0, places) if value.dim() == 1 else view_rows(value, places)
        )
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Filled:
    """Cached number of stored rows in each group (stage and label) of a memory.

    Args:
        rows: stored rows for which the numbers hold.
        found: (m, 2) distinct groups of the rows, ascending.
        counts: (m,) number of rows of each group.
        full_for: plan under which memory has no room for a new row of these groups; else None.
    """

    rows: Batch
    found: Tensor
    counts: Tensor
    full_for: MemoryPlan | None = None

    @cached_property
    def names(self) -> set[tuple[int, ...]]:
        """Distinct groups, as tuples of stage and label."""
        return set(map(tuple, self.found.tolist()))


@dataclass
class Memory:
    """Rows kept so far, and counts of the records that were offered.

    Args:
        rows: kept rows, in the order of the selection; None before any is kept. They belong to the
            memory, and a later offer may overwrite them.
        offered: total number of records that were offered.
        latest: index of the last experience that was offered as a whole; -1 for none.
        tags: (len(rows),) float64, the secret number in [0, 1) of each kept record under privacy.
    """

    rows: Batch | None = None
    offered: int = 0
    latest: int = -1
    tags: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    _room: Batch | None = field(default=None, init=False, repr=False, compare=False)
    _filled: "_Filled | None" = field(default=None, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return 0 if self.rows is None else len(self.rows)

    def offer(
        self,
        new: Batch,
        plan: MemoryPlan,
        generator: torch.Generator,
        known: Tensor | None = None,
        stages: Tensor | None = None,
        task: Task | None = None,
    ) -> None:
        """Offer each of some records to the memory once (without privacy).

        Args:
            new: rows of the records.
            plan: selection and capacity of the memory.
            generator: random generator of the selection.
            known: features (n, f) of the new rows for herding, their losses (n,) for a loss-aware
                selection, None for other selections.
            stages: (T,) int64, the stage of every experience so far; None if each is its own stage.
            task: decides which rows share a quota; None for single-label rows, which share by
                class.
        """
        task = task or SingleLabel()
        if plan.selection == "reservoir":
            kept = reservoir(len(self), self.offered, len(new), plan.capacity, generator)
            if self.rows is not None and len(kept) == len(self):
                # the memory is full: row i is the stored one, or the new one that replaces it
                come = torch.nonzero(kept >= len(self)).flatten()
                self._put(self.rows, new, come, kept[come] - len(self))
            else:
                self._grow(new, kept, plan.capacity)
            self._filled = None
        else:
            groups = groups_of([new], stages, task)
            if self._is_full_of(groups, plan):
                self.offered += len(new)
                return
            if plan.selection == "herding":
                assert known is not None
                most = quota(torch.cat([self._groups(stages, task)[0], groups]), plan)
                order = herd(group_of(new.labels, task), known, most)
            else:
                order = self._order(new, plan, generator, known)
            if plan.selection == "ring" or not self._fill(new, order, groups, plan, stages, task):
                old = [self.rows] if self.rows is not None else []
                parts = [reordered(new, order)]
                parts = parts + old if plan.selection == "ring" else old + parts
                self._take(
                    parts,
                    balanced(groups_of(parts, stages, task), plan.capacity, plan.per_class),
                )
        self.offered += len(new)

    def offer_by_coin(self, new: Batch, tags: Tensor, threshold: float) -> None:
        """Keep the stored and new records whose secret number (`tags`) is below `threshold`.

        The threshold of a memory only decreases, so a dropped record never returns.

        Guarantee: membership of a record depends only on its own secret number and on declared
        sizes, never on other records.
        """
        all_tags = torch.cat([self.tags, tags])
        kept = torch.nonzero(all_tags < threshold).flatten()
        self._keep(new, kept)
        self.tags = all_tags[kept]
        self.offered += len(new)

    def _order(
        self, new: Batch, plan: MemoryPlan, generator: torch.Generator, known: Tensor | None
    ) -> Tensor:
        """Return (m,) positions of the new rows, in the order in which they fill the quotas."""
        if plan.selection == "class-balanced":
            return torch.randperm(len(new), generator=generator)
        if plan.selection == "ring":
            return torch.arange(len(new)).flip(0)
        assert plan.selection == "loss-aware" and known is not None
        return known.argsort(descending=True, stable=True).cpu()

    def _groups(self, stages: Tensor | None, task: Task) -> tuple[Tensor, Tensor]:
        """Return the distinct groups (m, 2) of stored rows, ascending, and their sizes (m,).

        Both are cached, because counting all rows at every piece of a stream is slow.
        """
        if self.rows is None:
            return torch.empty(0, 2, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        if self._filled is None or self._filled.rows is not self.rows:
            found, which = distinct_rows(groups_of([self.rows], stages, task))
            counts = torch.bincount(which, minlength=len(found))
            self._filled = _Filled(rows=self.rows, found=found, counts=counts)
        return self._filled.found, self._filled.counts

    def _is_full_of(self, groups: Tensor, plan: MemoryPlan) -> bool:
        """Return True if memory has no room for new rows of these groups (n, 2)."""
        filled = self._filled
        if filled is None or filled.rows is not self.rows or filled.full_for != plan:
            return False
        return filled.names.issuperset(map(tuple, groups.tolist()))

    def _fill(
        self,
        new: Batch,
        order: Tensor,
        groups: Tensor,
        plan: MemoryPlan,
        stages: Tensor | None,
        task: Task,
    ) -> bool:
        """Append the new rows that `balanced` keeps, if it keeps all stored rows too.

        The stored rows are not read, so the time grows with the new rows and the groups.

        Args:
            order: (m,) positions of the new rows, in which they fill their quotas.
            groups: (n, 2) stage and group of every new row.

        Returns:
            False if a stored row would be removed; then nothing is stored.
        """
        stored, counts = self._groups(stages, task)
        found, which = distinct_rows(torch.cat([stored, groups[order]]))
        places = shares(found, plan.capacity, plan.per_class)
        filled = torch.zeros_like(places)
        filled[which[: len(stored)]] = counts
        if bool((filled > places).any()):
            return False
        own = which[len(stored) :]
        joins = ranks(own, len(found)) < (places - filled)[own]
        before = len(self)
        if bool(joins.any()) or self.rows is None:
            kept = torch.cat([torch.arange(before), before + order[joins]])
            self._grow(new, kept, plan.capacity if plan.per_class is None else 2 * len(kept))
        assert self.rows is not None
        filled += torch.bincount(own[joins], minlength=len(found))
        self._filled = _Filled(
            rows=self.rows,
            found=found[filled > 0],
            counts=filled[filled > 0],
            full_for=plan if bool((filled == places).all()) else None,
        )
        return True

    def _keep(self, new: Batch, kept: Tensor) -> None:
        """Store the rows at positions `kept`, ascending, of stored rows followed by new rows."""
        self._take(([self.rows] if self.rows is not None else []) + [new], kept)

    def _grow(self, new: Batch, kept: Tensor, capacity: int) -> None:
        """Append the new rows in `kept` to the stored rows, in a buffer that doubles if it is full.

        Copying all rows at every offer would take time proportional to the square of the capacity.
        """
        before = len(self)
        room = self._room
        moved = room is None or (
            self.rows is not None and self.rows.inputs.data_ptr() != room.inputs.data_ptr()
        )
        if room is None or moved or len(room) < len(kept):
            size = min(capacity, 2 * len(kept))
            room = new.map(lambda t: t.new_empty(size, *t.shape[1:]))
            if self.rows is not None:
                everyone = torch.arange(before)
                self._put(room, self.rows, everyone, everyone)
        self._room = room
        self.rows = room.take(slice(0, len(kept)))
        come = torch.nonzero(kept >= before).flatten()
        self._put(self.rows, new, come, kept[come] - before)

    @staticmethod
    def _put(stored: Batch, new: Batch, places: Tensor, positions: Tensor) -> None:
        """Overwrite stored rows in `places` by the new rows at `positions`.

        Other stored rows are not copied.
        """
        device = new.inputs.device
        come = new.at(positions).tensors()
        for name, kept in stored.tensors().items():
            kept.index_copy_(0, places.to(device), come[name])

    def _take(self, parts: list[Batch], kept: Tensor) -> None:
        """Store the rows at positions `kept`, ascending, of the concatenated parts.

        The rows are copied, so that the other rows can be freed.
        """
        first = self.rows is not None and parts[0] is self.rows
        if first and len(kept) == len(self) and bool((kept < len(self)).all()):
            return  # no new row is kept and the stored ones do not change: no copy is needed
        everything = concatenate(parts)
        self._room = None
        self.rows = everything.take(kept.to(everything.inputs.device))


def groups_of(parts: list[Batch], stages: Tensor | None, task: Task) -> Tensor:
    """Return (n, 2) stage and group of every row, on the CPU; rows with equal values share a quota.

    Args:
        parts: batches of rows.
        stages: (T,) int64, the stage of every experience so far; None if each is its own stage.
        task: computes the groups, which are classes for single-label rows.
    """
    tasks = torch.cat([part.tasks for part in parts]).cpu()
    groups = torch.cat([group_of(part.labels, task) for part in parts]).cpu()
    return torch.stack([tasks if stages is None else stages[tasks], groups], dim=1)


def group_of(targets: Tensor, task: Task) -> Tensor:
    """Return (n,) int64 group of each row by its targets; 0 for all if the task makes no groups."""
    groups = task.balance_groups(targets)
    return targets.new_zeros(len(targets), dtype=torch.int64) if groups is None else groups


def distinct_rows(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Find distinct rows (m, k) of int64 groups (n, k), ascending, and the (n,) index of each row.

    Each row is compared as one number, which is many times faster than `torch.unique(dim=0)`.
    """
    if not len(groups):
        return groups, groups.new_zeros(0)
    least = groups.amin(0)
    shifted = groups - least
    widths = (shifted.amax(0) + 1).tolist()
    if not 0 < math.prod(widths) < 2**63 or min(widths) < 1:  # numbers would overflow
        found, which = torch.unique(groups, dim=0, return_inverse=True)
        return found, which
    numbers = shifted[:, 0]
    for column, width in enumerate(widths[1:], 1):
        numbers = numbers * width + shifted[:, column]
    found, which = torch.unique(numbers, return_inverse=True)
    columns = []
    for width in reversed(widths[1:]):
        columns.append(found % width)
        found = found // width
    return torch.stack([found, *reversed(columns)], dim=1) + least, which


def quota(groups: Tensor, plan: MemoryPlan) -> int:
    """Return the largest number of rows per group that a memory keeps of rows in groups (n, k)."""
    if plan.per_class is not None:
        return plan.per_class
    return -(-plan.capacity // max(1, len(distinct_rows(groups)[0])))


def herd(groups: Tensor, features: Tensor, most: int) -> Tensor:
    """(m,) positions, on the CPU, of at most `most` herded rows of each group, group by group."""
    parts = [torch.nonzero(groups == group).flatten() for group in torch.unique(groups)]
    herds = [positions[herded(features[positions], most)] for positions in parts]
    return torch.cat(herds).cpu() if herds else torch.empty(0, dtype=torch.int64)


@torch.no_grad()
def herded(features: Tensor, most: int) -> Tensor:
    """(min(n, most),) positions of the herded rows of features (n, f), the best first.

    Each row is chosen so that the mean of the chosen rows is closest to the mean of all rows. The
    k-th row is the x among the remaining ones with the smallest |k mean - total - x|^2, where total
    is the sum of the rows chosen before. This is |x|^2 - 2 <x, k mean - total> plus a constant, so
    one product with all rows is enough. It is taken in float32, which reads half of the memory;
    among the rows that its rounding may have confused, float64 decides.

    Features, and their mean, are scaled to norm 1. Rebuffi et al. 2017, iCaRL, algorithm 4.
    """
    rows = features.to(torch.float64, copy=True)
    rows /= rows.norm(dim=1, keepdim=True).clamp_min(1e-12)  # in place: fresh memory is slow
    mean = torch.nn.functional.normalize(rows.mean(0), dim=0)
    squares = torch.linalg.vector_norm(rows, dim=1).square()
    quick = rows.float()
    left = squares.float()
    rounding = (rows.shape[1] + 8) * torch.finfo(torch.float32).eps
    gap = mean.clone()
    chosen = []
    for _ in range(min(len(rows), most)):
        scores = torch.addmv(left, quick, gap.float(), alpha=-2.0)
        lowest, places = torch.topk(scores, min(2, len(rows)), largest=False)
        first, second = lowest[0].item(), lowest[-1].item()
        best = int(places[0])
        confused = rounding * (1 + float(gap.norm()))
        if not second - first > confused:  # "not above", so that NaN is looked at, too
            near = (~(scores > first + confused)).nonzero()[:, 0]
            best = int(near[torch.addmv(squares[near], rows[near], gap, alpha=-2.0).argmin()])
        chosen.append(best)
        left[best] = torch.inf
        squares[best] = torch.inf
        gap += mean - rows[best]
    return torch.tensor(chosen, dtype=torch.int64, device=features.device)


def reservoir(
    stored: int, offered: int, new: int, capacity: int, generator: torch.Generator
) -> Tensor:
    """Positions of the rows that a reservoir keeps after `new` records were offered.

    Positions count the stored rows first, then the new ones.

    Vitter 1985, algorithm R: record k (counted from 0 over the whole stream) replaces a uniformly
    drawn slot with probability capacity / (k + 1), so that every record offered so far is kept with
    the same probability.
    """
    added: list[int] = []
    replaced: dict[int, int] = {}
    draws = torch.rand(new, generator=generator, dtype=torch.float64).tolist()
    for i, draw in enumerate(draws):
        slot = int(draw * (offered + i + 1))
        if stored + len(added) < capacity:
            added.append(stored + i)
        elif slot < capacity:
            replaced[slot] = stored + i
    # only the changed positions are listed, because a step changes few of them
    kept = torch.cat([torch.arange(stored), torch.tensor(added, dtype=torch.int64)])
    kept[list(replaced)] = torch.tensor(list(replaced.values()), dtype=torch.int64)
    return kept


def balanced(groups: Tensor, capacity: int, per_class: int | None) -> Tensor:
    """Positions, ascending, of the rows that a memory with one quota per group keeps.

    A group keeps its first rows, up to its quota: `per_class` rows, or an equal share of
    `capacity`. The remainder of the division goes to the first groups, one row each. If there are
    more groups than `capacity`, some get nothing; then a public hash decides the order of the
    groups, so that late groups are as likely to get a row as early ones. A quota never grows when
    groups are added, so a dropped row is never needed again.

    Args:
        groups: (n, k) int64; rows that are equal in all k columns (stage and label) are one group.
        capacity: largest total number of rows; not used with `per_class`.
        per_class: number of rows of every group; None for equal shares of `capacity`.
    """
    found, group = distinct_rows(groups)
    quota = shares(found, capacity, per_class)
    return torch.nonzero(ranks(group, len(found)) < quota[group]).flatten()


def shares(found: Tensor, capacity: int, per_class: int | None) -> Tensor:
    """Return the quota (m,) of each of the distinct groups (m, k), ascending (see `balanced`)."""
    if per_class is not None:
        return torch.full((len(found),), per_class)
    n_groups = max(1, len(found))
    order_of_group = torch.arange(len(found))
    if n_groups > capacity:
        # a group is hashed by its label (last column), together with the other columns
        by_hash = hashed(found[:, -1], *found[:, :-1].T).argsort()
        order_of_group[by_hash] = torch.arange(n_groups)
    return (capacity + n_groups - 1 - order_of_group) // n_groups


def ranks(group: Tensor, n_groups: int) -> Tensor:
    """(n,) number of earlier rows of the same group, by the number of each row's group (n,)."""
    order = torch.argsort(group, stable=True)
    counts = torch.bincount(group, minlength=n_groups)
    starts = torch.cumsum(counts, 0) - counts
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - starts[group[order]]
    return rank
