"""Corruptions of images: noise, blur, contrast and brightness at five strengths.

They are the average case beside the worst case of an attack: nobody searches for them, and a model
that fails under them fails in use. Strengths are those of CIFAR-10-C for inputs from 0 to 1.

Source: Hendrycks and Dietterich 2019, "Benchmarking neural network robustness to common corruptions
and perturbations", and their code for CIFAR-10-C.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.adversarial.base import Logits
from perdure.adversarial.robust_accuracy import MOST_ROWS, fixed
from perdure.errors import ConfigError

Corruption = Literal["noise", "blur", "contrast", "brightness"]
"""Name of a corruption."""

STRENGTHS: dict[Corruption, tuple[float, ...]] = {
    "noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "blur": (0.4, 0.6, 0.7, 0.8, 1.0),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
}
"""Standard deviation of the noise; standard deviation of the blur in pixels; factor of the distance
to the mean of a channel; and added value, at strengths 1 to 5.
"""


def corrupted(
    images: Tensor,
    corruption: Corruption,
    strength: int,
    *,
    generator: torch.Generator,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Return corrupted images (n, channels, height, width), cut at the bounds.

    Args:
        images: (n, channels, height, width) images within the bounds.
        corruption: name of the corruption.
        strength: 1 to 5.
        generator: CPU generator for the noise; other corruptions do not use it.
        bounds: smallest and largest value of an input; strengths refer to their distance.

    Raises:
        ConfigError: if an argument is not allowed, or inputs are no images.
    """
    if corruption not in get_args(Corruption):
        raise ConfigError.of("corruption", corruption, get_args(Corruption))
    if strength not in range(1, 6):
        raise ConfigError.of("strength", strength, "1 to 5")
    if images.ndim != 4 or not images.is_floating_point():
        given = f"shape {tuple(images.shape)} in {images.dtype}"
        raise ConfigError.of("images", given, "(n, channels, height, width) of a float type")
    low, high = bounds
    amount = STRENGTHS[corruption][strength - 1]
    if corruption == "noise":
        draw = torch.randn(images.shape, dtype=images.dtype, generator=generator)
        moved = images + amount * (high - low) * draw.to(images.device)
    elif corruption == "blur":
        moved = _blurred(images, amount)
    elif corruption == "contrast":
        mean = images.mean((2, 3), keepdim=True)
        moved = mean + amount * (images - mean)
    else:
        moved = images + amount * (high - low)
    return moved.clamp(low, high)


def _blurred(images: Tensor, deviation: float) -> Tensor:
    """Return images after a Gaussian filter, with the edge pixels repeated outside."""
    reach = int(4 * deviation + 0.5)
    places = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    weights = torch.exp(-(places**2) / (2 * deviation**2))
    weights = weights / weights.sum()
    channels = images.shape[1]
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    across = weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    down = weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    return F.conv2d(F.conv2d(padded, across, groups=channels), down, groups=channels)


@dataclass(frozen=True, kw_only=True)
class CorruptionCard:
    """Accuracy under corruptions.

    Args:
        records: number of records.
        clean_accuracy: percentage of records that are classified correctly as they are.
        accuracies: the same under each corruption, at its strengths in order.
    """

    records: int
    clean_accuracy: float
    accuracies: dict[str, tuple[float, ...]]

    @property
    def mean_accuracy(self) -> float:
        """Mean over all corruptions and strengths, in percent."""
        values = [value for row in self.accuracies.values() for value in row]
        return sum(values) / len(values)

    def __str__(self) -> str:
        """Return the card as one line."""
        each = ", ".join(f"{n} {sum(v) / len(v):.1f}" for n, v in self.accuracies.items())
        return (
            f"{self.mean_accuracy:.1f} % under corruptions, {self.clean_accuracy:.1f} % clean; "
            f"{each}; {self.records} records"
        )

    def row(self) -> dict[str, Any]:
        """Return the card as a dict for JSON."""
        return asdict(self)


def measure_corruptions(
    predict: Logits,
    images: Tensor,
    labels: Tensor,
    *,
    generator: torch.Generator,
    corruptions: Sequence[Corruption] = tuple(STRENGTHS),
    strengths: Sequence[int] = (1, 2, 3, 4, 5),
    bounds: tuple[float, float] = (0.0, 1.0),
) -> CorruptionCard:
    """Return the accuracy of a model under each corruption, at each strength.

    A module is evaluated in evaluation mode; afterwards its modes are as before.

    Guarantee: none. The result is an exact statistic of `images`, so they must be public.

    Args:
        predict: module, or another function (k, ...) -> (k, classes) logits.
        images: (n, channels, height, width) images within the bounds.
        labels: (n,) int64 labels.
        generator: CPU generator for the noise.
        corruptions: names of corruptions.
        strengths: strengths from 1 to 5.
        bounds: smallest and largest value of an input.

    Raises:
        ConfigError: if an argument is not allowed.
    """
    if not len(images) or labels.shape != images.shape[:1]:
        given = tuple(labels.shape)
        raise ConfigError.of("labels.shape", given, f"({len(images)},), and at least one record")

    def accuracy(rows: Tensor) -> float:
        right = [
            (predict(rows[at : at + MOST_ROWS]).argmax(1) == labels[at : at + MOST_ROWS]).sum()
            for at in range(0, len(rows), MOST_ROWS)
        ]
        return 100.0 * int(sum(right)) / len(rows)

    with fixed(predict), torch.no_grad():
        found = {
            str(name): tuple(
                accuracy(corrupted(images, name, each, generator=generator, bounds=bounds))
                for each in strengths
            )
            for name in corruptions
        }
        clean = accuracy(images)
    return CorruptionCard(records=len(images), clean_accuracy=clean, accuracies=found)
