"""TRADES: the loss of a row, and the distance of its answers with and without the attack."""

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from perdure.adversarial.base import Attack, InputLosses
from perdure.adversarial.defences.base import MOVED, Defence, TaskLosses, plain
from perdure.adversarial.fgsm import FGSM
from perdure.contract.context import Context
from perdure.contract.forward import Forward
from perdure.data.records import Batch
from perdure.errors import ConfigError
from perdure.tasks import SingleLabel, Task, refuse_other_tasks


@dataclass(frozen=True, kw_only=True)
class TRADES(Defence):
    """Loss of the row, plus `beta` times the divergence of the answers for row and perturbed row.

        loss_i = strategy's loss(x_i) + beta * KL(p(x_i) || p(x'_i)),  x'_i raises the KL term

    The divergence has no gradient at the row itself, so the attack needs a random start.

    Privacy: both passes belong to one record, whose gradient is clipped as a whole, so nothing is
    spent beyond the steps.

    Args:
        beta: weight of the divergence; larger for more robustness and less accuracy.
        memory: perturb rows from memory, too; False for new rows only.

    Source: Zhang, Yu, Jiao, Xing, El Ghaoui, Jordan 2019, "Theoretically principled trade-off
    between robustness and accuracy", equation 5.
    """

    beta: float = 6.0

    def __post_init__(self) -> None:
        if not 0 < self.beta <= 1e6:
            raise ConfigError.of("beta", self.beta, "a number above 0, at most 1e6")

    def losses(
        self, losses: TaskLosses, forward: Forward, batch: Batch, context: Context
    ) -> Tensor:
        """Return (n,) losses of the rows, with their divergences."""
        rows = plain(batch)
        answers = context.mask(forward(rows.inputs), rows)
        moved = context.mask(forward(batch.stored[MOVED]), rows)
        return losses(rows) + self.beta * divergence(answers, moved)

    def objective(
        self,
        losses: TaskLosses,
        forward: Forward,
        batch: Batch,
        context: Context,
    ) -> InputLosses:
        """Return the divergence from the answers for the rows as they are."""
        answers = context.mask(forward(batch.inputs), batch).detach()

        def of_inputs(inputs: Tensor) -> Tensor:
            rows = replace(batch, inputs=inputs)
            return divergence(answers, context.mask(forward(inputs), rows))

        return of_inputs

    def refuse_task(self, task: Task) -> None:
        """Refuse a task without one class for each record."""
        refuse_other_tasks(task, (SingleLabel,), "defence", "it compares probabilities of classes")

    def refuse_attack(self, attack: Attack) -> None:
        """Refuse an attack that starts at the record, where the divergence has no gradient."""
        if isinstance(attack, FGSM) or not getattr(attack, "random_start", True):
            raise ConfigError.of(
                "adversary", attack, "an attack with a random start, such as PGD, with TRADES"
            )


def divergence(answers: Tensor, moved: Tensor) -> Tensor:
    """Return (n,) Kullback-Leibler divergences KL(softmax(answers) || softmax(moved)).

    Args:
        answers: (n, C) logits.
        moved: (n, C) logits after the attack.
    """
    found = F.kl_div(
        F.log_softmax(moved, 1), F.log_softmax(answers, 1), reduction="none", log_target=True
    )
    return found.sum(1)
