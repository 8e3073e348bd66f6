"""Less-forgetting learning: keep the features of new inputs close to those of the old model.

Jung, Ju, Jung and Kim, Less-forgetting learning in deep neural networks, arXiv:1607.00122, 2016,
section 3.

    loss_i = CE(x_i, y_i) + strength / 2 * |h(x_i; theta) - h(x_i; theta*)|^2

h are the features (the input of the head), theta* the parameters after the last experience. The
paper also freezes the head, which is possible for new domains of the same classes. Here the head is
trained further, because new classes need it. So predictions for old classes may change although the
features do not.

State: `teacher`, parameters and running statistics at the end of the last experience (identical on
all clients, kept by each).
Memory cost: once the parameters, and one more forward pass per step. Privacy cost: only the
gradient: the teacher is a released model, and the loss is per record.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from torch import Tensor

from perdure.contract import (
    Context,
    Forward,
    Spec,
    State,
    Strategy,
    task_losses,
)
from perdure.data import Batch
from perdure.errors import ConfigError
from perdure.tasks import Task
from perdure.types import Params

if TYPE_CHECKING:
    from perdure.contract import Curator


@dataclass(frozen=True, kw_only=True)
class FeatureDistillation(Strategy):
    """Penalise the distance between a record's features now and in the previous model.

    Args:
        strength: weight of half the squared distance (lambda_e over lambda_c).
    """

    strength: float
    tasks: ClassVar[tuple[type[Task], ...]] = (Task,)

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf:
            raise ConfigError.of(
                "feature_distillation.strength", self.strength, "a finite number, 0 or more"
            )

    @classmethod
    def example(cls) -> Self:
        """Return a small instance: a distillation of strength 0.5."""
        return cls(strength=0.5)

    def init(self, spec: Spec) -> State:
        """Create the state with the teacher, which is used from the second experience on.

        Raises:
            StrategyError: if the model has no features.
        """
        spec.require_features()
        return State().declare_group("teacher", spec.teacher, "local")

    def losses(self, forward: Forward, batch: Batch, context: Context, state: State) -> Tensor:
        """(n,) cross entropy plus half the squared distance of the features from the teacher's."""
        if context.experience == 0:
            return task_losses(forward, batch, context)
        logits, features = forward.with_features(batch.inputs)
        before = forward.at(state.group("teacher")).features(batch.inputs)
        distance = (features - before).square().flatten(1).sum(1)
        new = context.losses(logits, batch)
        return new + 0.5 * self.strength * distance

    def after_experience(self, curator: "Curator", params: Params, state: State) -> State:
        """Store the current model as the next teacher."""
        return state.replace_group("teacher", params | curator.statistics)
