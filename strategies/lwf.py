"""Learning without forgetting: keep answering new inputs as the previous model did.

Li and Hoiem, Learning without Forgetting, TPAMI 2018, equations 1 to 4; weights as in van de Ven et al., Three types
of incremental learning, Nature Machine Intelligence 2022 (the share of the new task falls as 1/t).

    loss_i = w * CE(x_i, y_i) + (1 - w) * T^2 * KL-part( softmax(teacher(x_i) / T) || softmax(model(x_i) / T) )

with the cross entropy -sum_c q_c log p_c in place of KL (same gradient), over the classes of earlier experiences.

State: `teacher`, the parameters at the end of the last experience (identical on all clients, kept by each).
Memory cost: once the parameters, and one more forward pass a step.
Privacy cost: none beyond the gradient: the teacher is a released model, and the loss is per record.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.records import Batch, Params
from perdure.strategy import MASKED, Context, Forward, Spec, State, Strategy, cross_entropy_of

if TYPE_CHECKING:
    from perdure.curator import Curator


@dataclass(frozen=True, kw_only=True)
class LwF(Strategy):
    """Distil the previous model on the records of the new experience.

    Args:
        temperature: softens both distributions (T).
        new_share: weight w of the new task, in (0, 1]; None for 1 / (number of experiences so far).
        scale_by_temperature: multiply the distillation term by T^2, so that its gradient does not fall with T.
    """

    temperature: float = 2.0
    new_share: float | None = None
    scale_by_temperature: bool = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError.of("lwf.temperature", self.temperature, "a number above 0")
        if self.new_share is not None and not 0 < self.new_share <= 1:
            raise ConfigError.of("lwf.new_share", self.new_share, "above 0 and at most 1, or none for 1/experiences")

    def init(self, spec: Spec) -> State:
        """Lay out the teacher; it is used from the second experience on."""
        return State().declare_group("teacher", spec.params, "local")

    def losses(self, forward: Forward, batch: Batch, context: Context, state: State) -> Tensor:
        """Cross entropy and distillation, per record."""
        logits = forward(batch.inputs)
        new = cross_entropy_of(context.mask(logits, batch), batch.labels)
        if context.experience == 0:
            return new
        share = 1 / (context.experience + 1) if self.new_share is None else self.new_share
        with torch.no_grad():
            teacher = forward.at(state.group("teacher"))(batch.inputs)
        old = torch.stack([self._distil(logits, teacher, *pair) for pair in self._classes(context)]).mean(0)
        return share * new + (1 - share) * old

    def after_experience(self, curator: "Curator", params: Params, state: State) -> State:
        """Take the present model as the next teacher."""
        return state.replace_group("teacher", params)

    def _classes(self, context: Context) -> list[tuple[Tensor, Tensor]]:
        """Pairs of class masks: what the teacher answers over, what the student answers over."""
        before = context.task_classes[: context.experience]
        if context.scenario == "task":
            return [(classes, classes) for classes in before]
        if context.scenario == "domain":
            everything = torch.ones_like(context.seen)
            return [(everything, everything)]
        return [(before.any(0), context.seen)]

    def _distil(self, logits: Tensor, teacher: Tensor, known: Tensor, allowed: Tensor) -> Tensor:
        targets = torch.softmax(torch.where(known, teacher, MASKED) / self.temperature, dim=1)
        log_p = torch.log_softmax(torch.where(allowed, logits, MASKED) / self.temperature, dim=1)
        scale = self.temperature**2 if self.scale_by_temperature else 1.0
        return -scale * (targets * log_p).sum(1)
