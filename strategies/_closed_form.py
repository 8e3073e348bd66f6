"""Mathematics and base class of strategies that solve for the head instead of training it.

The head follows from sums over records.

The sums (Gram matrix, class sums, counts) do not depend on the order, experience or client of a
record, so the head does not either: up to rounding, it is the head that one party with all records
would solve for. For many equal digits, exact sums are computed, kept and solved in float64: in
float32 the small eigenvalues of a Gram matrix are lost in the rounding of the large ones. So the
device must support float64.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from perdure.contract import Context, Forward, Plan, PrivacyCost, Spec, State, Strategy
from perdure.data import Batch
from perdure.errors import ConfigError, PrivacyError, StrategyError
from perdure.queries import Gram
from perdure.tasks import MASKED
from perdure.types import Params
from perdure.utils import chunks

if TYPE_CHECKING:
    from perdure.contract import Curator
    from perdure.data import Experience

BLOCK = 512
"""Rows of a Gram matrix that are added at once; entries below the diagonal are mirrored instead of
computed.
"""
SHARE = 0.5
"""Share of the detected noise of a matrix that is added to the matrix as a ridge."""
PRESENT = 0.5
"""Count below which a class is taken to have no records, so that it is never predicted."""

# --------------------------------------------------------------------------- what is asked


class Float64Gram(Gram):
    """`Gram` with exact sums in float64 instead of float32.

    Use it without privacy only: under privacy the curator does not know this class, and would clip
    its rows of d^2 numbers one by one.
    """

    def exact_sum(self, forward: Forward, batch: Batch, chunk: int) -> Params:
        """Sums `gram` (d, d), `cross` (d, c) and `totals` (c,) in float64, not clipped.

        `totals` is the sum of targets; with one-hot targets it is the number of records per class.

        Args:
            chunk: number of records whose features are computed at a time.
        """
        sums: Params = {}
        for parts in float64_parts(self, forward, batch, chunk):
            f = parts["features"]
            y = parts["targets"]
            if not sums:
                sums = {"gram": f.new_zeros(f.shape[1], f.shape[1])} | _zero_class_sums(f, y)
            _add_upper_triangle(sums["gram"], f)
            _add_class_sums(sums, f, y)
        return sums | {"gram": mirrored(sums["gram"])}


class ClassSums(Gram):
    """Query for class sums of features and counts: `Gram` without its matrix.

    `cross` (d, c) has the sum of features of each class, `totals` (c,) the number of its records.

    A record's vector is (w f y^T, v y), of norm sqrt(w^2 |f|^2 + v^2) |y|. Exact sums are float64.
    """

    def norm(self, length: float) -> float:
        """Largest L2 norm of the vector of a record whose features have L2 norm `length`."""
        return math.sqrt((self.weight * length) ** 2 + self.totals**2)

    def __call__(self, forward: Forward, batch: Batch) -> Params:
        """Compute each record's unclipped vector, as `cross` (n, d, c) and `totals` (n, c)."""
        parts = self.parts(forward, batch)
        f = parts["features"]
        y = parts["targets"]
        return self.packed({"cross": f[:, :, None] * y[:, None, :], "totals": y})

    def shapes(self, forward: Forward, batch: Batch) -> dict[str, torch.Size]:
        """Shapes of the tensors for one record."""
        parts = self.parts(forward, batch)
        d = parts["features"].shape[1]
        c = parts["targets"].shape[1]
        return {"cross": torch.Size([d, c]), "totals": torch.Size([c])}

    def exact_sum(self, forward: Forward, batch: Batch, chunk: int) -> Params:
        """Sums `cross` (d, c) and `totals` (c,) in float64, not clipped."""
        sums: Params = {}
        for parts in float64_parts(self, forward, batch, chunk):
            f = parts["features"]
            y = parts["targets"]
            sums = sums or _zero_class_sums(f, y)
            _add_class_sums(sums, f, y)
        return sums


def float64_parts(query: Gram, forward: Forward, batch: Batch, chunk: int) -> Iterator[Params]:
    """Features (m, d) and targets (m, c) of at most `chunk` records at a time, as float64."""
    with torch.no_grad():
        for piece in chunks(batch.tensors(), chunk):
            parts = query.parts(forward, Batch.from_tensors(piece), strict=True)
            yield {name: value.double() for name, value in parts.items()}


def _zero_class_sums(f: Tensor, y: Tensor) -> Params:
    """Zeros in the shapes of `cross` (d, c) and `totals` (c,)."""
    return {"cross": f.new_zeros(f.shape[1], y.shape[1]), "totals": f.new_zeros(y.shape[1])}


def _add_class_sums(sums: Params, f: Tensor, y: Tensor) -> None:
    """Add f^T y to `cross` and the sum of y to `totals`, in place."""
    sums["cross"].addmm_(f.T, y)
    sums["totals"] += y.sum(0)


def _add_upper_triangle(matrix: Tensor, f: Tensor) -> None:
    """Add f^T f to the upper triangle of a matrix (d, d), in place; `mirrored` fills the rest."""
    for start in range(0, len(matrix), BLOCK):
        rows = slice(start, start + BLOCK)
        matrix[rows, start:].addmm_(f[:, rows].T, f[:, start:])


def mirrored(matrix: Tensor) -> Tensor:
    """Build the symmetric matrix (d, d) with the upper triangle of the given matrix."""
    return matrix.triu() + matrix.triu(1).T


# --------------------------------------------------------------------------- solving


def ridge_head(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Return (d, c) matrix W that minimises sum_i |f_i^T W - y_i|^2 + ridge |W|^2, by Cholesky.

        W = (gram + ridge I)^-1 cross

    Raises:
        StrategyError: if the matrix is not positive definite in its precision.
    """
    factor, failed = torch.linalg.cholesky_ex(shifted(gram, ridge))
    if bool(failed):
        raise StrategyError(
            f"a matrix of width {len(gram)} with ridge = {ridge:g} is singular; use a larger ridge"
        )
    solution: Tensor = torch.cholesky_solve(cross, factor)
    return solution


def shifted(matrix: Tensor, ridge: float | Tensor) -> Tensor:
    """Return the matrix (d, d) plus ridge times the identity."""
    result = matrix.clone()
    result.diagonal().add_(ridge)
    return result


def denoised(matrix: Tensor, share: float = SHARE) -> Tensor:
    """Make a noisy symmetric matrix (d, d) positive definite, as post-processing.

    The true matrix must have no negative eigenvalue.

        V (max(values, 0) + share * floor) V^T,   floor = -(least eigenvalue)

    Symmetric noise of standard deviation s on the diagonal and s / sqrt(2) off it (see
    `perdure.queries.Gram`) changes eigenvalues by up to about s sqrt(2 d). If the true matrix has
    eigenvalues near 0, as wide matrices do, the smallest noisy eigenvalue shows this size, because
    only noise makes it negative. So the noise is estimated from the release itself, also for sums
    of many experiences and clients. A matrix without noise is returned unchanged.

    Args:
        matrix: the noisy matrix.
        share: share of the floor that is added to all eigenvalues, as a ridge. A smaller share
            leaves more noise, a larger one makes classes more similar.
    """
    values, vectors = torch.linalg.eigh(matrix)
    floor = (-values[0]).clamp(min=0)
    result: Tensor = (vectors * (values.clamp(min=0) + share * floor)) @ vectors.T
    return result


def class_means(cross: Tensor, totals: Tensor) -> Tensor:
    """Return (d, c) mean of each class; 0 for a class without records."""
    return cross / totals.clamp(min=1.0)


def absent(totals: Tensor) -> Tensor:
    """Return (c,) bias of the logits: `MASKED` for classes without records, 0 for others.

    With it, classes without records are never predicted.
    """
    return torch.where(totals < PRESENT, MASKED, 0.0).to(totals)


def within_covariance(gram: Tensor, cross: Tensor, totals: Tensor) -> Tensor:
    """(d, d) covariance of the features around their class means, divided by the number of records.

    (gram - sum_c n_c mean_c mean_c^T) / n
    """
    return (gram - class_means(cross, totals) @ cross.T) / totals.sum().clamp(min=1.0)


def shrunk(covariance: Tensor, shrinkage: float, *, scaled: bool) -> Tensor:
    """Return (1 - shrinkage) covariance + shrinkage m I.

    m is the mean variance if `scaled`, and 1 if not.
    """
    mean = covariance.diagonal().mean().clamp(min=1e-30) if scaled else 1.0
    return shifted((1 - shrinkage) * covariance, shrinkage * mean)


def discriminant_head(covariance: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (d, c) and bias (c,) of linear discriminant analysis with equal priors.

        weight = covariance^-1 means,   bias_c = -1/2 means_c^T covariance^-1 means_c

    With the identity as covariance, this is the classifier of the nearest mean.

    Raises:
        StrategyError: if the covariance is not positive definite.
    """
    weight = ridge_head(covariance, means, 0.0)
    return weight, -0.5 * (weight * means).sum(0)


def unit(features: Tensor) -> Tensor:
    """Features (n, d) divided by their L2 norm; 0 stays 0."""
    result: Tensor = features / features.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return result


# ----------------------------------------------------------------------- what such strategies share


@dataclass(frozen=True, kw_only=True)
class Analytic(Strategy, ABC):
    """Base class of strategies that solve for the head from sums of features, without training.

    Guarantee: exactly one release per experience. Without privacy the head is the same, up to the
    rounding of float64, for any order of experiences and any split of the records over experiences
    and clients.

    Args:
        normalise: divide the features of each record by their L2 norm.
        bound: declared L2 norm that features almost never exceed, if they are not normalised; used
            under privacy only, where longer features are scaled down. None if no bound is known.
    """

    normalise: bool = True
    bound: float | None = None
    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost(releases=1)

    def __post_init__(self) -> None:
        field = f"{self.name.lower()}.bound"
        if self.bound is not None and not 0 < self.bound < math.inf:
            raise ConfigError.of(field, self.bound, "a number above 0, or None")
        if self.bound is not None and self.normalise:
            raise ConfigError.of(
                field, self.bound, "None with normalise=True, because all norms are then 1"
            )

    def plan(self, experience: "Experience") -> Plan:
        """Return a plan without gradient steps."""
        return Plan(train=False)

    def features(self, forward: Forward, x: Tensor, state: State) -> Tensor:
        """Compute the features for which the head is solved.

        Args:
            forward: the model.
            x: inputs (n, ...).
            state: the current state.

        Returns:
            (n, d) features.
        """
        features = forward.features(x).flatten(1)
        return unit(features) if self.normalise else features

    def predict(self, forward: Forward, x: Tensor, context: Context, state: State) -> Tensor:
        """Return (n, C) logits of the solved head."""
        features = self.features(forward, x, state)
        logits = features.double() @ state["weight"] + state["bias"]
        return torch.where(context.allowed, logits.to(features.dtype), MASKED)

    def after_experience(self, curator: "Curator", params: Params, state: State) -> State:
        """Release the sums over the experience's records, and add them to the state."""
        query = self.query(curator, state)
        released = curator.release(
            query, clip_norm=query.norm(self.length(curator)), purpose="sums of features"
        )
        scale = self.scale(curator)
        scales = {"gram": scale**2, "cross": scale, "totals": 1.0}
        changes = {
            name: state[name] + scales[name] * released[name].to(state[name].dtype)
            for name in released
            if name in state
        }
        return state.replace(changes | {"noisy": state["noisy"] + float(curator.private)})

    @abstractmethod
    def query(self, curator: "Curator", state: State) -> Gram:
        """Return the query whose sum over the records of an experience is released."""

    def asking(
        self,
        curator: "Curator",
        state: State,
        kind: type[Gram],
        *,
        weight: float = 1.0,
        totals: float = 0.0,
    ) -> Gram:
        """Build a query over the features of the head and one-hot targets.

        Features are divided by `scale`.

        Args:
            curator: curator that will answer the query; it decides the scale.
            state: the current state.
            kind: class of the query.
            weight: weight of the features in the query, as in `Gram`.
            totals: weight of the counts in the query, as in `Gram`.
        """
        classes = torch.arange(len(state["bias"]), device=state["bias"].device)
        scale = self.scale(curator)

        def features(forward: Forward, batch: Batch) -> Tensor:
            features = self.features(forward, batch.inputs, state)
            return features if scale == 1.0 else features / scale

        def targets(forward: Forward, batch: Batch) -> Tensor:
            return (batch.labels[:, None] == classes).float()

        return kind(features, targets, weight=weight, totals=totals)

    def scale(self, curator: "Curator") -> float:
        """Number by which the query divides features, and by which sums are multiplied afterwards.

        Under privacy it is the declared bound: matrix, products and counts get the same noise, and
        their sizes grow with the square of the features, with the features, and not at all. In
        other units than the bound, the noise would be too large for the smaller ones.

        Raises:
            PrivacyError: under privacy, if features have no bound.
        """
        if not curator.private or self.normalise:
            return 1.0
        if self.bound is None:
            raise PrivacyError(
                f"{self.name} releases sums of features, but the norm of features has no bound; "
                "set normalise=True, or declare a bound with bound=..."
            )
        return self.bound

    def length(self, curator: "Curator") -> float:
        """Largest norm of a record's features, divided by `scale`, for which it is not clipped."""
        return 1.0


def layout(spec: Spec, d: int, *, matrix: bool, counts: bool = True) -> State:
    """Create the state: sums over records, and the solved head, all in float64.

    Summed over clients are `gram` (d, d) if `matrix`, `cross` (d, C), `totals` (C,) if `counts`,
    and `noisy` (), the number of releases with noise. `weight` (d, C) and `bias` (C,) are local.

    Raises:
        StrategyError: if the model does not declare the number of its features.
    """
    spec.require_features()
    device = next((value.device for value in spec.params.values()), torch.device("cpu"))
    c = spec.num_classes
    state = State()
    sums = {
        "gram": (d, d) if matrix else None,
        "cross": (d, c),
        "totals": (c,) if counts else None,
        "noisy": (),
    }
    for name, shape in sums.items():
        if shape is not None:
            state = state.declare(
                name, torch.zeros(shape, dtype=torch.float64, device=device), "sum"
            )
    zeros = torch.zeros(d + 1, c, dtype=torch.float64, device=device)
    return state.declare("weight", zeros[:d].clone(), "local").declare(
        "bias", zeros[d].clone(), "local"
    )
