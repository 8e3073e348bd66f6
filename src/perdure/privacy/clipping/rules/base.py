"""Base class of clipping rules, and the three ways to compute norms and clipped sums.

With a_t the input of a layer at position t and d_t the gradient of the loss at its output, the
gradient of the weight for one record is sum_t d_t a_t^T. There are three ways to compute its norm
and the clipped sum:

- one position: the norm is |a| |d|, and the sum is D^T diag(c) A, one matrix product (Goodfellow
  2015, "Efficient per-example gradient computations");
- ghost, for few positions of a large layer: |sum_t d_t a_t^T|^2 = sum_ts (a_t . a_s)(d_t . d_s),
  and the weighted sum over records and positions (Li, Tramer, Liang and Hashimoto 2022, section 4;
  Bu, Mao and Xu 2022 for convolutions);
- rows, in all other cases: the gradients themselves are computed, for as many records at once as
  the processor's cache holds, and multiplied by the factors.

Norms are taken in float32 if no digits can be lost, and in float64 if they can (see `norms`).
Inputs and gradients in half precision are used unchanged. A sum in half precision could be wrong by
more than the clip norm, and so could a long sum in float32: so partial sums over a batch are added
in float64.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from perdure.privacy.clipping.norms import LONGEST, at_least_float32, squared_row_norms
from perdure.types import Params

ROWS_AT_ONCE = 64
"""Largest number of records whose gradients are formed at a time."""

NUMBERS_AT_ONCE = 2**20
"""Most numbers (4 MiB) that are computed at a time, so that they stay in the processor's cache."""

KEPT_NUMBERS = 2**24
"""Most numbers (64 MiB) of one layer's gradients that are kept instead of computed twice."""

GHOST_COST = 2
"""Measured cost of one multiplication in a ghost norm; 1 is the cost of one in a formed row."""

SUMMED_RECORDS = 256
"""Most records whose gradients are added in float32; partial sums are added in float64.

With 4,096 records that point in one direction, a sum in float32 alone has an error of up to C /
1,000, and adding or removing one record changes that error. Partial sums of 512 records still had
an error of C / 1,600 on processors with AVX-512; with 256 it is C / 6,000.
"""

SUMMED_POSITIONS = 2**12
"""Most positions, over all records together, that one matrix product adds in float32."""

SLACK = 2.0**-15
"""Amount by which the square of a ghost norm is rounded up, as a share of (sum_t |a_t| |d_t|)^2.

It is used if the square is less than the share `CANCELLED`. There the positions of a record cancel,
and rounding hides the rest. A norm that is too small would not bound the gradient, for which four
times the precision of float32 would do. But a sum over records keeps rounding errors of its terms,
which are as long as C / sqrt(SLACK), and one more record changes the order of the sum: with 2^-22
and 512 positions the sum moved by 0.002 C more than its record's row, on processors with AVX-512.
"""

CANCELLED = 2.0**-10
"""Share above which rounding changes a norm by less than C / 10,000. Rounding up would then only
shorten all records of a batch.
"""

UNDERFLOW = 2.0**14
"""Factor by which a ghost norm's square must exceed what float32 may have lost, to be used."""


# --------------------------------------------------------------------------- the contract


@dataclass(eq=False)
class LayerCall:
    """One call of a layer in the forward pass of a batch.

    Args:
        entered: input (n, ...) of the layer, detached.
        left: output (n, ...) of the layer.
        back: gradient (n, ...) of the summed losses with respect to the output.
    """

    entered: Tensor
    left: Tensor
    back: Tensor = field(default_factory=lambda: torch.empty(0))

    def flowed(self) -> tuple[Tensor, Tensor]:
        """Return input (n, ...) and gradient (n, ...) in float32 or wider.

        Under autocast the input is first converted to the precision of the output, as the layer
        did.
        """
        return at_least_float32(self.entered.to(self.back.dtype)), at_least_float32(self.back)

    def of(self, piece: slice | Tensor) -> "LayerCall":
        """Return the call with the rows (k, ...) of some of the n records."""
        return LayerCall(self.entered[piece], self.left, self.back[piece])


class RecordGradients(Protocol):
    """Norms and weighted sums of the per-record gradients of one layer, over all of its calls."""

    def squared_norms(self) -> Tensor:
        """(n,) squared L2 norm of each record's gradient in this layer, preferably in float64."""

    def weighted(self, factors: Tensor) -> Params:
        """Sum over records of factor (n,) times gradient, by the layer's own parameter names.

        Factors have the precision of the layer's parameters; the sum is in float32 or wider.
        """


class ClippingRule(ABC):
    """Norms and clipped sums of per-record gradients, for one layer type or family of types.

    Guarantee that a rule must keep, because book-keeping does not check it: for every layer that
    the rule covers, let g_i be the gradient of record i's loss in all parameters of the layer,
    added up over the calls. Then

    - `squared_norms()` of the returned object is (|g_1|^2, ..., |g_n|^2), never less, up to float32
      rounding, for very large and very small numbers. So multiply results of `squared_row_norms`,
      which are float64; a square in float32 may be 0 or infinite.
    - `weighted(c)` is sum_i c_i g_i of the same g_i, in the shapes of the parameters, with an error
      of at most C / 2,000 if all records are clipped to C. For thousands of records, float32 alone
      is not precise enough; `PrecomputedRows` and `FormedRows` add partial sums in float64.
    - g_i is computed only from row i of the inputs and gradients of the calls, and from the
      parameters.

    With a norm that is too small, a record can change the sum by more than the clip norm, and
    epsilon is wrong. Shapes are checked in every step, values are not. So compare on random inputs:
    `clipped_gradient_sum` of a model with the layer, and `clipped_sum`, which works record by
    record without a rule.

    A layer with a rule takes one tensor and returns one tensor, both with one row per record. Other
    calls are clipped record by record.

    >>> class Gain(nn.Module):
    ...     def __init__(self, width):
    ...         super().__init__()
    ...         self.gain = nn.Parameter(torch.ones(width))
    ...     def forward(self, x):
    ...         return x * self.gain
    >>> class GainRule(ClippingRule):
    ...     layers = (Gain,)
    ...     parameters = frozenset({"gain"})
    ...     def gradients(self, layer, calls):
    ...         products = [entered * back for entered, back in map(LayerCall.flowed, calls)]
    ...         return PrecomputedRows({"gain": sum_of(products)})

    Attributes:
        layers: exact types of the layers; subclasses do not count, because they may compute
            something else.
        parameters: names of the layer's parameters that the rule handles. A layer with other
            parameters is clipped record by record.
    """

    layers: ClassVar[tuple[type[nn.Module], ...]]
    parameters: ClassVar[frozenset[str]] = frozenset({"weight", "bias"})

    def covers(self, layer: nn.Module) -> bool:
        """Return True if the rule may clip a layer with the settings of `layer`."""
        return True

    def output_dims(self, layer: nn.Module) -> int:
        """Least number of dimensions of an output with one row per record.

        An output with fewer is the output of a single record without batch dimension.
        """
        return 2

    @abstractmethod
    def gradients(self, layer: nn.Module, calls: list[LayerCall]) -> RecordGradients:
        """Per-record gradients of the layer, over all its calls (one or more)."""


# --------------------------------------------------------------------------- numbers


def sum_of(parts: Sequence[Tensor]) -> Tensor:
    """Add up tensors of equal shape."""
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).sum(0)


def record_slices(n: int, numbers: int) -> list[slice]:
    """Cut n records, of `numbers` numbers each, into slices that fit into the cache.

    The slices have almost the same length, so that kernels see few different shapes.
    """
    most = min(ROWS_AT_ONCE, max(1, NUMBERS_AT_ONCE // max(1, numbers)))
    rows = -(-n // -(-n // most))
    return [slice(start, start + rows) for start in range(0, n, rows)]


def with_others(piece: slice, n: int) -> tuple[slice, int]:
    """Extend a short last slice by earlier records; also return the number of these records.

    Kernels may round the result for one record differently from the result for two (a convolution
    does). So a last slice that is shorter than the others is computed together with earlier
    records.
    """
    start = max(0, min(piece.start, n - (piece.stop - piece.start)))
    return slice(start, piece.stop), piece.start - start


def summed(n: int, positions: int, weighted: Callable[[slice], Params]) -> Params:
    """Sum over n records, slice by slice; partial sums are added in float64 if there are several.

    Args:
        n: number of records.
        positions: number of positions of one record that a matrix product adds up.
        weighted: function from a slice of the records to their weighted sums.
    """
    most = max(1, min(SUMMED_RECORDS, SUMMED_POSITIONS // max(1, positions)))
    return added_wide(weighted(slice(start, start + most)) for start in range(0, n, most))


def added_wide(parts: Iterable[Params]) -> Params:
    """Add up partial sums in float64; a single one is returned unchanged."""
    total: Params = {}
    for i, part in enumerate(parts):
        if i < 2:
            total = {n: total[n].double() + v for n, v in part.items()} if total else part
        else:
            total = {n: total[n].add_(v) for n, v in part.items()}
    return total


def joined(calls: list[LayerCall]) -> LayerCall:
    """Combine all calls of a layer into one call with the positions of all, (n, positions, k)."""
    entered = [call.entered.to(call.back.dtype) for call in calls]
    parts = [
        [x.flatten(1, -2) if x.dim() > 2 else x[:, None] for x in xs]
        for xs in (entered, [call.back for call in calls])
    ]
    whole = [part[0] if len(part) == 1 else torch.cat(part, 1) for part in parts]
    return LayerCall(whole[0], whole[1], whole[1])


# --------------------------------------------------------------------------- ways


class PrecomputedRows:
    """Per-record gradients that are already computed, one row per record.

    Args:
        rows: parameter name to its gradients, (n, ...).
    """

    def __init__(self, rows: Params) -> None:
        self.rows = rows

    def squared_norms(self) -> Tensor:
        """Compute the (n,) squared norms of the records' gradients."""
        return sum_of(squared_row_norms(*map(at_least_float32, self.rows.values())))

    def weighted(self, factors: Tensor) -> Params:
        """Sum the per-record gradients times factors (n,), by parameter name."""
        return summed(len(factors), 1, lambda piece: self._piece(piece, factors))

    def _piece(self, piece: slice, factors: Tensor) -> Params:
        """Compute the weighted sums over one slice of the records."""
        wider = {name: at_least_float32(row[piece]) for name, row in self.rows.items()}
        return {
            n: (factors[piece].to(r.dtype) @ r.flatten(1)).view(r.shape[1:])
            for n, r in wider.items()
        }


class FormedRows(ABC):
    """Per-record gradients, computed for a few records at a time.

    Norms and weighted sums are computed from the same numbers, so that they agree.

    Args:
        n: number of records.
        numbers: number of values in the gradient of one record.
    """

    def __init__(self, n: int, numbers: int) -> None:
        self.n = n
        self.numbers = numbers
        self.kept: list[PrecomputedRows] = []

    @abstractmethod
    def formed(self, piece: slice) -> Params:
        """Compute the gradients (m, ...) of one slice of the records, by parameter name."""

    def _rows(self, piece: slice) -> PrecomputedRows:
        """Compute the gradients of one slice, in a batch as large as for the other slices."""
        wide, others = with_others(piece, self.n)
        return PrecomputedRows({name: row[others:] for name, row in self.formed(wide).items()})

    def finished(self, sums: Params) -> Params:
        """Return sums over records in the shapes of the parameters."""
        return sums

    def squared_norms(self) -> Tensor:
        """Compute the (n,) squared norms of the records' gradients.

        If the gradients are few, they are kept for `weighted`.
        """
        squares = []
        for piece in record_slices(self.n, self.numbers):
            rows = self._rows(piece)
            squares.append(rows.squared_norms())
            if self.n * self.numbers <= KEPT_NUMBERS:
                self.kept.append(rows)
        return torch.cat(squares)

    def weighted(self, factors: Tensor) -> Params:
        """Sum the per-record gradients times factors (n,), by parameter name."""
        pieces = record_slices(self.n, self.numbers)
        together = max(1, SUMMED_RECORDS // max(1, pieces[0].stop)) if pieces else 1
        groups = [range(len(pieces))[i : i + together] for i in range(0, len(pieces), together)]
        parts = (self._group(group, pieces, factors) for group in groups)
        return self.finished(added_wide(parts))

    def _group(self, group: range, pieces: list[slice], factors: Tensor) -> Params:
        """Compute the weighted sums of several slices, in the precision of the gradients."""
        sums: Params = {}
        for i in group:
            rows = self.kept[i] if self.kept else self._rows(pieces[i])
            part = rows.weighted(factors[pieces[i]])
            sums = {name: sums[name].add_(value) for name, value in part.items()} if sums else part
        return sums


Grams = Callable[[slice | Tensor, torch.dtype], tuple[Tensor, Tensor]]
"""Function from some records and a precision to inner products between positions.

It returns (m, T, T) products of the inputs a of each record, and of the gradients d.
"""


def ghost_norms(grams: Grams, n: int, numbers: int, width: int) -> Tensor:
    """Return (n,) squared ghost norms sum_ts (a_t . a_s)(d_t . d_s) in float64.

    They are rounded up if positions cancel. They are computed in float32, and again in float64 for
    records where float32 may lose digits.

    Args:
        grams: function that computes inner products between the positions of some records.
        n: number of records.
        numbers: number of values that are computed for one record.
        width: number of values of one position, the larger one of a and d.
    """
    parts = []
    for piece in record_slices(n, numbers):
        wide, others = with_others(piece, n)
        parts.append(_ghost(*(gram[others:] for gram in grams(wide, torch.float32))))
    norms, largest = (torch.cat(part).double() for part in zip(*parts, strict=True))
    # A product below 2^-126 may count as 0. So a term of the sum, a product of two sums of `width`
    # products, lacks at most (2 largest + 1) width 2^-126.
    lost = (2 * largest + 1) * (numbers * width * 2.0**-126)
    sure = (norms > UNDERFLOW * lost) & (norms < torch.inf)
    if not bool(sure.all()):
        doubtful = (~sure).nonzero()[:, 0]
        for piece in record_slices(len(doubtful), numbers):
            some = doubtful[piece]
            squares, largest = _ghost(*grams(some, torch.float64))
            norms[some] = torch.where(largest <= LONGEST**2, squares, torch.inf)
    return norms


def _ghost(entered: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
    """(m,) squared ghost norms, and the largest |a_t|^2 or |d_t|^2 of each record, also (m,)."""
    a = entered.diagonal(dim1=1, dim2=2)
    d = back.diagonal(dim1=1, dim2=2)
    longest = (a * d).clamp(min=0.0).sqrt().sum(1).square()
    largest = torch.maximum(a, d).amax(1)  # before the products are overwritten
    norms = entered.mul_(back).sum((1, 2))
    hidden = norms < CANCELLED * longest
    return (norms + hidden * SLACK * longest).clamp(min=0.0), largest
