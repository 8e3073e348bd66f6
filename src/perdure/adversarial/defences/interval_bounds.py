"""Training for interval bounds, with growing radius and share (Gowal et al. 2018)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perdure.adversarial.bounds import Bounds, refuse_bounds
from perdure.adversarial.certificates.interval_bounds import ball, worst_logits
from perdure.adversarial.defences.base import PROGRESS, Defence, TaskLosses, plain
from perdure.contract.context import Context
from perdure.contract.forward import Forward
from perdure.data.records import Batch
from perdure.errors import ConfigError
from perdure.tasks import SingleLabel, Task, refuse_other_tasks


@dataclass(frozen=True, kw_only=True)
class IntervalBounds(Defence):
    """Loss of the row, mixed with the loss of the worst logits that interval bounds allow.

        loss_i = kappa * strategy's loss(x_i) + (1 - kappa) * task's loss(worst logits of the ball)

    In every experience the radius is 0 for `warm_up` of the steps, rises linearly for `ramp` of
    them, and stays at `epsilon`; kappa falls from 1 to `kappa` while the radius rises. Models need
    layers that have a rule (see `perdure.adversarial.certificates.Interval`). No adversary is used.

    Privacy: refused. The bounds use the weights outside of the passes of the layers, so that the
    norm of a record's gradient is not known.

    Args:
        epsilon: radius of the linf ball in training, in units of the inputs; a little more than
            the radius to certify helps.
        bounds: smallest and largest value of an input, each for all features or as a list with one
            number per feature; None for inputs without bounds.
        kappa: weight of the loss without bounds, at the end.
        warm_up: share of the steps before the radius rises.
        ramp: share of the steps in which it rises.
        memory: use the bounds of rows from memory, too; False for new rows only.

    Source: Gowal et al. 2018, "On the effectiveness of interval bound propagation for training
    verifiably robust models", section 4 and appendix A.
    """

    NEEDS_ATTACK: ClassVar[bool] = False
    PRIVATE_REFUSAL: ClassVar[str] = (
        "its bounds use the weights outside of the passes of the layers, so the norm of a record's "
        "gradient is not known; use adversary=PGD(...), alone or with defence=TRADES()"
    )

    epsilon: float
    bounds: Bounds = (0.0, 1.0)
    kappa: float = 0.5
    warm_up: float = 0.05
    ramp: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < math.inf:
            raise ConfigError.of("epsilon", self.epsilon, "a finite number, 0 or more")
        for name in ("kappa", "warm_up", "ramp"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError.of(name, getattr(self, name), "a number from 0 to 1")
        refuse_bounds(self.bounds)

    def losses(
        self, losses: TaskLosses, forward: Forward, batch: Batch, context: Context
    ) -> Tensor:
        """Return (n,) mixed losses of the rows."""
        rows = plain(batch)
        share = self._share(batch.stored[PROGRESS])
        if not self.memory:
            share = torch.where(batch.from_memory, 0.0, share)
        radius = (self.epsilon * share).view(-1, *[1] * (rows.inputs.ndim - 1))
        worst = worst_logits(forward, ball(rows.inputs, radius, self.bounds), rows.labels)
        bounded = context.losses(worst, rows)
        kappa = 1 - (1 - self.kappa) * share
        return kappa * losses(rows) + (1 - kappa) * bounded

    def _share(self, progress: Tensor) -> Tensor:
        """Return the share (n,) of the final radius at this progress."""
        if self.ramp == 0:
            return (progress >= self.warm_up).to(progress.dtype)
        return ((progress - self.warm_up) / self.ramp).clamp(0, 1)

    def refuse_task(self, task: Task) -> None:
        """Refuse a task without one class for each record."""
        refuse_other_tasks(task, (SingleLabel,), "defence", "it bounds the logits of classes")
