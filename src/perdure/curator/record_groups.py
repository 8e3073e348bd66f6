"""Which rows are one record.

Those of one id within one partition, whatever was done to them on the way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from perdure.data.experience import Experience


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordGroups:
    """Rows of a pool by record.

    Permuted copies of an image, or a stored row beside a new one, are one record.

    Args:
        ids: (r,) of the records.
        owners: (r,) number of the partition that owns each.
        order: (n,) positions of the rows, those of one record side by side.
        starts: (r,) where each record's rows begin in `order`.
        counts: (r,) how many it has.
    """

    ids: Tensor
    owners: Tensor
    order: Tensor
    starts: Tensor
    counts: Tensor

    @cached_property
    def whose(self) -> Tensor:
        """(r, 2) id and owner of each record."""
        return torch.stack([self.ids, self.owners], dim=1)

    def rows(self, drawn: Tensor, pick: Tensor) -> Tensor:
        """Positions of one row for every record of `drawn` (m,), by number.

        The row is chosen by the record's `pick`, uniform in [0, 1).

        Guarantee: a record enters a step at most once, whatever the number of its rows.
        """
        counts = self.counts[drawn]
        row = torch.minimum((pick * counts).long(), counts - 1)
        return self.order[self.starts[drawn] + row]


def group_records(ids: Tensor, owner: Tensor) -> RecordGroups:
    """Group rows by record: its id (n,) within the partition (n,) that owns it."""
    ids = ids.cpu()
    owner = owner.cpu()
    order = torch.argsort(owner, stable=True)
    order = order[torch.argsort(ids[order], stable=True)]  # by id, then owner, then position
    ids = ids[order]
    owner = owner[order]
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = (ids[1:] != ids[:-1]) | (owner[1:] != owner[:-1])
    starts = first.nonzero().flatten()
    return RecordGroups(
        ids=ids[starts],
        owners=owner[starts],
        order=order,
        starts=starts,
        counts=torch.diff(starts, append=starts.new_tensor([len(order)])),
    )


def partition_index(tasks: Tensor, experiences: Sequence[Experience]) -> Tensor:
    """(n,) a number for the partition of the experience that each row came from."""
    names = sorted({experience.train.partition for experience in experiences})
    table = torch.tensor(
        [names.index(experience.train.partition) for experience in experiences], dtype=torch.int64
    )
    return table[tasks.cpu()]
