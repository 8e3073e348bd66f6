"""Memory: the rows a curator keeps for replay.

Memory is storage, not a partition: using it is charged to the partitions its rows came from.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from perdure.contract.plan import MemoryPlan
from perdure.data.records import Batch
from perdure.utils.hashing import hashed


def concatenate(parts: list[Batch]) -> Batch:
    """One batch of all rows, in order; stored tensors must have the same names everywhere."""
    if len(parts) == 1:
        return parts[0]
    tensors = [part.tensors() for part in parts]
    return Batch.from_tensors(
        {name: torch.cat([part[name] for part in tensors]) for name in tensors[0]}
    )


@dataclass
class Memory:
    """Rows kept so far, and what was offered.

    The latter is the number of records in all, and the last experience that was offered whole.
    """

    rows: Batch | None = None
    offered: int = 0
    latest: int = -1
    tags: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))

    def __len__(self) -> int:
        return 0 if self.rows is None else len(self.rows)

    def offer(
        self,
        new: Batch,
        plan: MemoryPlan,
        generator: torch.Generator,
        known: Tensor | None = None,
        stages: Tensor | None = None,
    ) -> None:
        """Take in records, each once (no privacy).

        Args:
            known: what the model makes of the new rows: features (n, f) to herd, or losses (n,).
            stages: (T,) int64, the stage of every experience so far; None where each is its own.
        """
        if plan.selection == "reservoir":
            kept = reservoir(len(self), self.offered, len(new), plan.capacity, generator)
            self._keep([new], kept)
        else:
            order = self._order(new, plan, generator, known)
            parts = [new.take(order.to(new.inputs.device))]
            old = [self.rows] if self.rows is not None else []
            parts = parts + old if plan.selection == "ring" else old + parts
            tasks = torch.cat([part.tasks for part in parts]).cpu()
            labels = torch.cat([part.labels for part in parts]).cpu()
            groups = torch.stack([tasks if stages is None else stages[tasks], labels], dim=1)
            self._take(parts, balanced(groups, plan.capacity, plan.per_class))
        self.offered += len(new)

    def offer_by_coin(self, new: Batch, tags: Tensor, threshold: float) -> None:
        """Keep the records whose private tag lies below `threshold`.

        It only ever falls (differential privacy).

        Guarantee: membership of a record depends on its own secret coin and on declared sizes,
        never on other records.
        """
        all_tags = torch.cat([self.tags, tags])
        kept = torch.nonzero(all_tags < threshold).flatten()
        self._keep([new], kept)
        self.tags = all_tags[kept]
        self.offered += len(new)

    def _order(
        self, new: Batch, plan: MemoryPlan, generator: torch.Generator, known: Tensor | None
    ) -> Tensor:
        """Order in which the new rows fill their quotas."""
        if plan.selection == "class-balanced":
            return torch.randperm(len(new), generator=generator)
        if plan.selection == "ring":
            return torch.arange(len(new)).flip(0)
        assert known is not None
        if plan.selection == "loss-aware":
            return known.argsort(descending=True, stable=True).cpu()
        most = plan.capacity if plan.per_class is None else plan.per_class
        places = [
            torch.nonzero(new.labels == label).flatten() for label in torch.unique(new.labels)
        ]
        herds = [where[herded(known[where], most)] for where in places]
        return torch.cat(herds).cpu() if herds else torch.empty(0, dtype=torch.int64)

    def _keep(self, new: list[Batch], kept: Tensor) -> None:
        if self.rows is not None and len(kept) == len(self) and bool((kept < len(self)).all()):
            return  # nothing came in, and so nothing went
        self._take(([self.rows] if self.rows is not None else []) + new, kept)

    def _take(self, parts: list[Batch], kept: Tensor) -> None:
        everything = concatenate(parts)
        self.rows = everything.take(kept.to(everything.inputs.device)).map(lambda t: t.clone())


@torch.no_grad()
def herded(features: Tensor, most: int) -> Tensor:
    """(min(n, most),) places of rows (n, f), the best first.

    The running mean of the chosen rows stays closest to the mean of all.

    Features, and their mean, are scaled to norm 1. Rebuffi et al. 2017, iCaRL, algorithm 4.
    """
    rows = torch.nn.functional.normalize(features.double(), dim=1)
    mean = torch.nn.functional.normalize(rows.mean(0), dim=0)
    total = torch.zeros_like(rows[0])
    free = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    chosen = []
    for k in range(1, min(len(rows), most) + 1):
        gap = (mean - (total + rows) / k).square().sum(1)
        best = torch.where(free, gap, torch.inf).argmin()
        chosen.append(best)
        free[best] = False
        total = total + rows[best]
    return torch.stack(chosen) if chosen else torch.empty(0, dtype=torch.int64, device=rows.device)


def reservoir(
    stored: int, offered: int, new: int, capacity: int, generator: torch.Generator
) -> Tensor:
    """Positions kept after offering `new` records.

    They count the stored rows, followed by the new ones.

    Vitter 1985, algorithm R: record k (counted from 0 over the whole stream) replaces a uniformly
    drawn slot with probability capacity / (k + 1), so that every record offered so far is kept with
    the same probability.
    """
    slots = list(range(stored))
    draws = torch.rand(new, generator=generator, dtype=torch.float64).tolist()
    for i, draw in enumerate(draws):
        slot = int(draw * (offered + i + 1))
        if len(slots) < capacity:
            slots.append(stored + i)
        elif slot < capacity:
            slots[slot] = stored + i
    return torch.tensor(slots, dtype=torch.int64)


def balanced(groups: Tensor, capacity: int, per_class: int | None) -> Tensor:
    """Positions of the first rows of every group (n, k) int64.

    `per_class`, else an equal share of `capacity`.

    What does not divide goes to the first groups, one more each; where there are more groups than
    places, to those that a hash puts first, so that late groups have the same chance. A share never
    grows when groups are added.
    """
    found, group = torch.unique(groups, dim=0, return_inverse=True)
    n_groups = max(1, len(found))
    place = torch.arange(n_groups)
    if n_groups > capacity:
        place[hashed(found[:, -1], *found[:, :-1].T).argsort()] = torch.arange(n_groups)
    share = (capacity + n_groups - 1 - place) // n_groups
    quota = share if per_class is None else torch.full_like(share, per_class)
    order = torch.argsort(group, stable=True)
    starts = torch.cumsum(torch.bincount(group, minlength=n_groups), 0) - torch.bincount(
        group, minlength=n_groups
    )
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - starts[group[order]]
    return torch.nonzero(rank < quota[group]).flatten()
