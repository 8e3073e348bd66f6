"""Sums of queries: functions that give one row per record, to which a curator adds noise.

The curator clips the rows of a query. `Gram`, `SquaredGradient` and their like know a faster way to
their sum, clipped or not: they are a `SummedQuery`.
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
        """Rows (n, ...), or a mapping of such; row i depends on record i only."""

    def exact_sum(self, forward: Forward, batch: Batch, chunk: int) -> Params:
        """Sum the rows without privacy.

        Args:
            forward: the model.
            batch: the records.
            chunk: most records at a time.
        """
        return exact_row_sum(self, forward, batch, chunk)

    def clipped_sum(
        self, module: nn.Module, params: Params, tensors: Mapping[str, Tensor], clip: Clip
    ) -> Params | None:
        """Sum the clipped rows over the records.

        Args:
            module: the model.
            params: its parameters by name.
            tensors: name to (n, ...), the records.
            clip: bound on each row.

        Returns:
            Name to sum, in the shape of one row; None without records.
        """
        return clipped_row_sum(self, module, params, tensors, clip)

    def shapes(self, forward: Forward, batch: Batch) -> dict[str, torch.Size]:
        """Shapes of one row, from any batch."""
        answer = as_params(self(forward, batch))
        return {name: rows.shape[1:] for name, rows in answer.items()}

    def on_synthetic(self, forward: Forward, batch: Batch) -> Params:
        """Answer on synthetic records that tells the query from others."""
        return self.exact_sum(forward, batch, CHUNK)

    def unpacked(self, released: Params) -> Params:
        """Released sum in the form that is handed out; a function of the release alone."""
        return released


@dataclass(frozen=True)
class _RowQuery(SummedQuery):
    """A function of the user's, as a query with the default ways to its sums."""

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
    """Sum over the records of the query's rows, each clipped; None when there is no record.

    Guarantee: one record moves it by at most `clip.norm` in L2 norm, whatever the query does.
    """
    if isinstance(query, SummedQuery) and _is_own(type(query)):
        # of the class: an attribute of the object could clip otherwise
        return type(query).clipped_sum(query, module, params, tensors, clip)
    return clipped_row_sum(query, module, params, tensors, clip)


def _is_own(kind: type[SummedQuery]) -> bool:
    """Tell if this very class is defined in a file of this package.

    A subclass is defined elsewhere, and a class that took over the names of another one
    (`functools.wraps`) is not found under them.
    """
    inside = kind.__module__.startswith(f"{__package__}.")
    return inside and getattr(sys.modules[kind.__module__], kind.__name__, None) is kind


def shapes_of(
    query: Query, forward: Forward, tensors: Mapping[str, Tensor]
) -> dict[str, torch.Size]:
    """Shapes of one row, from a synthetic record with the shapes of `tensors`.

    An empty partition still gets its noise.
    """
    return _summed(query).shapes(forward, Batch.from_tensors(blank_row(tensors)))


def evaluate_on_synthetic(query: Query, forward: Forward, batch: Batch) -> Params:
    """Answer of the query on synthetic records, which tells one question from another."""
    return _summed(query).on_synthetic(forward, batch)


def unpacked(query: Query, released: Params) -> Params:
    """Released sum of the query in the form that is handed out."""
    return _summed(query).unpacked(released)
