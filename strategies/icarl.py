"""iCaRL: rehearse herded exemplars, distil old outputs, classify by the nearest exemplar mean.

Rebuffi, Kolesnikov, Sperl and Lampert, iCaRL: Incremental Classifier and Representation Learning,
CVPR 2017, algorithms 1 to 4; temperature as in van de Ven, Tuytelaars and Tolias, Three types of
incremental learning, Nature Machine Intelligence 2022.

    loss_i = sum over classes c seen of BCE(f_c(x_i), t_ic)
    t_ic = sigmoid(teacher_c(x_i) / T) for classes of earlier experiences,
           [y_i = c] for classes of this experience, also if they come again
    predict the c whose mean of |.|-normalised exemplar features is nearest
            to the normalised features of x

New records and exemplars are one pool. Exemplars are chosen so that their mean is close to the
class mean (herding).

State: `teacher`, the model at the end of the last experience; `sums` of the exemplars' normalised
features by class, and their directions, the normalised `means`. Over clients the sums are averaged
by declared sizes. Memory cost: the stored records, once the parameters, and a vector of features
for every class. Privacy cost: records that may be stored are used again in later experiences, and
one sum over memory is released after every experience. Under differential privacy exemplars are
chosen at random, independently of each other, instead of by herding, and the means are noisy.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.contract import (
    Context,
    Forward,
    MemoryPlan,
    Plan,
    PrivacyCost,
    Spec,
    State,
    Strategy,
    records_in,
    refuse_size,
)
from perdure.data import Batch
from perdure.errors import ConfigError, StrategyError
from perdure.tasks import MASKED
from perdure.types import Params

if TYPE_CHECKING:
    from perdure.contract import Curator
    from perdure.data import Experience


@dataclass(frozen=True, kw_only=True)
class ICaRL(Strategy):
    """Predict the class with the nearest mean of exemplars.

    The features are trained by binary cross entropy and distillation.

    Args:
        memory_size: total number of exemplars, or bytes such as "2 MB".
        per_class: number of exemplars for each class of each experience, instead of an equal share
            of `memory_size`.
        temperature: temperature of the teacher's outputs (T); 1 in the original, 2 in van de Ven et
            al.
    """

    memory_size: int | str
    per_class: int | None = None
    temperature: float = 2.0
    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost(memory_releases=1, reuses_past_records=True)
    tasks_because: ClassVar[str] = "it predicts the class with the nearest mean"
    own_loss_because: ClassVar[str] = "it distils by a binary cross entropy of its own"

    def __post_init__(self) -> None:
        refuse_size(self.memory_size)
        if not 0 < self.temperature < math.inf:
            raise ConfigError.of("icarl.temperature", self.temperature, "a finite number above 0")

    @classmethod
    def example(cls) -> Self:
        """Return a small instance: a memory of 16 records."""
        return cls(memory_size=16)

    def init(self, spec: Spec) -> State:
        """Create the state with teacher and class means.

        Raises:
            StrategyError: if all experiences have the same classes, so that there is nothing to
                distil, or if the model has no features.
        """
        if spec.scenario == "domain":
            raise StrategyError(
                "ICaRL needs new classes in every experience; use Replay in "
                "domain-incremental streams"
            )
        spec.require_features()
        device = next(iter(spec.params.values())).device
        sums = torch.zeros(spec.num_classes, spec.feature_size, device=device)
        state = (
            State().declare_group("teacher", spec.teacher, "local").declare("means", sums, "local")
        )
        return state.declare("sums", sums, "mean")

    def plan(self, experience: "Experience") -> Plan:
        """Return a plan with a memory of exemplars that forms one pool with the new records."""
        capacity = records_in(self.memory_size, experience)
        memory = MemoryPlan(
            capacity=capacity, selection="herding", per_class=self.per_class, use="pooled"
        )
        return Plan(memory=memory)

    def losses(self, forward: Forward, batch: Batch, context: Context, state: State) -> Tensor:
        """Binary cross entropy over the classes seen, towards labels and the teacher's outputs."""
        logits = forward(batch.inputs)
        targets = one_hot(batch.labels, len(context.seen))
        if context.experience > 0:
            teacher = forward.at(state.group("teacher"))(batch.inputs)
            targets = torch.where(
                context.earlier, torch.sigmoid(teacher / self.temperature), targets
            )
        each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return (each * context.seen).sum(1)

    def after_experience(self, curator: "Curator", params: Params, state: State) -> State:
        """Store the current model as the next teacher, and release the class means of exemplars."""

        def query(forward: Forward, batch: Batch) -> Params:
            classes = one_hot(batch.labels, len(state["sums"]))
            features = F.normalize(forward.features(batch.inputs), dim=1)
            return {"sums": classes[:, :, None] * features[:, None, :]}

        found = curator.release(query, clip_norm=1.0, purpose="class means", over="memory")
        return state.replace_group("teacher", params | curator.statistics).replace(found)

    def derive(self, state: State) -> State:
        """Normalise the class means in the state."""
        return state.replace({"means": F.normalize(state["sums"], dim=1)})

    def predict(self, forward: Forward, x: Tensor, context: Context, state: State) -> Tensor:
        """Compute (n, C): minus squared distances of normalised features from class means."""
        features = F.normalize(forward.features(x), dim=1)
        near = -(features[:, None, :] - state["means"]).square().sum(2)
        return torch.where(context.allowed, near, MASKED)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """(n, classes) float32 one-hot rows, computed without branches, so that vmap can run it."""
    return (labels[:, None] == torch.arange(classes, device=labels.device)).float()
