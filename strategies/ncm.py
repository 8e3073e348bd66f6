"""Nearest class mean: a record belongs to the class whose mean of features is nearest.

Mensink, Verbeek, Perronnin and Csurka, Distance-based image classification: generalizing to new
classes at near-zero cost, TPAMI 2013, section 3.2:

    logit_c(x) = f(x) . mean_c - |mean_c|^2 / 2,    mean_c = sum_{i: y_i = c} f(x_i) / n_c

This differs from -|f(x) - mean_c|^2 / 2 by the same number for all classes. With `normalise`,
features and then means are divided by their norm, as in Rebuffi et al., iCaRL, CVPR 2017, section
2.1, so only the angle between them matters.

Loss: none; the model is not trained and computes the features (for a frozen body:
`perdure.models.frozen`). State: sums of features and counts per class, which add up over
experiences and clients, and the means. Memory cost: two tables of classes x features, in float64.
Privacy cost: one release per experience, of the joint vector (f y^T, v y). With |f| = 1 it is
clipped to sqrt(1 + v^2). Features with a declared bound are divided by the bound before, and their
sums multiplied by it afterwards. A class can be predicted if its (noisy) count is at least one
half; with `normalise` the counts have no other use.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from perdure.contract import Spec, State
from perdure.queries import Gram
from perdure.strategies._closed_form import Analytic, ClassSums, absent, class_means, layout, unit

if TYPE_CHECKING:
    from perdure.contract import Curator

COUNT_WEIGHT = 0.25
"""Weight v of the counts. A count of thousands then gets four times the noise of a coordinate, and
the sum of vectors only 3 % more noise.
"""


@dataclass(frozen=True, kw_only=True)
class NCM(Analytic):
    """Predict the class with the nearest mean of features, without training.

    Guarantee: one release per experience, as in `perdure.strategies._closed_form.Analytic`.

    Args:
        normalise: divide the features of each record, and the mean of each class, by their L2 norm.
        bound: declared L2 norm that features almost never exceed, if they are not normalised; used
            under privacy only, where longer features are scaled down.
    """

    tasks_because: ClassVar[str] = "it predicts the class with the nearest mean"

    def init(self, spec: Spec) -> State:
        """Create a state with sums over no records."""
        return layout(spec, spec.feature_size, matrix=False)

    def query(self, curator: "Curator", state: State) -> Gram:
        """Build the query for class sums and counts."""
        return self.asking(curator, state, ClassSums, totals=COUNT_WEIGHT)

    def derive(self, state: State) -> State:
        """Compute the class means, and the linear head that finds the nearest mean."""
        means = class_means(state["cross"], state["totals"])
        means = unit(means.T).T if self.normalise else means
        return state.replace(
            {"weight": means, "bias": absent(state["totals"]) - 0.5 * means.square().sum(0)}
        )
