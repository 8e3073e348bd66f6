"""Query for the Gram matrix of features, products of features and targets, and sums of targets."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from perdure.contract.forward import Forward
from perdure.data.records import Batch
from perdure.errors import ConfigError, DataError
from perdure.privacy.clipping.clip import Clip, clip_factors
from perdure.queries.evaluation import SummedQuery
from perdure.queries.per_record import add_to, asked_alone, rows_of
from perdure.types import Params
from perdure.utils.chunking import chunks

Table = Callable[[Forward, Batch], Tensor]
"""Function from (forward, batch) to features or targets (n, width), one row per record."""


@dataclass(frozen=True)
class Gram(SummedQuery):
    """Gram matrix of features, products of features and targets, and sum of targets.

    These are the statistics of analytic heads.

        gram = sum_i f_i f_i^T,   cross = sum_i f_i y_i^T,   totals = sum_i y_i,   |y_i| <= 1

    With one-hot targets, the columns of `cross` are the sums of features per class, and `totals`
    has the number of records per class. Nearest-class-mean, linear discriminant and ridge heads are
    functions of these.

    The vector of a record is (svec(f f^T), w f y^T, v y). Here svec is the upper triangle, row by
    row, with the entries off the diagonal times sqrt(2). Its L2 norm is

        sqrt(|f|^4 + w^2 |f|^2 |y|^2 + v^2 |y|^2)

    and the whole vector is clipped to C. Noise is drawn for the upper triangle and mirrored, so the
    released matrix is symmetric. With s = noise multiplier x C, the standard deviation of the noise
    is s on the diagonal, s / sqrt(2) off it, s / w on `cross`, s / v on `totals`; the largest
    eigenvalue of the noise is about s sqrt(2 d).

    Guarantee: one record changes the vector by at most C. No row can depend on another record,
    because features and targets are evaluated on each record alone, in batches of one under
    `torch.func.vmap` (measured at 1.1 to 1.4 times the plain call).

    Reason for svec: the plain upper triangle has sensitivity |f|^2, too (take f along an axis), so
    it needs noise s everywhere. The factor sqrt(2) makes every direction of f equally sensitive,
    and noise off the diagonal is smaller by sqrt(2).

    Memory: a few (d, d) matrices. Rows of d^2 numbers are never stored.

    Args:
        features: function (forward, batch) -> (n, d).
        targets: function (forward, batch) -> (n, c). Under privacy, targets with a norm above 1 are
            scaled to norm 1, and targets with NaN or infinity count as 0; without privacy both are
            refused. None for the matrix alone.
        weight: w. A larger w means more relative noise in `gram` and less in `cross`.
        totals: v; 0 to leave out the sum of targets.

    Source: Dwork, Talwar, Thakurta and Zhang 2014, "Analyze Gauss" (symmetric Gaussian noise on a
    Gram matrix, with the plain upper triangle).
    """

    features: Table
    targets: Table | None = None
    weight: float = field(default=1.0, kw_only=True)
    totals: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        if not 1e-6 <= self.weight <= 1e6:
            raise ConfigError.of("weight", self.weight, "a number from 1e-06 to 1e+06")
        if self.totals and not (1e-6 <= self.totals <= 1e6 and self.targets):
            raise ConfigError.of(
                "totals", self.totals, "0, or with targets a number from 1e-06 to 1e+06"
            )

    def norm(self, length: float) -> float:
        """Largest L2 norm of the vector of a record whose features have L2 norm `length`.

        Given as clip norm, it leaves records with features of at most this norm unclipped.
        """
        cross = (self.weight * length) ** 2 if self.targets else 0.0
        return math.sqrt(length**4 + cross + self.totals**2)

    def __call__(self, forward: Forward, batch: Batch) -> Params:
        """Each record's unclipped vector, as tensors (n, d (d + 1) / 2), (n, d, c) and (n, c).

        The sums below are computed without these rows, which are large.
        """
        parts = self.parts(forward, batch)
        left = parts["features"][:, :, None]
        y = parts.get("targets")
        rows = {"gram": left * left.mT}
        if y is not None:
            rows["cross"] = left * y[:, None, :]
        return self.packed(rows | ({"totals": parts["targets"]} if self.totals else {}))

    def parts(self, forward: Forward, batch: Batch, *, strict: bool = False) -> Params:
        """Compute `features` (n, d) and, if any, `targets` (n, c) of norm at most 1, in float32.

        Args:
            forward: the model.
            batch: n records.
            strict: True to refuse targets with a norm above 1 instead of clipping them.

        Raises:
            DataError: if shapes are wrong, or (if `strict`) a target has a norm above 1.
        """
        parts = {"features": _table(self.features, forward, batch, "features")}
        if self.targets:
            targets = _table(self.targets, forward, batch, "targets")
            squares = targets.square().sum(1)
            if strict and not bool((squares <= 1 + 1e-5).all()):
                raise DataError(
                    "the targets of a record have an L2 norm above 1 or NaN; divide all targets "
                    "by a bound declared in advance"
                )
            parts["targets"] = _finite(targets) * clip_factors(squares, 1.0)[:, None]
        return parts

    def exact_sum(self, forward: Forward, batch: Batch, chunk: int) -> Params:
        """Sums without privacy: `gram` (d, d), `cross` (d, c) and `totals` (c,).

        Features are computed for `chunk` records at a time.
        """
        sums: Params = {}
        with torch.no_grad():
            for piece in chunks(batch.tensors(), chunk):
                self._add(sums, self.parts(forward, Batch.from_tensors(piece), strict=True))
        matrix = sums["gram"]
        return sums | {"gram": matrix.triu() + matrix.triu(1).T}

    def clipped_sum(
        self, module: nn.Module, params: Params, tensors: Mapping[str, Tensor], clip: Clip
    ) -> Params | None:
        """Sum over records of their clipped vectors; None if there are no records."""
        sums: Params = {}
        with torch.no_grad():
            for rows in asked_alone(rows_of(self.parts, module), params, tensors):
                # in float64: over many records, sums in float32 change by more than the clip norm
                parts = {name: value.double() for name, value in rows.items()}
                self._add(sums, parts, clip_factors(self._squared_norms(parts), clip.norm))
        return self.packed(sums) if sums else None

    def packed(self, sums: Params) -> Params:
        """Scale sums or rows to the form in which a record's norm is bounded (see the class)."""
        scales = {"cross": self.weight, "totals": self.totals}
        return {n: svec(value) if n == "gram" else scales[n] * value for n, value in sums.items()}

    def unpacked(self, released: Params) -> Params:
        """Convert a released sum from the scaled form to symmetric `gram`, `cross` and `totals`."""
        scales = {"cross": self.weight, "totals": self.totals}
        return {
            n: unsvec(value) if n == "gram" else value / scales[n] for n, value in released.items()
        }

    def on_synthetic(self, forward: Forward, batch: Batch) -> Params:
        """Features and targets of synthetic records, by which a release tells queries apart."""
        return self.parts(forward, batch)

    def shapes(self, forward: Forward, batch: Batch) -> dict[str, torch.Size]:
        """Shapes of one record's vector, computed without the vector."""
        parts = self.parts(forward, batch)
        d = parts["features"].shape[1]
        shapes = {"gram": torch.Size([d * (d + 1) // 2])}
        if self.targets:
            c = parts["targets"].shape[1]
            shapes |= {"cross": torch.Size([d, c])} | (
                {"totals": torch.Size([c])} if self.totals else {}
            )
        return shapes

    def _squared_norms(self, parts: Params) -> Tensor:
        """Return (n,) squared L2 norms of the records' vectors."""
        f = parts["features"].square().sum(1)
        if "targets" not in parts:
            return f.square()
        y = parts["targets"].square().sum(1)
        return f.square() + self.weight**2 * f * y + self.totals**2 * y

    def _add(self, sums: Params, parts: Params, factors: Tensor | None = None) -> None:
        """Add the vectors of records, given by their `parts` times factors (n,), to the sums."""
        f = parts["features"]
        y = parts.get("targets")
        weighted = f if factors is None else (f := _finite(f)) * factors[:, None]
        if "gram" not in sums:
            sums["gram"] = f.new_zeros(f.shape[1], f.shape[1])
        sums["gram"].addmm_(weighted.T, f)  # in place, because it has 100 MB for d = 5,000
        if y is not None:
            add_to(sums, "cross", weighted.T @ y)
        if y is not None and self.totals:
            add_to(sums, "totals", y.sum(0) if factors is None else factors @ y)


def svec(matrix: Tensor) -> Tensor:
    """Upper triangle (..., d (d + 1) / 2) of a matrix (..., d, d), row by row.

    Entries off the diagonal are multiplied by sqrt(2), so a symmetric matrix keeps its Frobenius
    norm.
    """
    rows, columns = torch.triu_indices(matrix.shape[-1], matrix.shape[-1], device=matrix.device)
    return matrix[..., rows, columns] * torch.where(rows == columns, 1.0, math.sqrt(2))


def unsvec(vector: Tensor) -> Tensor:
    """Rebuild the symmetric matrix (d, d) from its `svec`."""
    d = (math.isqrt(8 * len(vector) + 1) - 1) // 2
    rows, columns = torch.triu_indices(d, d, device=vector.device)
    values = vector / torch.where(rows == columns, 1.0, math.sqrt(2))
    matrix = vector.new_empty(d, d)
    matrix[rows, columns] = matrix[columns, rows] = values
    return matrix


def _table(table: Table, forward: Forward, batch: Batch, name: str) -> Tensor:
    """Evaluate features or targets, and check that they have the shape (n, width)."""
    answer = table(forward, batch)
    if answer.dim() != 2 or len(answer) != len(batch):
        raise DataError(
            f"{name} of {len(batch)} records have shape {tuple(answer.shape)}; allowed: (n, width)"
        )
    return answer.detach().float()


def _finite(values: Tensor) -> Tensor:
    """Replace NaN and infinity by 0, so that one record cannot spoil a sum."""
    return torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
