"""Mean and standard deviation of every column as a private release, used to scale inputs.

    mean_j = S1_j / N,   deviation_j = sqrt(S2_j / N - mean_j^2)

S1 and S2 are noisy sums of u and u^2 over the records, where u in [-1, 1] is the position of a
value in its declared range, and N is the declared number of records.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from perdure.data.records import Spent
from perdure.errors import ConfigError
from perdure.privacy.answers import Answers
from perdure.privacy.clipping.clip import Clip, sum_of_clipped
from perdure.privacy.ledger.ledger import Ledger
from perdure.privacy.noise.draw_log import DrawLog
from perdure.privacy.noise.key import noise_key
from perdure.privacy.private_sum import PrivateSum, ReleaseKey, Schedule
from perdure.privacy.settings import Privacy
from perdure.types import Params
from perdure.utils.chunking import row_slices
from perdure.utils.folder_lock import locked
from perdure.utils.hashing import digest

LEAST_DEVIATION = 0.01
"""Smallest standard deviation of u; noise, or a constant column, could make it 0."""


@dataclass(frozen=True, kw_only=True)
class ReleasedScaling:
    """Mean and standard deviation of every column or channel, from one noisy sum over the records.

    Give it as `standardise=` to a function that makes a data set. The sum is charged to a separate
    ledger before its noise is drawn. The records carry this cost, and a private `Learner` includes
    it in its plan and charges it to its own ledger before it trains. Records that you build
    yourself from the scaled inputs do not carry the cost: give them `spent=data.train.spent`.

    >>> scaling = ReleasedScaling(noise_multiplier=20.0, folder="runs/scaling")
    >>> from_arrays(inputs, targets, value_range=(0, 120), standardise=scaling)

    Guarantee: for add-remove neighbours among the training records, the constants are one Gaussian
    release: a record changes the sum by at most sqrt(2 k) in L2 norm for k columns, because u is
    clamped to [-1, 1]. The test part is public and not part of the sum.

    Args:
        noise_multiplier: standard deviation of the noise in units of that bound. For k columns and
            n records, the error of the constants is about sqrt(2 k) noise_multiplier / n half
            ranges.
        folder: folder for key, ledger and result, so that the same call on the same records gives
            the same constants at no further cost. It is not the folder of a run. None for a
            simulation.
        seed: None for secret noise; a number for reproducible, simulated noise.

    Raises:
        ConfigError: if the noise multiplier is not allowed, or secret noise has no folder.
    """

    noise_multiplier: float
    folder: str | Path | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        Privacy(noise_multiplier=self.noise_multiplier, release_noise=1.0, seed=self.seed)
        if self.folder is None and self.seed is None:
            allowed = "a folder for key and ledger, or None beside seed=..., a simulation"
            raise ConfigError.of("folder", None, allowed)

    def constants(
        self, inputs: Tensor, low: Tensor, high: Tensor, *, partition: str, size: int
    ) -> tuple[Tensor, Tensor, tuple[Spent, ...]]:
        """Release the mean and standard deviation of every column or channel.

        Args:
            inputs: (n, k, ...) inputs of the training records.
            low: declared smallest value, with a shape that broadcasts to one row.
            high: declared largest value.
            partition: name of the records in the ledger.
            size: declared number of records.

        Returns:
            Mean and deviation, each of a shape that broadcasts to one row, and the privacy cost.

        Raises:
            RunError: if another process or object uses the folder.
        """
        with locked(None if self.folder is None else Path(self.folder)):
            return self._constants(inputs, low, high, partition, size)

    def _constants(
        self, inputs: Tensor, low: Tensor, high: Tensor, partition: str, size: int
    ) -> tuple[Tensor, Tensor, tuple[Spent, ...]]:
        """Release the constants; the caller holds the lock of the folder."""
        rows = torch.cat([_row_sums(inputs[piece], low, high) for piece in row_slices(inputs)])
        columns = inputs.shape[1]
        bound = math.sqrt(2 * columns)
        shapes = {"sums": torch.Size([2 * columns])}
        privacy = Privacy(noise_multiplier=self.noise_multiplier, release_noise=1.0, seed=self.seed)
        private_sum = self._private_sum(privacy, partition, size)

        def clipped(clip: Clip) -> Params | None:
            return sum_of_clipped({"sums": rows}, clip) if len(rows) else None

        try:
            released = private_sum.release(
                clipped,
                purpose="scaling",
                occasion=ReleaseKey(
                    partitions=(partition,),
                    numbers=range(1),
                    start=digest({"low": low, "high": high}).hex() + f"{size}",
                    data={"rows": rows},
                ),
                shapes=shapes,
                clip_norm=bound,
            )["sums"]
            spent = tuple(
                Spent(
                    entry=entry.digest,
                    noise_multiplier=entry.noise_multiplier,
                    simulated=entry.simulated,
                )
                for entry in private_sum.ledger.entries
            )
        finally:
            private_sum.close()
        first = released[:columns].cpu() / size
        second = released[columns:].cpu() / size
        middle = first.clamp(-1, 1)
        spread = (second - middle.square()).clamp(min=LEAST_DEVIATION**2).sqrt().clamp(max=1)
        shape = (columns, *[1] * (inputs.dim() - 2))
        half = (high - low) / 2
        mean = (high + low) / 2 + half * middle.view(shape)
        return mean, half * spread.view(shape), spent

    def _private_sum(self, privacy: Privacy, partition: str, size: int) -> PrivateSum:
        folder = None if self.folder is None else Path(self.folder)
        key = noise_key(folder, self.seed, 0)
        ledger = Ledger.open(None if folder is None else folder / "ledger.jsonl", key=key)
        ledger.declare(partition, size, "")
        private = None if folder is None else folder / "private"
        return PrivateSum(
            privacy=privacy,
            schedule=Schedule(noise=(self.noise_multiplier,)),
            ledger=ledger,
            key=key,
            draws=DrawLog(None if private is None else private / "draws.jsonl", key),
            answers=Answers(None if private is None else private / "answers", key),
            independence="by construction",
        )


def _row_sums(inputs: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return rows (n, 2 k): for each of k channels the means over its positions of u and of u^2.

    u is the input, mapped from [low, high] to [-1, 1] and clamped; NaN counts as 0.
    """
    u = ((inputs - low) / (high - low) * 2 - 1).clamp(-1, 1).nan_to_num(0.0)
    flat = u.flatten(2) if u.dim() > 2 else u.unsqueeze(2)
    # float64, so that a record's row does not depend on how a batch is summed
    wide = flat.double()
    return torch.cat([wide.mean(2), wide.square().mean(2)], dim=1).float()
