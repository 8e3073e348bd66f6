"""Curator whose gradient sums are divided among several processes."""

import torch
from torch import Tensor

from perdure.contract.curator import Losses
from perdure.curator.held_records import HeldRecords
from perdure.curator.local_curator import LocalCurator, Watched, zeros_like
from perdure.data.records import Batch
from perdure.privacy.clipping.clip import WITHIN, Clip
from perdure.types import Params
from perdure.utils.processes import Processes


class SharedCurator(LocalCurator):
    """Curator of one of several processes, all of which hold the same records.

    Every process draws the same batch and computes the sum over its part of the rows; the sums are
    added over the processes. A gradient of `torch.nn.parallel.DistributedDataParallel` is a mean
    over processes instead, which is another number for parts of different sizes, and is computed
    too late for clipping.

    Releases over all records of an experience are not divided.

    Guarantee: as `LocalCurator`: a row is clipped by the process that has it, before any addition.

    Args:
        held: the records, and the private sum that adds noise.
        processes: group of the processes.
        micro_batch_size: number of rows in one pass through the model; None for a whole part.
        alone: run the model on each record alone in private gradients.
        watched: function that returns a context manager for a private pass.
    """

    def __init__(
        self,
        held: HeldRecords,
        *,
        processes: Processes,
        micro_batch_size: int | None,
        alone: bool,
        watched: Watched,
    ) -> None:
        super().__init__(held, micro_batch_size=micro_batch_size, alone=alone, watched=watched)
        self._processes = processes

    def _mean(self, losses: Losses, params: Params, rows: Batch) -> tuple[Params, Tensor]:
        own = rows.take(self._processes.share(len(rows)))
        count = int(own.valid.sum())
        if count:
            mean, found = super()._mean(losses, params, own)
            loss = found.mean()  # the processes have different numbers of rows
        else:
            mean, loss = zeros_like(params), next(iter(params.values())).new_zeros(())
        weight = count / int(rows.valid.sum())
        kind = torch.promote_types(loss.dtype, next(iter(mean.values())).dtype)
        values = [value.to(kind) * weight for value in (*mean.values(), loss)]
        *sums, total = self._processes.add(values)
        named = zip(mean.items(), sums, strict=True)
        return {name: value.to(part.dtype) for (name, part), value in named}, total

    def _clipped(self, losses: Losses, params: Params, batch: Batch, clip: Clip) -> Params | None:
        """Sum of the clipped gradients of all rows, in float64, from the parts of all processes."""
        own = batch.take(self._processes.share(len(batch)))
        part = super()._clipped(losses, params, own, clip)
        if part is None:
            part = zeros_like(params)
            part |= {WITHIN: torch.zeros(())} if clip.counted else {}
        # the order of addition changes a float64 sum by far less than the declared slack
        device = next(iter(params.values())).device
        sums = self._processes.add([value.to(device).double() for value in part.values()])
        return dict(zip(part, sums, strict=True))
