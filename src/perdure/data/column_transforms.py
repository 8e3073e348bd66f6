"""Changes of input columns by constants of public records: scaling, gaps, selection and PCA.

    column -> fill gaps -> choose columns -> (x - shift) / scale -> project

The constants are computed by scikit-learn from *public* records. A row of the result depends on its
record and on these constants only.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from perdure.data.datasets.base import Dataset
from perdure.data.records import Records
from perdure.data.row_view import changed_rows
from perdure.errors import ConfigError
from perdure.tasks import SingleLabel
from perdure.utils.checked_arguments import checked_arguments
from perdure.utils.chunking import row_slices

if TYPE_CHECKING:
    from numpy.typing import NDArray

Gaps = Literal["mean", "median"]
"""Statistic of a column that replaces its missing numbers (NaN)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ColumnTransform:
    """Change of the columns of every record, by constants of public records.

    Guarantee: the result may be trained on with privacy, where the constants come from other
    records. Records whose ids are among those of the constants are marked (`Records.coupled_by`),
    and a private learner refuses them. If both have no ids but positions, and other partitions,
    their inputs are compared instead, so give such data sets names of their own.

    Args:
        name: call that made the transform, for messages.
        public: records from which the constants come.
        fill: (features,) numbers that replace missing ones; None to keep them.
        chosen: positions of the columns that are kept; None for all.
        shift: number that is subtracted from each kept column; None for 0.
        scale: number by which each kept column is divided; None for 1.
        weights: (kept columns, k) projection; None for none.
    """

    name: str
    public: Records
    fill: Tensor | None = None
    chosen: Tensor | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None
    weights: Tensor | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return changed inputs: (n, k) if columns are chosen or projected, else in their shape."""
        shape = inputs.shape
        rows = inputs.reshape(len(inputs), -1)
        if self.fill is not None:
            rows = torch.where(rows.isnan(), self.fill.to(rows), rows)
        if self.chosen is not None:
            rows = rows[:, self.chosen.to(rows.device)]
        if self.shift is not None:
            rows = rows - self.shift.to(rows)
        if self.scale is not None:
            rows = rows / self.scale.to(rows)
        if self.weights is not None:
            rows = rows @ self.weights.to(rows)
        return rows if self.chosen is not None or self.weights is not None else rows.reshape(shape)

    def records(self, records: Records) -> Records:
        """Return the records with changed inputs; ids, labels and partition stay.

        The declared domain does not hold for the changed inputs, and is left out.
        """
        return replace(
            records,
            inputs=changed_rows(records.inputs, self),
            domain=None,
            coupled_by=self._made_from(records) or records.coupled_by,
        )

    def _made_from(self, records: Records) -> str:
        """Name the transform if its constants may come from some of the records; else ""."""
        if not _share_records(self.public, records):
            return ""
        if not (self.public.ids_by_position and records.ids_by_position):
            return self.name
        return (
            f"{self.name} of records without ids in {self.public.partition!r} (if they are other "
            "records, give each table a name, name=..., or ids=...)"
        )

    def dataset(self, data: Dataset) -> Dataset:
        """Return the data set with changed inputs of its training and test records."""
        train = self.records(data.train)
        return replace(
            data,
            train=train,
            test=self.records(data.test),
            input_shape=tuple(train.inputs.shape[1:]),
            notes=(*data.notes, f"inputs are changed by {self.name}"),
        )


@checked_arguments
def column_scaling(public: Records, *, impute: Gaps | None = None) -> ColumnTransform:
    """Scale every column to mean 0 and deviation 1 of public records, and fill its gaps.

    Args:
        public: public records with float inputs.
        impute: "mean" or "median" of the public column replaces missing numbers; None if none is
            missing. A column that is missing in all public records is refused.

    Raises:
        ConfigError: if inputs are no floats, or have gaps that nothing fills.
    """
    from sklearn.preprocessing import StandardScaler

    rows = _rows(public, gaps=impute is not None)
    fill = None
    if impute is not None:
        from sklearn.impute import SimpleImputer

        imputer = SimpleImputer(strategy=impute, keep_empty_features=True).fit(rows)
        empty = torch.from_numpy(rows).isnan().all(0)
        if empty.any():
            given = f"column {int(empty.nonzero()[0])} without a number"
            raise ConfigError.of("public", given, "at least one number in each column")
        fill = torch.from_numpy(imputer.statistics_)
        rows = imputer.transform(rows)
    scaler = StandardScaler().fit(rows)
    return ColumnTransform(
        name=f"column_scaling(impute={impute!r})",
        public=public,
        fill=fill,
        shift=torch.from_numpy(scaler.mean_),
        scale=torch.from_numpy(scaler.scale_),
    )


@checked_arguments
def principal_components(
    public: Records, *, count: int, whiten: bool = False, seed: int = 0
) -> ColumnTransform:
    """Project records to the directions in which public records vary most (PCA).

    Guarantee: none for `public`, whose covariance is computed without noise.

    Args:
        public: public records with float inputs.
        count: number of directions.
        whiten: scale each direction to deviation 1 in the public records.
        seed: seed of the randomised solver, which is used for many columns.

    Raises:
        ConfigError: if there are fewer records or columns than directions.
    """
    from sklearn.decomposition import PCA

    rows = _rows(public)
    _refuse_count(count, min(rows.shape))
    found = PCA(count, whiten=whiten, random_state=seed).fit(rows)
    weights = torch.from_numpy(found.components_).T
    if whiten:
        weights = weights / torch.from_numpy(found.explained_variance_).clamp_min(1e-12).sqrt()
    return ColumnTransform(
        name=f"principal_components(count={count})",
        public=public,
        shift=torch.from_numpy(found.mean_),
        weights=weights.contiguous(),
    )


@checked_arguments
def best_columns(
    public: Records,
    *,
    count: int,
    score: "Literal['f_classif', 'chi2'] | Callable[..., Any]" = "f_classif",
) -> ColumnTransform:
    """Keep the columns that tell most about the labels of public records (SelectKBest).

    Guarantee: none for `public`, whose inputs and labels are read without noise.

    Args:
        public: public records with float inputs and one class each.
        count: number of columns to keep.
        score: name of a function of `sklearn.feature_selection`, or a function of inputs and labels
            that returns scores, such as `mutual_info_classif`.

    Raises:
        ConfigError: if there are fewer columns, or the score does not fit.
    """
    from sklearn import feature_selection

    if not isinstance(public.task, SingleLabel):
        given = f"records of the task {public.task.name}"
        raise ConfigError.of("public", given, "records with one class each")
    rows = _rows(public)
    _refuse_count(count, rows.shape[1])
    function = getattr(feature_selection, score) if isinstance(score, str) else score
    constant = rows.std(0) == 0
    varying = (~torch.from_numpy(constant)).nonzero().flatten()
    _refuse_count(count, len(varying))  # a score of a constant column is no number
    try:
        chosen = feature_selection.SelectKBest(function, k=count).fit(
            rows[:, ~constant], public.labels.cpu().numpy()
        )
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError.of("score", score, f"a score that fits ({reason})") from error
    return ColumnTransform(
        name=f"best_columns(count={count})",
        public=public,
        chosen=varying[torch.from_numpy(chosen.get_support(indices=True))],
    )


def _rows(public: Records, *, gaps: bool = False) -> "NDArray[Any]":
    """Return inputs (n, features) of public records in float64.

    Args:
        public: public records.
        gaps: True to allow missing numbers.
    """
    if not public.inputs.is_floating_point() or not len(public):
        given = f"{len(public)} records in {public.inputs.dtype}"
        raise ConfigError.of("public", given, "float inputs, at least one record")
    rows = public.inputs[:].reshape(len(public), -1).double().cpu()
    if not gaps and not rows.isfinite().all():
        raise ConfigError.of(
            "public", "inputs that are NaN or infinite", "numbers; column_scaling fills gaps"
        )
    return rows.numpy()


def _share_records(public: Records, records: Records) -> bool:
    """Return True if two sets may have a record in common."""
    positions = public.ids_by_position and records.ids_by_position
    if not positions or public.partition == records.partition:
        return bool(torch.isin(records.ids.cpu(), public.ids.cpu()).any())
    # positions in two tables do not identify records
    if public.inputs.shape[1:] != records.inputs.shape[1:]:
        return False
    known = set(_row_bytes(public.inputs))
    return any(row in known for row in _row_bytes(records.inputs))


def _row_bytes(inputs: Tensor) -> Iterator[bytes]:
    """Yield each row in float32, with one zero."""
    for piece in row_slices(inputs):
        for row in (inputs[piece].flatten(1).float().cpu() + 0.0).numpy():
            yield row.tobytes()


def _refuse_count(count: int, most: int) -> None:
    if not 1 <= count <= most:
        allowed = f"1 to {most}, by the public records and their columns that vary"
        raise ConfigError.of("count", count, allowed)
