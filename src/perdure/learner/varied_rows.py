"""Change the rows of a step before their gradient: each record's worst case, and its views."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor

from perdure.adversarial.base import Attack
from perdure.contract.curator import Losses
from perdure.contract.forward import Forward
from perdure.data.augmentation import Views
from perdure.data.records import Batch, filled_batch
from perdure.utils.seeding import Seed, generator_from


def varied_rows(
    batch: Batch,
    losses: Losses,
    *,
    fixed: Forward,
    adversary: Attack | None,
    views: Views | None,
    seed_of: Callable[[str], Seed],
    watched: Callable[[], AbstractContextManager[None]],
    private: bool,
) -> Batch:
    """Return the rows under attack, with their views.

    Neither is ever shown an empty batch, nor, under privacy, one of fewer rows than `FEWEST_ROWS`:
    their code may fail without rows, and an error would tell that no record was drawn.

    Args:
        batch: rows of the step.
        losses: that an adversary raises.
        fixed: the model without hooks, its parameters detached.
        adversary: attack on every row; None for none.
        views: random versions of every row; None for none.
        seed_of: from the purpose of draws to their seed.
        watched: opens a private pass.
        private: fill small batches up.
    """
    if not len(batch):
        return batch
    rows = filled_batch(batch) if private else batch
    if adversary is not None:
        rows = _attacked(rows, losses, fixed, adversary, seed_of, watched)
    if views is not None:
        rows = views.attach(rows, seed_of("views"))
    return rows if len(rows) == len(batch) else rows.take(slice(0, len(batch)))


def _attacked(
    rows: Batch,
    losses: Losses,
    fixed: Forward,
    adversary: Attack,
    seed_of: Callable[[str], Seed],
    watched: Callable[[], AbstractContextManager[None]],
) -> Batch:
    """Each row's own worst case at the present parameters."""

    def of(inputs: Tensor) -> Tensor:
        return losses(fixed, Batch.from_tensors(rows.tensors() | {"inputs": inputs}))

    rng = generator_from(seed_of("adversary"))
    with watched():
        inputs = adversary.perturb(of, rows.inputs, generator=rng)
    return Batch.from_tensors(rows.tensors() | {"inputs": inputs})
