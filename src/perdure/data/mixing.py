"""Training on mixed pairs of records: mixup and CutMix.

A row of a step is mixed with another row of the same experience and role:

    loss = share * loss(mixed, label) + (1 - share) * loss(mixed, label of the other row)

which is the cross entropy with mixed labels, as in `torchvision.transforms.v2.MixUp`. Both losses
are those of the strategy, so two passes are made over every row.

Guarantee: none, and refused under privacy: a record enters two rows, so clipping each row would not
bound the influence of a record.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from perdure.data.augmentation import NAME as VIEW
from perdure.data.experience import Stream
from perdure.data.records import Batch
from perdure.errors import ConfigError, PrivacyError
from perdure.tasks import SingleLabel
from perdure.utils.checked_fields import CheckedFields

NAME = "mixed."
SHARE = f"{NAME}share"


@dataclass(frozen=True, kw_only=True)
class Mixing(CheckedFields):
    """Base class of the ways to mix pairs of records.

    Args:
        alpha: parameter of the Beta(alpha, alpha) distribution of the share of a record.
    """

    alpha: float

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1e6:
            raise ConfigError.of("mixing.alpha", self.alpha, "a number above 0, at most 1e6")

    @abstractmethod
    def mixed(
        self, inputs: Tensor, others: Tensor, share: float, rng: np.random.Generator
    ) -> tuple[Tensor, float]:
        """Return mixed inputs (n, ...) and the share of `inputs` in them.

        Args:
            inputs: (n, ...) inputs.
            others: (n, ...) inputs to mix in.
            share: drawn share of `inputs`.
            rng: generator of further random numbers.
        """

    def refuse_misfits(self, stream: Stream, *, private: bool) -> None:
        """Refuse a private run, and records that cannot be mixed.

        Args:
            stream: stream of the run.
            private: True if the run has privacy.

        Raises:
            PrivacyError: under privacy.
            ConfigError: if the task is not single-label, or inputs are no images or no floats.
        """
        name = type(self).__name__
        if private:
            raise self.refusal()
        if not isinstance(stream.task, SingleLabel):
            given = f"{name} with the task {stream.task.name}"
            raise ConfigError.of("mixing", given, "None, or records with one class each")
        dtype = stream[0].train.inputs.dtype
        if not dtype.is_floating_point:
            raise ConfigError.of("mixing", f"{name} of inputs in {dtype}", "None, or float inputs")

    def refusal(self) -> PrivacyError:
        """Make the error of a private run."""
        return PrivacyError(
            f"{type(self).__name__} puts each record into two rows, so clipping a row does not "
            "bound the influence of a record; allowed: mixing=None under privacy; use "
            "views=Views(...), which vary a record alone"
        )

    def attach(self, batch: Batch, seed: int) -> Batch:
        """Return the batch with mixed inputs, and with the other row of each pair, for `losses`.

        Args:
            batch: rows of a step, with views or without.
            seed: seed of the pairs and shares.
        """
        rng = np.random.default_rng(seed)
        other = partners(batch, rng).to(batch.inputs.device)
        share = float(rng.beta(self.alpha, self.alpha))
        place = int(rng.integers(2**32))
        rows = batch.tensors()
        paired = {f"stored.{NAME}{name}": value[other] for name, value in rows.items()}
        for name in rows:
            if name == "inputs" or name.startswith(f"stored.{VIEW}"):
                # the same numbers for each view, so that one share holds for the row
                again = np.random.default_rng(place)
                rows[name], own = self.mixed(rows[name], rows[name][other], share, again)
                del paired[f"stored.{NAME}{name}"]
        shares = torch.full((len(batch),), own, device=batch.inputs.device)
        return Batch.from_tensors(rows | paired | {f"stored.{SHARE}": shares})

    def losses(self, losses: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        """(n,) weighted loss of each mixed row; the plain loss if the batch is not mixed."""
        if SHARE not in batch.stored:
            return losses(batch)
        start = f"stored.{NAME}"
        rows = batch.tensors()
        own = {name: value for name, value in rows.items() if not name.startswith(start)}
        share = batch.stored[SHARE]
        paired = {
            name.removeprefix(start): value
            for name, value in rows.items()
            if name.startswith(start) and name != f"stored.{SHARE}"
        }
        first = losses(Batch.from_tensors(own))
        second = losses(Batch.from_tensors(own | paired))
        return share * first + (1 - share) * second


@dataclass(frozen=True, kw_only=True)
class Mixup(Mixing):
    """Weighted mean of two records and of their losses.

    Source: Zhang, Cisse, Dauphin and Lopez-Paz, mixup: Beyond Empirical Risk Minimization, ICLR
    2018.
    """

    alpha: float = 0.2

    def mixed(
        self, inputs: Tensor, others: Tensor, share: float, rng: np.random.Generator
    ) -> tuple[Tensor, float]:
        """Return share * inputs + (1 - share) * others, and the share."""
        return share * inputs + (1 - share) * others, share


@dataclass(frozen=True, kw_only=True)
class CutMix(Mixing):
    """Image with a box of another image, whose area is the share of the other loss.

    Source: Yun, Han, Oh, Chun, Choe and Yoo, CutMix: Regularization Strategy to Train Strong
    Classifiers with Localizable Features, ICCV 2019.
    """

    alpha: float = 1.0

    def refuse_misfits(self, stream: Stream, *, private: bool) -> None:
        """Refuse also inputs that are no images (channels, height, width)."""
        super().refuse_misfits(stream, private=private)
        if len(stream.input_shape) != 3:
            given = f"CutMix of inputs {stream.input_shape}"
            raise ConfigError.of("mixing", given, "images (channels, height, width), or Mixup()")

    def mixed(
        self, inputs: Tensor, others: Tensor, share: float, rng: np.random.Generator
    ) -> tuple[Tensor, float]:
        """Return images (n, c, h, w) with one box of the others, and the share that is left."""
        height, width = inputs.shape[-2:]
        row, column = int(rng.integers(height)), int(rng.integers(width))
        half = 0.5 * math.sqrt(1 - share)
        top, bottom = _ends(row, half, height)
        left, right = _ends(column, half, width)
        changed = inputs.clone()
        changed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
        return changed, 1 - (bottom - top) * (right - left) / (height * width)


def _ends(middle: int, half: float, length: int) -> tuple[int, int]:
    reach = int(half * length)
    return max(middle - reach, 0), min(middle + reach, length)


def partners(batch: Batch, rng: np.random.Generator) -> Tensor:
    """(n,) row with which each row is mixed, of the same experience and role; it may be itself.

    Args:
        batch: rows of a step.
        rng: generator of the permutations.
    """
    kind = (batch.tasks * 4 + batch.from_memory * 2 + batch.valid.long()).cpu().numpy()
    other = np.arange(len(kind))
    for value in np.unique(kind):
        rows = np.flatnonzero(kind == value)
        other[rows] = rng.permutation(rows)
    return torch.from_numpy(other)
