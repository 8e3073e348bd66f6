"""Attribution distillation: keep the reasons of the old model, besides its answers.

Dhar, Singh, Peng, Wu and Chellappa, Learning without Memorizing, CVPR 2019, section 3, equations 1
to 4.

    loss_i = CE(x_i, y_i) + distillation * KD_i + strength * | u(x_i; theta) - u(x_i; theta*) |_1
    u(x)   = a(x) / |a(x)|_2,  a_g(x) = z_c(x) - z_c(x with the cells of group g set to 0)
    c      = the class with the largest logit of the old model among the classes seen before

theta* are the parameters after the last experience, KD is the distillation of `LwF`, and a is the
attribution map of class c over G groups of input cells. The paper takes Grad-CAM as map, which
needs convolutions and a second derivative. Here it is the occlusion map (Zeiler and Fergus 2014,
section 2): it works for every model and for integer inputs, needs forward passes only, and so its
gradient can be clipped record by record. Images are cut into a grid of cells; the numbers of other
inputs into runs of neighbours.

State: `teacher`, parameters and running statistics at the end of the last experience (identical on
all clients, kept by each).
Memory cost: once the parameters; a step has G + 1 forward passes of the model and of the teacher.
Privacy cost: only the gradient: the teacher is a released model, 0 is a public value, and the loss
is per record.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from perdure.contract import Context, Forward, Spec, State, Strategy
from perdure.data import Batch
from perdure.errors import ConfigError
from perdure.explain import column_groups, grid_groups
from perdure.strategies.lwf import answered
from perdure.tasks import MASKED
from perdure.types import Params

if TYPE_CHECKING:
    from perdure.contract import Curator

SMALLEST = 1e-4
"""Added to the squared norm of a map, so that the direction of a map near 0 has no huge gradient.
"""


@dataclass(frozen=True, kw_only=True)
class AttributionDistillation(Strategy):
    """Penalise changes of the attribution maps of new inputs, and of the old model's answers.

    Args:
        strength: weight of the distance of the maps (gamma).
        distillation: weight of the distillation term of the logits (beta).
        temperature: temperature of the distillation term (T).
        cells: cells along each side of an image; inputs of other shapes have cells^2 groups, or
            one for each number if there are fewer.
    """

    strength: float = 1.0
    distillation: float = 1.0
    temperature: float = 2.0
    cells: int = 3
    tasks_because: ClassVar[str] = "its maps are of the logit of one class"

    def __post_init__(self) -> None:
        for name in ("strength", "distillation"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError.of(
                    f"attribution_distillation.{name}",
                    getattr(self, name),
                    "a finite number, 0 or more",
                )
        if not 0 < self.temperature < math.inf:
            raise ConfigError.of(
                "attribution_distillation.temperature", self.temperature, "a finite number above 0"
            )
        if self.cells < 1:
            raise ConfigError.of("attribution_distillation.cells", self.cells, "1 or more")

    @classmethod
    def example(cls) -> Self:
        """Return a small instance: four groups, both terms of weight 0.5."""
        return cls(strength=0.5, distillation=0.5, cells=2)

    def init(self, spec: Spec) -> State:
        """Create the state with the teacher, which is used from the second experience on."""
        return State().declare_group("teacher", spec.teacher, "local")

    def losses(self, forward: Forward, batch: Batch, context: Context, state: State) -> Tensor:
        """Return (n,) cross entropy, distillation of the logits, and distance of the maps."""
        logits = forward(batch.inputs)
        new = context.losses(logits, batch)
        if context.experience == 0:
            return new
        before = forward.at(state.group("teacher"))
        answers = before(batch.inputs)
        old = [
            context.task.distillation(
                logits,
                answers,
                batch.labels,
                known=known,
                allowed=allowed,
                temperature=self.temperature,
            )
            for known, allowed in answered(context)
        ]
        known = context.task_classes[: context.experience].any(0)
        explained = torch.where(known, answers, MASKED).argmax(1, keepdim=True)
        groups = self.groups(batch.inputs.shape[1:]).to(batch.inputs.device)
        moved = _map(forward, batch.inputs, logits, explained, groups) - _map(
            before, batch.inputs, answers, explained, groups
        )
        kept = torch.stack(old).sum(0)
        return new + self.distillation * kept + self.strength * moved.abs().sum(1)

    def after_experience(self, curator: "Curator", params: Params, state: State) -> State:
        """Store the current model as the next teacher."""
        return state.replace_group("teacher", params | curator.statistics)

    def groups(self, shape: torch.Size) -> Tensor:
        """Return the groups of input cells, integers in the shape of one input, from 0 on."""
        if len(shape) >= 2:
            return grid_groups(shape, min(self.cells, *shape[-2:]))
        count = shape.numel()
        parts = min(count, self.cells**2)
        sizes = [(part + 1) * count // parts - part * count // parts for part in range(parts)]
        return column_groups(sizes).view(shape)


def _map(
    forward: Forward, inputs: Tensor, logits: Tensor, explained: Tensor, groups: Tensor
) -> Tensor:
    """Return the directions (n, G) of the occlusion maps of one class for each row.

    Args:
        forward: the model.
        inputs: (n, ...) rows.
        logits: (n, C) its logits for them.
        explained: (n, 1) class of each map.
        groups: (...) group of each input cell.
    """
    full = logits.gather(1, explained)
    without = [
        forward(torch.where(groups == group, 0, inputs)).gather(1, explained)
        for group in range(int(groups.max()) + 1)
    ]
    maps = full - torch.cat(without, dim=1)
    return maps / (maps.square().sum(1, keepdim=True) + SMALLEST).sqrt()
