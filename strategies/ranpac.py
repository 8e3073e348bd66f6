"""Ridge regression from features to classes, solved from sums, with optional random projection.

McDonnell, Gong, Parvaneh, Abbasnejad and van den Hengel, RanPAC: Random projections and pre-trained
models for continual learning, NeurIPS 2023, section 3.2 and algorithm 1:

    h(x) = relu(R^T f(x)),   G = sum_i h_i h_i^T,   C = sum_i h_i y_i^T
    W = (G + ridge I)^-1 C,   logits = W^T h(x)

Two other methods have the same mathematics: ACIL (Zhuang et al., Analytic class-incremental
learning with absolute memorization and privacy protection, NeurIPS 2022) arrives at the same W
recursively, through the inverse matrix and the Woodbury identity; AFL (He et al., Analytic
federated learning, CVPR 2025) merges the solutions of clients pairwise into the W of all records.
`RanPAC` computes both, because its sums add up over experiences (ACIL) and clients (AFL). The
feature expansion of ACIL is `projection`.

Loss: none; the model is not trained and computes the features (for a frozen body:
`perdure.models.frozen`). State: Gram matrix and class sums, which add up over experiences and
clients, the projection, which is drawn from `seed` and equal on all parties, and the solved head.
Memory cost: a matrix of features x features and two tables of classes x features, in float64; the
projection. Privacy cost: one release per experience, of the joint vector (svec(h h^T), w h y^T) of
`perdure.queries.Gram`. With |h| = 1 and a bias feature b it is clipped to sqrt((1 + b^2)^2 + w^2 (1
+ b^2)), so use no bias feature. Features with a declared bound are divided by the bound before, and
their sums multiplied by it afterwards. Negative eigenvalues of the noisy matrix are removed, and
half of the noise that they show is added to the ridge; this costs no privacy (see
`perdure.strategies._closed_form.denoised`). Noise grows with the number of features: use some
hundreds with privacy, and thousands without.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from perdure.contract import Forward, Spec, State
from perdure.errors import ConfigError
from perdure.queries import Gram
from perdure.strategies._closed_form import (
    Analytic,
    Float64Gram,
    denoised,
    layout,
    ridge_head,
    unit,
)
from perdure.utils import generator

if TYPE_CHECKING:
    from perdure.contract import Curator

WEIGHT = 0.7
"""Weight w of the class sums: the Gram matrix is inverted, so it tolerates less noise."""


@dataclass(frozen=True, kw_only=True)
class RanPAC(Analytic):
    """Solve a ridge regression on features, without training.

    Guarantee: one release per experience, as in `perdure.strategies._closed_form.Analytic`.

    Args:
        ridge: number that is added to the diagonal of the Gram matrix; its best size depends on the
            length of the features (1 if they are normalised).
        bias: value of an additional feature, the same for all records; 0 for none.
        projection: width of a random projection with ReLU that is applied to the features first; 0
            for none.
        seed: seed of the random projection.
        normalise: divide the features of each record by their L2 norm (after the projection, if
            there is one).
        bound: declared L2 norm that features almost never exceed, if they are not normalised; used
            under privacy only, where longer features are scaled down.
    """

    ridge: float = 1e-3
    bias: float = 0.0
    projection: int = 0
    seed: int = 0
    not_vmappable_because: ClassVar[str | None] = (
        "its head is solved by a factorisation that is checked for success"
    )
    tasks_because: ClassVar[str] = "its head is solved from one class per record"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ridge < math.inf:
            raise ConfigError.of("ranpac.ridge", self.ridge, "a number above 0")
        if not 0 <= self.bias < math.inf:
            raise ConfigError.of("ranpac.bias", self.bias, "a finite number, 0 or more")
        if self.projection < 0:
            raise ConfigError.of("ranpac.projection", self.projection, "whole numbers from 0")

    @classmethod
    def example(cls) -> Self:
        """Return a small instance: a projection to 12 features, and a bias."""
        return cls(ridge=0.01, bias=0.5, projection=12)

    def init(self, spec: Spec) -> State:
        """Create a state with sums over no records, and draw the random projection."""
        d = (self.projection or spec.feature_size) * bool(spec.feature_size)
        state = layout(spec, d + bool(self.bias) * bool(d), matrix=True, counts=False)
        if not self.projection:
            return state
        drawn = torch.randn(
            spec.feature_size, d, generator=generator(self.seed, "random projection")
        )
        return state.declare("projection", drawn.to(state["bias"].device), "local")

    def features(self, forward: Forward, x: Tensor, state: State) -> Tensor:
        """Return (n, d) features for the ridge regression.

        They are projected and normalised, with the bias feature at the end.
        """
        features = forward.features(x).flatten(1)
        features = torch.relu(features @ state["projection"]) if self.projection else features
        features = unit(features) if self.normalise else features
        return (
            torch.cat([features, torch.full_like(features[:, :1], self.bias)], 1)
            if self.bias
            else features
        )

    def length(self, curator: "Curator") -> float:
        """Largest norm of a record's features, bias feature included, that is not clipped."""
        return math.hypot(super().length(curator), self.bias / self.scale(curator))

    def query(self, curator: "Curator", state: State) -> Gram:
        """Build the query for the Gram matrix and class sums."""
        kind = Gram if curator.private else Float64Gram
        return self.asking(curator, state, kind, weight=WEIGHT)

    def derive(self, state: State) -> State:
        """Solve the ridge regression for the head."""
        gram = denoised(state["gram"]) if bool(state["noisy"]) else state["gram"]
        return state.replace({"weight": ridge_head(gram, state["cross"], self.ridge)})
