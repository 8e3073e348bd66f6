"""Bounds of inputs, for all features together or for each of them."""

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from perdure.errors import ConfigError

PerFeature = float | tuple[float, ...]
"""One number for all features of an input, or one number for each of them."""

Bounds = tuple[PerFeature, PerFeature] | None
"""Smallest and largest value of an input; None for inputs without bounds."""

ALLOWED = (
    "(low, high) with low < high, each a finite number or a list with one number per feature; or "
    "None"
)


def numbers_of(value: PerFeature) -> tuple[float, ...]:
    """Return the numbers of a value, one for all features or one for each."""
    return tuple(value) if isinstance(value, Sequence) else (value,)


def refuse_bounds(bounds: object) -> None:
    """Refuse bounds that are no pair of numbers, or lists of equal length, with low < high.

    Raises:
        ConfigError: if the bounds are not allowed.
    """
    if bounds is None:
        return
    pair = bounds if isinstance(bounds, tuple | list) else ()
    ends = [numbers_of(end) for end in pair]
    if (
        len(ends) != 2
        or not all(map(_are_finite, ends))
        or len({len(end) for end in ends} - {1}) > 1
        or not all(low < high for low, high in _pairs(*ends))
    ):
        raise ConfigError.of("bounds", bounds, ALLOWED)


def _are_finite(values: Sequence[object]) -> bool:
    """Return True for at least one value, if all are finite numbers."""
    return bool(values) and all(
        not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
        for value in values
    )


def _pairs(lows: Sequence[float], highs: Sequence[float]) -> list[tuple[float, float]]:
    """Return the two bounds of each feature."""
    size = max(len(lows), len(highs))
    one_each = [list(end) * (size // len(end)) for end in (lows, highs)]
    return list(zip(*one_each, strict=True))


def of_entries(name: str, value: PerFeature, origin: Tensor) -> float | Tensor:
    """Return a number as it is, and a list of numbers as a tensor of the shape of one record.

    Args:
        name: name of the setting, for the message.
        value: number or list.
        origin: (n, ...) inputs.

    Raises:
        ConfigError: if a list does not have one number per feature.
    """
    if not isinstance(value, Sequence):
        return value
    shape = origin.shape[1:]
    if len(value) != shape.numel():
        raise ConfigError.of(
            f"length of {name}", len(value), f"{shape.numel()}, one number per feature"
        )
    return torch.tensor(value, dtype=origin.dtype, device=origin.device).view(shape)
