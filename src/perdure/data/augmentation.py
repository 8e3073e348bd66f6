"""Augmentation with several random views of each record.

The loss is averaged over the views before the gradient is clipped.

De, Berrada, Hayes, Smith and Balle, Unlocking High-Accuracy Differentially Private Image
Classification through Scale, 2022, section 3.2. A record has one gradient, which is the gradient of
its mean loss over K views, so views have no privacy cost.

>>> views = Views(count=8, change=shift_and_flip(pixels=2))
>>> views = Views(count=4, change=torchvision.transforms.v2.RandomAffine(degrees=20))
>>> learner = Learner(..., views=views, privacy=Privacy(epsilon=3))
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.data.record_transforms import RecordTransform, is_transform
from perdure.data.records import Batch
from perdure.errors import ConfigError
from perdure.utils.checked_arguments import checked_arguments
from perdure.utils.checked_fields import CheckedFields
from perdure.utils.seeding import Seed, drawing_from

Change = Callable[[Tensor], Tensor]
"""Function from one record's input, without batch dimension, to a random version of it.

Its random numbers come from `torch.rand` and similar functions.
"""

NAME = "view."


@dataclass(frozen=True, kw_only=True)
class Views(CheckedFields):
    """K random versions (views) of every record, as augmentation.

    Guarantee: a view depends only on its record and on its own random numbers. `change` gets one
    record at a time, so it cannot mix records: a function by `torch.func.vmap`, a transform of
    torchvision in a loop on the processor.

    Args:
        count: number of views per record, K.
        change: function that makes one view and does not branch on values; or a transform of
            `torchvision.transforms.v2`, which may, and is slower.
    """

    count: int
    change: Change

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError.of("views.count", self.count, "1 or more")
        if is_transform(self.change):
            object.__setattr__(self, "change", RecordTransform(transform=self.change))

    def attach(self, batch: Batch, seed: Seed) -> Batch:
        """Return the batch with the views of each row, for `losses`.

        Args:
            batch: rows of the batch.
            seed: seed of the random numbers; secret bytes under privacy.

        Raises:
            ConfigError: if the change does not run on each record alone.
        """
        with _explained():
            made = self._views(batch.inputs, seed)
        views = {f"stored.{NAME}{k}": view for k, view in enumerate(made)}
        return Batch.from_tensors(batch.tensors() | views)

    def _views(self, inputs: Tensor, seed: Seed) -> list[Tensor]:
        if isinstance(self.change, RecordTransform):
            return [self.change.views(inputs, k, seed) for k in range(self.count)]
        with drawing_from(seed, inputs.device):
            each = torch.func.vmap(self.change, randomness="different")
            return [each(inputs) for _ in range(self.count)]

    def losses(self, losses: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        """(n,) mean loss of each row over its views; the plain loss if the batch has no views."""
        if f"{NAME}0" not in batch.stored:
            return losses(batch)
        plain = {n: t for n, t in batch.tensors().items() if not n.startswith(f"stored.{NAME}")}
        views = [plain | {"inputs": batch.stored[f"{NAME}{k}"]} for k in range(self.count)]
        return torch.stack([losses(Batch.from_tensors(view)) for view in views]).mean(0)


@contextmanager
def _explained() -> Iterator[None]:
    """Context manager that turns an error of a user's `change` into a ConfigError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise ConfigError(
            f"views.change fails on one record: {reason}; allowed: a transform of "
            "torchvision.transforms.v2 that keeps shape and dtype, or a function that runs under "
            "torch.func.vmap: it may not branch on values or draws; use torch.where, as "
            "perdure.data.shift_and_flip"
        ) from error


@dataclass(frozen=True, kw_only=True)
class ShiftAndFlip(CheckedFields):
    """Random shift and mirror of one image (c, h, w), as made by `shift_and_flip`.

    Args:
        pixels: largest shift.
        flip: mirror left and right with probability 1/2.
    """

    pixels: int
    flip: bool

    def __call__(self, picture: Tensor) -> Tensor:
        """Return one random version of the image (c, h, w)."""
        height, width = picture.shape[-2:]
        wide = F.pad(picture, (self.pixels,) * 4)
        offsets = (torch.rand(2, device=picture.device) * (2 * self.pixels + 1)).long()
        across = torch.arange(width, device=picture.device)
        if self.flip:
            across = torch.where(
                torch.rand((), device=picture.device) < 0.5, across.flip(0), across
            )
        rows = torch.arange(height, device=picture.device) + offsets[0]
        return wide.index_select(-2, rows).index_select(-1, across + offsets[1])


@checked_arguments
def shift_and_flip(*, pixels: int, flip: bool = False) -> Change:
    """Make a change for `Views` that shifts an image (c, h, w) and can mirror it, at random.

    The shift is at most `pixels` in each direction. The border that the shift leaves empty is
    filled with zeros.

    Args:
        pixels: largest shift.
        flip: mirror left and right with probability 1/2; do not use it for digits.
    """
    return ShiftAndFlip(pixels=pixels, flip=flip)
