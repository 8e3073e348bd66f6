"""Geometry of the balls around records: steepest steps, projections and uniform points."""

from typing import Literal

import torch
from torch import Tensor

Norm = Literal["linf", "l2", "l1"]
"""Norm that limits a perturbation."""


def steepest_direction(gradient: Tensor, norm: Norm) -> Tensor:
    """Return, for each row, the step of norm 1 that increases the loss most to first order.

    It is the sign of the gradient (linf), its unit vector (l2), or the sign of its largest entry
    alone (l1).

    For a row whose gradient is 0, the step is 0.
    """
    if norm == "linf":
        return gradient.sign()
    if norm == "l1":
        flat = gradient.flatten(1)
        largest = flat.abs().argmax(1, keepdim=True) if flat.numel() else flat[:, :0].long()
        one = torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest).sign())
        return one.view_as(gradient)
    dims = tuple(range(1, gradient.ndim))
    # Divide by the largest entry first, because the squares of a small gradient underflow in
    # float32.
    largest = gradient.abs().amax(dims, keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
    scaled = gradient / largest
    length: Tensor = torch.linalg.vector_norm(scaled, dim=dims, keepdim=True)
    return scaled / length.clamp_min(1.0)


def project(change: Tensor, epsilon: float, norm: Norm) -> Tensor:
    """Return the nearest point (n, ...) of the ball to every row of `change`, by distance in L2.

    No entry grows or changes its sign, so a row inside of bounds around 0 stays inside of them.

    Args:
        change: (n, ...) perturbations.
        epsilon: radius of the ball.
        norm: norm of the ball.

    Source: Duchi, Shalev-Shwartz, Singer, Chandra 2008, "Efficient projections onto the L1-ball",
    section 3, for l1.
    """
    if norm == "linf":
        return change.clamp(-epsilon, epsilon)
    if norm == "l2":
        length = torch.linalg.vector_norm(change, dim=tuple(range(1, change.ndim)), keepdim=True)
        return torch.where(length > epsilon, change * (epsilon / length), change)
    flat = change.flatten(1)
    if not flat.numel():
        return change
    size = flat.abs()
    ordered = size.sort(1, descending=True).values
    counts = torch.arange(1, flat.shape[1] + 1, dtype=flat.dtype, device=flat.device)
    excess = (ordered.cumsum(1) - epsilon) / counts
    kept = (ordered > excess).sum(1, keepdim=True).clamp_min(1)
    cut = excess.gather(1, kept - 1).clamp_min(0)
    nearest = flat.sign() * (size - cut).clamp_min(0)
    outside = size.sum(1, keepdim=True) > epsilon
    return torch.where(outside, nearest, flat).view_as(change)


def uniform_in_ball(like: Tensor, norm: Norm, generator: torch.Generator) -> Tensor:
    """Draw one uniform point in the ball of radius 1 for each row of `like`.

    The points are drawn on the CPU and moved to the device of `like`.
    """
    shape = like.shape
    count = shape[1:].numel()
    if norm == "linf":
        draw = 2 * torch.rand(shape, dtype=like.dtype, generator=generator) - 1
    elif norm == "l2":
        normal = torch.randn(shape, dtype=like.dtype, generator=generator)
        share = torch.rand(len(like), *[1] * (like.ndim - 1), dtype=like.dtype, generator=generator)
        # Volume grows with radius ** dimension, so the radius is this root of a uniform number.
        draw = share ** (1 / count) * steepest_direction(normal, "l2")
    else:
        # shares of `count + 1` exponential numbers are uniform in the simplex
        uniform = torch.rand(len(like), count + 1, dtype=like.dtype, generator=generator)
        spans = -torch.log1p(-uniform)
        signs = torch.randint(0, 2, (len(like), count), generator=generator) * 2 - 1
        draw = (signs * spans[:, :-1] / spans.sum(1, keepdim=True)).view(shape)
    return draw.to(like.device)
