"""Cache of groups and fingerprints of rows, for an experience that is opened in every round.

Each result is kept with a copy of the rows that it was computed from.
"""

import torch
from torch import Tensor

from perdure.curator.record_groups import RecordGroups, group_records
from perdure.data.records import Records
from perdure.errors import PrivacyError
from perdure.privacy.guard.writes import counts_writes, version_of
from perdure.privacy.private_sum import PrivateSum
from perdure.types import Tensors


class KnownRows:
    """Cached results about the rows that a party opened last.

    Ids, labels, owners and marks of memory rows are compared by value with copies. Long rows count
    as unchanged if the tensor is the same object and torch has counted no write to it. A write that
    torch does not count (through numpy, or `.data`) is detected by the log of draws when a step is
    executed again.
    """

    def __init__(self) -> None:
        self._groups: dict[str, tuple[Tensor, Tensor, RecordGroups]] = {}
        self._distinct: Tensor | None = None
        self._hashed: dict[str, tuple[Tensor, int]] = {}
        self._fingerprint = ""

    def groups(self, purpose: str, ids: Tensor, owner: Tensor) -> RecordGroups:
        """Return rows grouped by record, from the cache if ids and owners did not change.

        Args:
            purpose: purpose of the noisy sum over the rows, such as `gradient`.
            ids: (n,) ids of the records that the rows belong to.
            owner: (n,) number of the partition that owns each row.
        """
        known = self._groups.get(purpose)
        if known is None or not (torch.equal(known[0], ids) and torch.equal(known[1], owner)):
            known = ids.clone(), owner.clone(), group_records(ids, owner)
            self._groups[purpose] = known
        return known[2]

    def refuse_shared_ids(self, records: Records) -> None:
        """Refuse records with equal ids, because a release would count one record several times.

        Raises:
            PrivacyError: names the partition of the records.
        """
        ids = records.ids
        if self._distinct is not None and torch.equal(self._distinct, ids):
            return
        if len(torch.unique(ids)) < len(records):
            raise PrivacyError(
                f"records of {records.partition!r} share an id, so a release would count one "
                "record twice; give every record of an experience its own id"
            )
        self._distinct = ids.clone()

    def fingerprint(self, private_sum: PrivateSum, rows: Tensors) -> str:
        """Return the keyed fingerprint of all rows, for ledger entries.

        It is computed again if a row may have changed.
        """
        if not self._fingerprint or not self._same(rows):
            self._fingerprint = private_sum.fingerprint(rows)
            self._hashed = {
                name: (value.clone() if value.dim() == 1 else value, version_of(value))
                for name, value in rows.items()
            }
        return self._fingerprint

    def _same(self, rows: Tensors) -> bool:
        """Return True if the rows are the same as those that were hashed last."""
        if rows.keys() != self._hashed.keys():
            return False
        for name, value in rows.items():
            before, version = self._hashed[name]
            if value.dim() == 1:
                same = before.dtype == value.dtype and torch.equal(before, value)
            else:
                same = counts_writes(value) and before is value and version_of(value) == version
            if not same:
                return False
        return True
