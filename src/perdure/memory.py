"""Memory: the rows a curator keeps for replay.

Memory is storage, not a partition: using it is charged to the partitions its rows came from.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.records import Batch

Selection = Literal["reservoir", "class-balanced"]


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What is kept for replay.

    Args:
        capacity: number of records kept in all.
        selection: `reservoir` (uniform over everything seen; Vitter 1985, algorithm R) or `class-balanced` (equal
            quotas for every pair of experience and class, filled at random). Under differential privacy both become
            membership by each record's own coin, because a memory that swaps records doubles their influence.
        per_class: fixed quota for every pair of experience and class instead of a share of `capacity`.
        batch_size: rows drawn from memory at every step; None for as many as new ones. Under differential privacy
            new and stored records are one pool.
    """

    capacity: int
    selection: Selection = "class-balanced"
    per_class: int | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ConfigError.of("memory capacity", self.capacity, "1 or more records")
        if self.selection not in ("reservoir", "class-balanced"):
            raise ConfigError.of("memory selection", self.selection, ("reservoir", "class-balanced"))
        for name in ("per_class", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError.of(f"memory {name}", value, "1 or more records, or none")


def concatenate(parts: list[Batch]) -> Batch:
    """One batch of all rows, in order; stored tensors must have the same names everywhere."""
    if len(parts) == 1:
        return parts[0]
    tensors = [part.tensors() for part in parts]
    return Batch.from_tensors({name: torch.cat([part[name] for part in tensors]) for name in tensors[0]})


@dataclass
class Memory:
    """Rows kept so far and how many records were offered in all."""

    rows: Batch | None = None
    offered: int = 0
    tags: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))

    def __len__(self) -> int:
        return 0 if self.rows is None else len(self.rows)

    def offer(self, new: Batch, plan: MemoryPlan, generator: torch.Generator) -> None:
        """Take in the records of a finished experience, each once (no privacy)."""
        if plan.selection == "reservoir":
            kept = reservoir(len(self), self.offered, len(new), plan.capacity, generator)
        else:
            order = torch.randperm(len(new), generator=generator)
            groups = torch.stack([new.tasks.cpu(), new.labels.cpu()], dim=1)[order]
            if self.rows is not None:
                old = torch.stack([self.rows.tasks.cpu(), self.rows.labels.cpu()], dim=1)
                groups = torch.cat([old, groups])
            places = balanced(groups, plan.capacity, plan.per_class)
            offset = len(self)
            kept = torch.where(places < offset, places, offset + order[(places - offset).clamp(min=0)])
        self._keep(new, kept)
        self.offered += len(new)

    def offer_by_coin(self, new: Batch, tags: Tensor, threshold: float) -> None:
        """Keep the records whose private tag lies below `threshold`; it only ever falls (differential privacy).

        Guarantee: membership of a record depends on its own secret coin and on declared sizes, never on other records.
        """
        all_tags = torch.cat([self.tags, tags])
        kept = torch.nonzero(all_tags < threshold).flatten()
        self._keep(new, kept)
        self.tags = all_tags[kept]
        self.offered += len(new)

    def _keep(self, new: Batch, kept: Tensor) -> None:
        everything = new if self.rows is None else concatenate([self.rows, new])
        rows = everything.take(kept.to(everything.inputs.device))
        self.rows = rows.map(lambda t: t.clone())


def reservoir(stored: int, offered: int, new: int, capacity: int, generator: torch.Generator) -> Tensor:
    """Positions kept after offering `new` records, in a list of the stored ones followed by the new ones.

    Vitter 1985, algorithm R: record k (counted from 0 over the whole stream) replaces a uniformly drawn slot with
    probability capacity / (k + 1), so that every record offered so far is kept with the same probability.
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
    """Positions of the first rows of every group (n, k) int64: `per_class`, else an equal share of `capacity`.

    What does not divide goes to the first groups, one more each; a share never grows when groups are added.
    """
    _, group = torch.unique(groups, dim=0, return_inverse=True)
    n_groups = int(group.max()) + 1 if len(group) else 1
    share = (capacity + n_groups - 1 - torch.arange(n_groups)) // n_groups
    quota = share if per_class is None else torch.full_like(share, per_class)
    order = torch.argsort(group, stable=True)
    starts = torch.cumsum(torch.bincount(group, minlength=n_groups), 0) - torch.bincount(group, minlength=n_groups)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - starts[group[order]]
    return torch.nonzero(rank < quota[group]).flatten()
