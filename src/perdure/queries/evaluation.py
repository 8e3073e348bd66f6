"""Sums of queries, which are functions with one row per record that a curator releases.

The curator clips the rows of a query. `Gram`, `SquaredGradient` and similar queries can compute
their sum, clipped or not, in a faster way: they are subclasses of `SummedQuery`.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perdure.contract.curator import Query
from perdure.contract.forward import Forward
from perdure.data.records import Batch
from perdure.privacy.clipping.clip import Clip
from perdure.queries.per_record import CHUNK, as_params, clipped_row_sum, exact_row_sum
from perdure.types import Params
from perdure.utils.chunking import blank_row


class SummedQuery(ABC):
    """Base class of queries that can compute their sums faster than one record at a time.

    The rows define the query. Every other method has a default that computes the rows.

    Guarantee: one record changes a sum that was clipped for a release by at most the clip norm.
    This holds also if your subclass overrides `clipped_sum`: only the classes of `perdure.queries`
    clip by their own method, and the library clips the rows of all other classes.
    """

    @abstractmethod
    def __call__(self, forward: Forward, batch: Batch) -> Tensor | Params:
        """Rows (n, ...) of one tensor, or of several by name; row i depends on record i only."""

    def exact_sum(self, forward: Forward, batch: Batch, chunk: int) -> Params:
        """Sum the rows without privacy.

        Args:
            forward: the model.
            batch: the records.
            chunk: largest number of records that are processed at a time.
        """
        return exact_row_sum(self, forward, batch, chunk)

    def clipped_sum(
        self, module: nn.Module, params: Params, tensors: Mapping[str, Tensor], clip: Clip
    ) -> Params | None:
        """Sum the clipped rows over the records.

        Args:
            module: the model.
            params: parameters of the model by name.
            tensors: the records, name to (n, ...).
            clip: bound on each row.

        Returns:
            Name to sum, in the shape of one row; None if there are no records.
        """
        return clipped_row_sum(self, module, params, tensors, clip)

    def shapes(self, forward: Forward, batch: Batch) -> dict[str, torch.Size]:
        """Return the shape of one record's row for every tensor name, from any batch."""
        answer = as_params(self(forward, batch))
        return {name: rows.shape[1:] for name, rows in answer.items()}

    def on_synthetic(self, forward: Forward, batch: Batch) -> Params:
        """Result on synthetic records, by which a release tells the query from other queries."""
        return self.exact_sum(forward, batch, CHUNK)

    def unpacked(self, released: Params) -> Params:
        """Convert a released sum to the form for the caller, using released values only."""
        return released


@dataclass(frozen=True)
class _RowQuery(SummedQuery):
    """Query from a user's function, with the default ways to compute its sums."""

    rows: Query

    def __call__(self, forward: Forward, batch: Batch) -> Tensor | Params:
        return self.rows(forward, batch)


def _summed(query: Query) -> SummedQuery:
    return query if isinstance(query, SummedQuery) else _RowQuery(query)


def exact_sum(query: Query, forward: Forward, batch: Batch, chunk: int) -> Params:
    """Sum of the query's rows over the batch, in pieces of at most `chunk` records."""
    return _summed(query).exact_sum(forward, batch, chunk)


def bounded_sum(
    query: Query, module: nn.Module, params: Params, tensors: Mapping[str, Tensor], clip: Clip
) -> Params | None:
    """Sum over the records of the query's clipped rows; None if there is no record.

    Guarantee: one record changes the sum by at most `clip.norm` in L2 norm, for any query.
    """
    if isinstance(query, SummedQuery) and _is_own(type(query)):
        # the class's method, because an attribute of the object may clip differently
        return type(query).clipped_sum(query, module, params, tensors, clip)
    return clipped_row_sum(query, module, params, tensors, clip)


def _is_own(kind: type[SummedQuery]) -> bool:
    """Return True if a class is defined in a file of this package.

    A subclass that is defined elsewhere does not count, nor does a class that only copies the name
    (`functools.wraps`) of one of the package's classes.
    """
    inside = kind.__module__.startswith(f"{__package__}.")
    return inside and getattr(sys.modules[kind.__module__], kind.__name__, None) is kind


def shapes_of(
    query: Query, forward: Forward, tensors: Mapping[str, Tensor]
) -> dict[str, torch.Size]:
    """Return the shape of one row for every name of the query, from one blank record.

    So the shape of a sum over no records is known, and an empty partition gets noise, too.
    """
    return _summed(query).shapes(forward, Batch.from_tensors(blank_row(tensors)))


def evaluate_on_synthetic(query: Query, forward: Forward, batch: Batch) -> Params:
    """Result of a query on synthetic records, by which a release tells it from other queries."""
    return _summed(query).on_synthetic(forward, batch)


def unpacked(query: Query, released: Params) -> Params:
    """Convert a released sum of the query to the form for the caller."""
    return _summed(query).unpacked(released)
