"""Madry's adversarial training: the loss of the perturbed rows alone."""

from dataclasses import dataclass

from torch import Tensor

from perdure.adversarial.defences.base import MOVED, Defence, TaskLosses, plain
from perdure.contract.context import Context
from perdure.contract.forward import Forward
from perdure.data.records import Batch


@dataclass(frozen=True, kw_only=True)
class Madry(Defence):
    """Loss of the perturbed row in place of the row, as with an `adversary` and no defence.

        loss_i = strategy's loss(x'_i)

    With a strategy that replays and `memory=True`, stored rows are perturbed as well (adversarial
    replay).

    Args:
        memory: perturb rows from memory, too; False for new rows only.

    Source: Madry et al. 2018, "Towards deep learning models resistant to adversarial attacks",
    section 2.1.
    """

    def losses(
        self,
        losses: TaskLosses,
        forward: Forward,
        batch: Batch,
        context: Context,
    ) -> Tensor:
        """Return (n,) losses of the perturbed rows."""
        rows = plain(batch)
        return losses(Batch.from_tensors(rows.tensors() | {"inputs": batch.stored[MOVED]}))
