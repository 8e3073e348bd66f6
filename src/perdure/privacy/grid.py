"""Public grid of a private sum: exact addition, and integer noise in whole grid steps.

Sums of floating-point numbers leak. Two sums that differ by one record can differ by more than
its clip norm, because every addition rounds, and noise that is itself a floating-point number can
tell which of two sums it was added to (Mironov 2012; Casacuberta, Shoemate, Vadhan and Wagaman
2022). So a sum is counted in whole steps of a public grid, integer noise is added to the integers,
and only the result becomes a floating-point number.

With d numbers in a sum, clip norm C and grid step C / M, one record moves the integers by at most

    M + M / 1000 + sqrt(d)        and M is at least 2^11 sqrt(d)

in L2 norm: the clip norm, a declared slack for norms, factors and products in float32, and the
rounding, since |round(a) - round(b)| <= |a - b| + 1 in every coordinate. `SENSITIVITY` is an upper
bound of this in units of C. The accountant divides the noise multiplier by it.

The rounding is proved. The slack is tested, not proved: for every kind of layer, batches up to
4,096 records move by less than half of it against float64.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from perdure.errors import PrivacyError
from perdure.privacy.noise.compiled import grid_loops
from perdure.privacy.noise.gaussian import COMPILED_FROM
from perdure.privacy.noise.table import (
    DEVIATIONS,
    LEAST_SCALE,
    LOG2_ERROR,
    Floats,
    Integers,
    refuse_scale,
)
from perdure.types import Params

SLACK = 1e-3
"""Share of the clip norm that errors of float32 before the rounding may add.

Declared and tested.
"""
STEPS_PER_ROOT = 2**11
"""Smallest ratio of grid steps per clip norm to the square root of the numbers in a sum."""
SENSITIVITY = 1 + SLACK + 1 / STEPS_PER_ROOT
"""Largest change of a sum on the grid by one record, in units of the clip norm."""
Shapes = Mapping[str, torch.Size]
"""Shapes of the tensors in a sum, by name, in order."""
MOST_UNITS = 2.0**52
"""Bound below which sums of integers are exact in float64, in any order of addition."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A public grid on which private sums are counted in integers; M grid steps are one clip norm.

    It is computed from public numbers only.

    Args:
        numbers: largest number of coordinates in a sum, d.
        steps: M, a power of two.
    """

    numbers: int
    steps: int

    @classmethod
    def of(cls, numbers: int, noise_multiplier: float, *, gain: float = 1.0) -> "Grid":
        """Choose the grid for sums of up to `numbers` numbers with this noise multiplier.

        Args:
            numbers: largest number of coordinates in a sum.
            noise_multiplier: standard deviation of the noise in units of the clip norm.
            gain: for noise that is correlated over the steps, the factor between the drawn noise
                and a grid step (see `perdure.privacy.noise.banded`).

        Raises:
            PrivacyError: if there are no tables for noise of this size; nothing was charged yet.
        """
        least = max(STEPS_PER_ROOT * math.sqrt(max(1, numbers)), LEAST_SCALE / noise_multiplier)
        grid = cls(numbers=numbers, steps=2 ** math.ceil(math.log2(least)))
        refuse_scale(noise_multiplier * grid.steps * gain)
        return grid

    @cached_property
    def _kept(self) -> Tensor:
        """Buffer for the integers of a sum, used again in every step.

        Allocating it in each step would take as long as drawing the noise.
        """
        return torch.empty(self.numbers, dtype=torch.int64)

    def facts(self) -> dict[str, float]:
        """Return all facts about the grid and its noise that a ledger entry records."""
        return {
            "numbers": self.numbers,
            "steps": self.steps,
            "slack": SLACK,
            "rounding": 1 / STEPS_PER_ROOT,
            "log2_error": LOG2_ERROR,
            "deviations": DEVIATIONS,
        }

    def units(self, total: Params | None, shapes: Shapes, clip_norm: float) -> Tensor:
        """Round an exact sum to whole grid steps: (d,) int64 on the CPU, zeros without records.

        The tensors of all names are concatenated. The next call overwrites the returned tensor.

        Args:
            total: name to exact sum; None if there are no records.
            shapes: name to shape; d is the total number of coordinates.
            clip_norm: bound on one record, equal to `steps` grid steps.

        Raises:
            PrivacyError: if there are more numbers than the grid was made for, or a sum is too
                large to be added exactly.
        """
        numbers = sum(map(math.prod, shapes.values()))
        if numbers > self.numbers:
            raise PrivacyError(
                f"a private sum has {numbers} coordinates, but its grid was made for at most "
                f"{self.numbers}; reserve the steps with numbers={numbers}"
            )
        units = self._kept[:numbers]
        if total is None:
            return units.zero_()
        to_units, _ = _loops(numbers)
        start = 0
        for name in shapes:
            part = total[name].detach().flatten().cpu()
            exact = part if part.dtype is torch.float64 else part.float()
            out = units[start : start + len(part)].numpy()
            if not to_units(exact.numpy(), self.steps / clip_norm, MOST_UNITS, out):
                raise PrivacyError(
                    "a private sum is too large to be added exactly; use smaller batches or a "
                    "smaller model"
                )
            start += len(part)
        return units

    def values(
        self, units: Tensor, shapes: Shapes, clip_norm: float, device: torch.device
    ) -> Params:
        """Convert sums from grid steps to float32, by name; this is the last operation on them.

        Args:
            units: (d,) sums in grid steps, integers or not.
            shapes: name to shape, in the order of `units`.
            clip_norm: bound on one record, equal to `steps` grid steps.
            device: device of the result.
        """
        values = torch.empty(len(units), dtype=torch.float32)
        _, to_values = _loops(len(units))
        to_values(units.numpy(), clip_norm / self.steps, values.numpy())
        parts = torch.split(values.to(device), [math.prod(shape) for shape in shapes.values()])
        named = zip(shapes.items(), parts, strict=True)
        return {name: part.view(shape) for (name, shape), part in named}


def _loops(numbers: int) -> tuple[Callable[..., bool], Callable[..., None]]:
    if numbers < COMPILED_FROM:
        return to_units, to_values
    return grid_loops()


def to_units(values: Floats, factor: float, most: float, out: Integers) -> bool:
    """Write values times `factor`, rounded to whole grid steps, to `out`.

    Returns:
        False, with nothing written, if the size of a rounded value is not below `most`.
    """
    # in float64, because a float32 product is rounded by more than a grid step
    whole = np.rint(values.astype(np.float64) * factor)
    inside = bool((np.abs(whole) < most).all())
    if inside:
        out[:] = whole
    return inside


def to_values(units: npt.NDArray[Any], factor: float, out: Floats) -> None:
    """Write grid steps, whole or not, times `factor` to `out`, as float32 values."""
    out[:] = units.astype(np.float64) * factor
