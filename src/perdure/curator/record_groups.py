"""Groups of rows that belong to one record.

Rows with the same id in the same partition are one record, whatever transformation made them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from perdure.data.experience import Experience


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordGroups:
    """Rows of a pool, grouped by record.

    Permuted copies of an image are one record, and so are a stored row and a new row of one image.

    Args:
        ids: (r,) ids of the records.
        owners: (r,) number of the partition that owns each record.
        order: (n,) positions of the rows, with the rows of each record together.
        starts: (r,) index in `order` of the first row of each record.
        counts: (r,) number of rows of each record.
    """

    ids: Tensor
    owners: Tensor
    order: Tensor
    starts: Tensor
    counts: Tensor

    @cached_property
    def whose(self) -> Tensor:
        """(r, 2) id and owner number of each record."""
        return torch.stack([self.ids, self.owners], dim=1)

    def rows(self, drawn: Tensor, pick: Tensor) -> Tensor:
        """Return (m,) positions of one row for every drawn record.

        Args:
            drawn: (m,) indices of the drawn records.
            pick: (m,) uniform numbers in [0, 1), which choose among the rows of each record.

        Guarantee: a record is in a step at most once, whatever the number of its rows.
        """
        counts = self.counts[drawn]
        row = torch.minimum((pick * counts).long(), counts - 1)
        return self.order[self.starts[drawn] + row]


def group_records(ids: Tensor, owner: Tensor) -> RecordGroups:
    """Group rows by record: by id (n,) within the partition (n,) that owns the row."""
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
    """Return (n,) number of the partition that each row came from."""
    names = sorted({experience.train.partition for experience in experiences})
    table = torch.tensor(
        [names.index(experience.train.partition) for experience in experiences], dtype=torch.int64
    )
    return table[tasks.cpu()]
