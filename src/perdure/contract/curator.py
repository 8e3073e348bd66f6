"""Interface of a curator, which holds private records, for the hooks of a strategy."""

from collections.abc import Callable
from typing import Literal, Protocol

from torch import Tensor

from perdure.contract.context import Context
from perdure.contract.exposure import Exposure
from perdure.contract.forward import Forward
from perdure.data.records import Batch
from perdure.types import Params

Query = Callable[[Forward, Batch], Tensor | Params]
"""Function from (forward, batch) to one tensor (n, ...) or several by name; row i must depend on
record i only.
"""
Of = Callable[[Batch], Tensor]
"""Function from a batch to (n,) numbers, one per record."""
Losses = Callable[[Forward, Batch], Tensor]
"""Function from (forward, batch) to (n,) losses, one per record."""
Over = Literal["experience", "memory"]


class Utility(Protocol):
    """Scores for choosing answers from a public list with the exponential mechanism.

    Adding or removing one record changes the difference between any two scores by at most 1.
    """

    @property
    def k(self) -> int:
        """Number of answers to choose."""
        ...

    def scores(self, numbers: Tensor, *, strict: bool) -> Tensor:
        """Return (m,) scores of the answers, from one number of each record (n,)."""
        ...


class Curator(Protocol):
    """Interface of the holder of private records, for the hooks of a strategy.

    Guarantee: under privacy every answer is a release, charged to the ledger before its noise is
    drawn, or is computed from declared values only. Without privacy answers are exact.
    """

    @property
    def context(self) -> Context:
        """Public facts of the open experience."""
        ...

    @property
    def declared_size(self) -> int:
        """Declared number of records of the open experience."""
        ...

    @property
    def private(self) -> bool:
        """True if answers are noisy and charged to the ledger."""
        ...

    @property
    def clip_norm(self) -> float:
        """L2 bound on the gradient of one record; infinite without privacy."""
        ...

    @property
    def signal_to_noise(self) -> float:
        """Estimated ratio of the last gradient's energy to its noise's energy, from the release."""
        ...

    @property
    def exposure(self) -> Exposure:
        """Exposure of every partition in a step of the open experience."""
        ...

    @property
    def statistics(self) -> Params:
        """Current running means and variances of the model; empty under privacy."""
        ...

    def synthetic(self, n: int) -> Batch:
        """Return n random rows with the pool's shapes and dtypes, independent of the data."""
        ...

    def release(
        self, query: Query, *, clip_norm: float, purpose: str, over: Over = "experience"
    ) -> Params:
        """Sum of query(record) over records; under privacy, rows are clipped and noise is added.

        Without privacy the sum is exact: nothing is clipped.

        Args:
            query: query with one row per record, a tensor or named tensors (see `perdure.queries`).
            clip_norm: bound on the L2 norm of one record's row, all names together; used under
                privacy only.
            purpose: name of the release in the ledger.
            over: "experience" for the records of the open experience, "memory" for stored ones.

        Returns:
            Sums in the shapes of one row, by the names of the query; a query that returns one
            tensor has the name "value".
        """
        ...

    def count(self, of: Of, *, bins: int, purpose: str) -> Tensor:
        """Return (bins,) int64 numbers of records in each bin, plus integer noise under privacy.

        Args:
            of: function from a batch to (n,) bins, whole numbers from 0; a record outside is not
                counted.
            bins: public number of bins.
            purpose: name of the release in the ledger.
        """
        ...

    def select(self, of: Of, utility: Utility, *, purpose: str) -> Tensor:
        """Return (k,) int64 positions of the answers with the best scores, best first.

        Args:
            of: function from a batch to (n,) numbers, from which `utility` computes the scores.
            utility: `Frequency` or `Quantile` of `perdure.privacy`.
            purpose: name of the release in the ledger.
        """
        ...

    def reference(self, losses: Losses, params: Params, *, of: int | None = None) -> Params:
        """Mean gradient over stored rows; under privacy clipped, noisy and charged, like a step.

        Args:
            losses: function from (forward, batch) to one loss per record.
            params: parameters of the gradient.
            of: index of the earlier experience whose rows are drawn; None for all.
        """
        ...
