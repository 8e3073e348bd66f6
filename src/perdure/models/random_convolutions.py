"""Random convolutions: features from random filters that are never trained.

R+ = mean over a square of relu(w_k * x),   R- = mean over a square of relu(-w_k * x)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.errors import ConfigError, DataError
from perdure.models.scattering import blur
from perdure.utils.seeding import generator


class RandomConvolutions(nn.Module):
    """Features of images: responses to random filters, averaged over squares of pixels.

    Positive and negative responses are separate channels.

    Guarantee: row i of the result is a fixed function of image i alone; the filters are drawn from
    the seed, do not depend on any record, and no training changes them.

    >>> RandomConvolutions(filters=128)(torch.rand(2, 1, 28, 28)).shape
    torch.Size([2, 256, 4, 4])

    Args:
        channels: number of channels of the images.
        filters: number of filters; each gives two channels.
        size: side of a filter in pixels, odd.
        pool: side of the squares in pixels; remaining rows and columns are not used.
        smoothing: standard deviation of the Gaussian that smooths the filters, in pixels; 0 for
            none.
        root: take the square root of every average, so that their variances are more similar.
        seed: seed of the filters.

    Raises:
        ConfigError: if an argument is not allowed.

    Source: Jarrett, Kavukcuoglu, Ranzato and LeCun 2009, "What is the best multi-stage architecture
    for object recognition?" (random filters, rectification, average pooling).
    """

    kernels: Tensor

    def __init__(
        self,
        *,
        channels: int = 1,
        filters: int = 128,
        size: int = 7,
        pool: int = 7,
        smoothing: float = 1.0,
        root: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("filters", filters), ("pool", pool)):
            if value < 1:
                raise ConfigError.of(name, value, "whole numbers from 1")
        if size < 1 or size % 2 == 0 or channels * size**2 < 2:
            raise ConfigError.of("size", size, "odd numbers, above 1 for images of one channel")
        if not 0 <= smoothing < math.inf:
            raise ConfigError.of("smoothing", smoothing, "a finite number, 0 or more")
        self.channels = channels
        self.pool = pool
        self.smoothing = smoothing
        self.root = root
        self.seed = seed
        kernels = random_filters(
            filters, channels, size, smoothing, generator(seed, "random convolutions")
        )
        self.register_buffer("kernels", kernels, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Features (n, 2 * filters, h / pool, w / pool) of images (n, channels, h, w).

        Raises:
            DataError: if the images have another shape.
        """
        if (
            images.dim() != 4
            or images.shape[1] != self.channels
            or min(images.shape[2:]) < self.pool
        ):
            allowed = f"(n, {self.channels}, h, w) with sides from {self.pool}"
            raise DataError(f"images have shape {tuple(images.shape)}; allowed: {allowed}")
        responses = F.conv2d(images, self.kernels, padding=self.kernels.shape[-1] // 2)
        pooled = torch.cat(
            [F.avg_pool2d(F.relu(sign * responses), self.pool) for sign in (1, -1)], 1
        )
        return pooled.sqrt() if self.root else pooled

    def extra_repr(self) -> str:
        """Show the arguments in the printed module."""
        filters, channels, size, _ = self.kernels.shape
        return (
            f"channels={channels}, filters={filters}, size={size}, pool={self.pool}, "
            f"smoothing={self.smoothing}, "
            f"root={self.root}, seed={self.seed}"
        )


def random_filters(
    filters: int, channels: int, size: int, smoothing: float, place: torch.Generator
) -> Tensor:
    """Draw filters of smoothed Gaussian noise, each of mean 0 and norm 1.

    Args:
        filters: number of filters.
        channels: number of channels of the image.
        size: height and width of a filter.
        smoothing: standard deviation of the blur, in pixels.
        place: random generator of the noise.

    Returns:
        (filters, channels, size, size) float32.
    """
    noise = torch.randn(filters, channels, size, size, generator=place, dtype=torch.float64)
    smooth = blur(size, smoothing)
    noise = smooth @ noise @ smooth.T
    noise = noise - noise.mean((1, 2, 3), keepdim=True)
    return (noise / noise.square().sum((1, 2, 3), keepdim=True).sqrt()).float()
