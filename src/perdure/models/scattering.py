"""The scattering transform: fixed features of images, which cost no privacy.

The scattering transform alternates wavelets and absolute values, and averages the results:

    S0 = x * phi,   S1 = |x * psi_a| * phi,   S2 = ||x * psi_a| * psi_b| * phi
    with b at a coarser scale than a

psi are Morlet wavelets of J scales and L orientations, phi is a Gaussian as wide as the widest of
them, and averages are kept at every 2^J-th pixel. Small shifts and deformations of an image change
the averages only a little.

Use it as the body of a classifier with `perdure.models.frozen.frozen`.

"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.errors import ConfigError, DataError
from perdure.utils.checked_fields import CheckedFields

WIDTH = 0.8
"""Standard deviation, in pixels, of the envelope at the finest scale; it doubles per scale."""
FREQUENCY = 3 * math.pi / 4
"""Centre frequency at the finest scale, in radians per pixel; it halves per scale."""
CUT = 3.0
"""Number of standard deviations at which wavelets are cut off."""


@dataclass(frozen=True, kw_only=True)
class Scattering(CheckedFields):
    """Scattering transform of second order, as fixed features of images.

    Guarantee: row i of the result is a fixed function of image i alone, so it adds no privacy cost.
    The features of private records are also private.

    >>> Scattering()(torch.rand(2, 1, 28, 28)).shape
    torch.Size([2, 81, 7, 7])

    Args:
        scales: J; the result is 2^J times smaller than the image in each direction.
        orientations: L; one input channel gives 1 + J L + L^2 J (J - 1) / 2 channels.

    Raises:
        ConfigError: if an argument is not allowed; the message names it.

    Source: Bruna and Mallat 2013, "Invariant scattering convolution networks"; Oyallon and Mallat
    2015, "Deep roto-translation scattering for object classification".
    """

    scales: int = 2
    orientations: int = 8

    def __post_init__(self) -> None:
        for name in ("scales", "orientations"):
            if getattr(self, name) < 1:
                raise ConfigError.of(name, getattr(self, name), "whole numbers from 1")

    @property
    def channels(self) -> int:
        """Number of output channels for one input channel."""
        pairs = self.scales * (self.scales - 1) // 2
        return 1 + self.scales * self.orientations + self.orientations**2 * pairs

    @torch.no_grad()
    def __call__(self, images: Tensor, batch_size: int = 32) -> Tensor:
        """Features (n, c * channels, h / 2^J, w / 2^J), float32, of images (n, c, h, w).

        The channels of orders 0, 1 and 2 follow one another.

        Args:
            images: images with sides above 2^J and divisible by 2^J.
            batch_size: number of channels processed at a time; small enough that intermediate
                results stay in the processor's cache (256 takes twice as long).

        Raises:
            DataError: if the images have another shape.
        """
        margin = 2**self.scales
        if images.dim() != 4 or any(side % margin or side <= margin for side in images.shape[2:]):
            allowed = f"(n, c, h, w) with sides above {margin} and divisible by it"
            raise DataError(f"images have shape {tuple(images.shape)}; allowed: {allowed}")
        n, c, height, width = images.shape
        shape = (n, c * self.channels, height // margin, width // margin)
        planes = images.float().reshape(n * c, 1, height, width)
        # vmap gives a single image, and forbids writing into a plain tensor
        if 0 < n * c <= batch_size:
            return self._transformed(planes).reshape(shape)
        answer = torch.empty(n * c, self.channels, *shape[2:], device=images.device)
        for start in range(0, n * c, batch_size):
            answer[start : start + batch_size] = self._transformed(
                planes[start : start + batch_size]
            )
        return answer.view(shape)

    def _transformed(self, planes: Tensor) -> Tensor:
        """Averages (n, channels, h / 2^J, w / 2^J) of single-channel images (n, 1, h, w)."""
        return torch.cat(
            list(self._orders(F.pad(planes, (2**self.scales,) * 4, mode="reflect"))), 1
        )

    def _orders(self, planes: Tensor) -> Iterator[Tensor]:
        """Yield the averages of padded images (n, 1, H, W), order by order.

        Order 0 comes first, then order 1 by scale, then order 2 by both scales.
        """
        scales = range(self.scales)
        yield self._average(planes, 0)
        first = [modulus(planes, scale, self.orientations) for scale in scales]
        yield from (
            self._average(moduli, scale) for scale, moduli in zip(scales, first, strict=True)
        )
        for fine in scales:
            for coarse in scales[fine + 1 :]:
                yield self._average(modulus(first[fine], coarse - fine, self.orientations), coarse)

    def _average(self, planes: Tensor, resolution: int) -> Tensor:
        """Gaussian averages at every 2^J-th pixel, from values at every 2^resolution-th pixel."""
        rows, columns = (
            low_pass(side << resolution, self.scales, resolution).to(planes.device)
            for side in planes.shape[-2:]
        )
        return rows @ planes @ columns.mT


def modulus(planes: Tensor, scale: int, orientations: int) -> Tensor:
    """|x * psi| (n, c * L, h / 2^scale, w / 2^scale) of images x (n, c, h, w).

    Images are continued periodically.

    A coarse wavelet for values at every 2^j-th pixel equals the wavelet that is j scales finer.
    """
    kernels = morlet(scale, orientations).to(planes.device)
    reach = kernels.shape[-1] // 2
    apart = F.pad(planes.flatten(0, 1)[:, None], (reach,) * 4, mode="circular")
    parts = F.conv2d(apart, torch.cat([kernels.real, kernels.imag])[:, None], stride=2**scale)
    real, imaginary = parts.chunk(2, dim=1)
    return (real.square() + imaginary.square()).sqrt().view(planes.shape[0], -1, *parts.shape[2:])


def morlet(scale: int, orientations: int) -> Tensor:
    """Morlet wavelets (L, k, k), complex64, of one scale.

    They sum to 0, and their envelopes sum to about 1.

        psi(u) = (exp(i xi u.e) - b) exp(-((u.e)^2 + s^2 (u.e')^2) / (2 sigma^2)) s / (2 pi sigma^2)

    with e the direction pi l / L, e' perpendicular to it, sigma = 0.8 * 2^scale, xi = 3 pi / 4 /
    2^scale and s = 4 / L.
    """
    sigma = WIDTH * 2**scale
    slant = min(1.0, 4 / orientations)
    reach = math.ceil(CUT * sigma / slant)
    line = torch.arange(-reach, reach + 1, dtype=torch.float64)
    angles = torch.arange(orientations, dtype=torch.float64)[:, None, None] * math.pi / orientations
    along = line * angles.cos() + line[:, None] * angles.sin()
    across = line[:, None] * angles.cos() - line * angles.sin()
    envelope = (
        torch.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2))
        * slant
        / (2 * math.pi * sigma**2)
    )
    wave = torch.exp(1j * FREQUENCY / 2**scale * along)
    balance = (wave * envelope).sum((1, 2), keepdim=True) / envelope.sum((1, 2), keepdim=True)
    balanced: Tensor = (wave - balance) * envelope
    return balanced.to(torch.complex64)


def low_pass(side: int, scales: int, resolution: int) -> Tensor:
    """Matrix (side / 2^J - 2, side / 2^j) of Gaussian averages.

    The averages are around every 2^J-th pixel, without the margins.

    Args:
        side: side of the padded image, in pixels.
        scales: J; the standard deviation is 0.8 * 2^(J-1) pixels.
        resolution: j; values are given at every 2^j-th pixel.
    """
    margin = 2**scales
    centres = torch.arange(margin, side - margin, margin, dtype=torch.float64)
    gap = (torch.arange(0, side, 2**resolution) - centres[:, None]) / (WIDTH * margin / 2)
    weights = torch.exp(-gap.square() / 2)
    return (weights / weights.sum(1, keepdim=True)).float()


def blur(size: int, deviation: float) -> Tensor:
    """Matrix (size, size) float64 that smooths a line of pixels with a Gaussian.

    Pixels outside the line count as 0.
    """
    if not deviation:
        return torch.eye(size, dtype=torch.float64)
    line = torch.arange(size, dtype=torch.float64)
    weights = torch.exp(-((line - line[:, None]) ** 2) / (2 * deviation**2))
    return weights / torch.exp(-((line - line[size // 2]) ** 2) / (2 * deviation**2)).sum()
