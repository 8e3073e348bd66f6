"""Learning without forgetting: keep the outputs on new inputs close to the previous model's.

Li and Hoiem, Learning without Forgetting, TPAMI 2018, section 3 and equations 1 to 4; the form for
domain- and class-incremental streams is from van de Ven et al., Three types of incremental
learning, Nature Machine Intelligence 2022.

    weighting = "sum":
        loss_i = CE(x_i, y_i) + strength * k * KD_i
    weighting = "experiences":
        loss_i = 1/t CE(x_i, y_i) + (1 - 1/t) * strength * T^2 * mean of KD_i
    KD_i   = sum_c -q_c log p_c,  q = softmax(teacher(x_i) / T),  p = softmax(model(x_i) / T)

Task-incremental: KD is summed, or averaged, over the k earlier tasks' heads. Class-incremental: q
is over the earlier classes, p over all seen so far, k = 1. Domain-incremental: over all classes,
with k the number of earlier experiences. The second form, with t the number of the experience from
1, is from van de Ven and Tolias, Three scenarios for continual learning, 2019, and from the LwF in
Hsu, Liu, Ramasamy and Kira, Re-evaluating Continual Learning Scenarios, 2018; `strength` is 1
there.

State: `teacher`, parameters and running statistics at the end of the last experience (identical on
all clients, kept by each).
Memory cost: once the parameters, and one more forward pass per step. Privacy cost: only the
gradient: the teacher is a released model, and the loss is per record.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from torch import Tensor

from perdure.contract import Context, Forward, Spec, State, Strategy
from perdure.data import Batch
from perdure.errors import ConfigError
from perdure.tasks import Task
from perdure.types import Params

if TYPE_CHECKING:
    from perdure.contract import Curator


@dataclass(frozen=True, kw_only=True)
class LwF(Strategy):
    """Distil the previous model on the records of the new experience.

    Args:
        temperature: temperature of both distributions (T).
        strength: weight of the distillation term (lambda_o).
        weighting: `sum` adds the distillation term to the cross entropy; `experiences` gives the
            new experience the weight 1/t, and the distillation term 1 - 1/t.
    """

    temperature: float = 2.0
    strength: float = 1.0
    weighting: Literal["sum", "experiences"] = "sum"
    tasks: ClassVar[tuple[type[Task], ...]] = (Task,)

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ConfigError.of("lwf.temperature", self.temperature, "a finite number above 0")
        if not 0 <= self.strength < math.inf:
            raise ConfigError.of("lwf.strength", self.strength, "a finite number, 0 or more")
        if self.weighting not in ("sum", "experiences"):
            raise ConfigError.of("lwf.weighting", self.weighting, ("sum", "experiences"))

    @classmethod
    def example(cls) -> Self:
        """Return a small instance: a distillation of strength 0.5."""
        return cls(strength=0.5)

    def init(self, spec: Spec) -> State:
        """Create the state with the teacher, which is used from the second experience on."""
        return State().declare_group("teacher", spec.teacher, "local")

    def losses(self, forward: Forward, batch: Batch, context: Context, state: State) -> Tensor:
        """Return (n,) cross entropy plus distillation."""
        logits = forward(batch.inputs)
        new = context.losses(logits, batch)
        if context.experience == 0:
            return new
        teacher = forward.at(state.group("teacher"))(batch.inputs)
        old = torch.stack(
            [
                context.task.distillation(
                    logits,
                    teacher,
                    batch.labels,
                    known=known,
                    allowed=allowed,
                    temperature=self.temperature,
                )
                for known, allowed in answered(context)
            ]
        )
        if self.weighting == "experiences":
            share = 1 / (context.experience + 1)
            return share * new + (1 - share) * self.strength * self.temperature**2 * old.mean(0)
        times = context.experience if context.scenario == "domain" else 1
        return new + self.strength * times * old.sum(0)

    def after_experience(self, curator: "Curator", params: Params, state: State) -> State:
        """Store the current model as the next teacher."""
        return state.replace_group("teacher", params | curator.statistics)


def answered(context: Context) -> list[tuple[Tensor, Tensor]]:
    """Return the classes to distil, as pairs of masks (C,): for the teacher, and for the student.

    In task-incremental streams there is one pair for each earlier task.
    """
    before = context.task_classes[: context.experience]
    if context.scenario == "task":
        return [(classes, classes) for classes in before]
    if context.scenario == "domain":
        everything = torch.ones_like(context.seen)
        return [(everything, everything)]
    return [(before.any(0), context.seen)]
