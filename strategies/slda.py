"""Linear discriminant analysis from sums: class means and one shared covariance.

Hayes and Kanan, Lifelong machine learning with deep streaming linear discriminant analysis, CVPR
Workshops 2020, section 3, equations 1 to 4.

    logit_c(x) = f(x) . L mean_c - 1/2 mean_c . L mean_c,    L = ((1 - e) S + e m I)^-1
    S = 1/n (sum_i f_i f_i^T - sum_c n_c mean_c mean_c^T)

The paper updates S record by record, around the class mean at that moment, so S depends on the
order of records. Here S is the covariance around the final means, which does not depend on the
order. The shrinkage e is towards m I with m the mean variance, so it has the same effect for
features of any length; the paper has m = 1 (`scaled=False`).

Loss: none; the model is not trained and computes the features (for a frozen body:
`perdure.models.frozen`). State: Gram matrix, class sums and counts, which add up over experiences
and clients, and the solved head. Memory cost: a matrix of features x features and two tables of
classes x features, in float64. Privacy cost: one release per experience, of the joint vector
(svec(f f^T), w f y^T, v y) of `perdure.queries.Gram`. With |f| = 1 it is clipped to sqrt(1 + w^2 +
v^2). Features with a declared bound are divided by the bound before, and their sums multiplied by
it afterwards. Negative eigenvalues of the noisy covariance are removed, and half of the noise that
they show is added as a ridge (`perdure.strategies._closed_form.denoised`); this costs no privacy.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from perdure.contract import Spec, State
from perdure.errors import ConfigError
from perdure.queries import Gram
from perdure.strategies._closed_form import (
    Analytic,
    Float64Gram,
    absent,
    class_means,
    denoised,
    discriminant_head,
    layout,
    shrunk,
    within_covariance,
)

if TYPE_CHECKING:
    from perdure.contract import Curator

WEIGHT = 0.7
COUNT_WEIGHT = 0.5
"""Weights w and v: the matrix is inverted, so it tolerates the least noise."""


@dataclass(frozen=True, kw_only=True)
class SLDA(Analytic):
    """Linear discriminant analysis with a shared covariance, solved without training.

    Guarantee: one release per experience, as in `perdure.strategies._closed_form.Analytic`.

    Args:
        shrinkage: strength e of the shrinkage, above 0 and at most 1.
        scaled: shrink towards the mean variance times the identity; if False, towards the identity.
        normalise: divide the features of each record by their L2 norm.
        bound: declared L2 norm that features almost never exceed, if they are not normalised; used
            under privacy only, where longer features are scaled down.
    """

    shrinkage: float = 1e-4
    scaled: bool = True
    not_vmappable_because: ClassVar[str | None] = (
        "its head is solved by a factorisation that is checked for success"
    )
    tasks_because: ClassVar[str] = "it predicts one class by means and a shared covariance"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.shrinkage <= 1:
            raise ConfigError.of("slda.shrinkage", self.shrinkage, "a number above 0 and at most 1")

    @classmethod
    def example(cls) -> Self:
        """Return a small instance: a covariance shrunk by 0.01."""
        return cls(shrinkage=0.01)

    def init(self, spec: Spec) -> State:
        """Create a state with sums over no records."""
        return layout(spec, spec.feature_size, matrix=True)

    def query(self, curator: "Curator", state: State) -> Gram:
        """Build the query for Gram matrix, class sums and counts."""
        return self.asking(
            curator,
            state,
            Gram if curator.private else Float64Gram,
            weight=WEIGHT,
            totals=COUNT_WEIGHT,
        )

    def derive(self, state: State) -> State:
        """Compute the shrunk covariance, and solve for the head with it."""
        covariance = within_covariance(state["gram"], state["cross"], state["totals"])
        covariance = denoised(covariance) if bool(state["noisy"]) else covariance
        means = class_means(state["cross"], state["totals"])
        weight, bias = discriminant_head(
            shrunk(covariance, self.shrinkage, scaled=self.scaled), means
        )
        return state.replace({"weight": weight, "bias": absent(state["totals"]) + bias})
