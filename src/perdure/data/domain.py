"""Declared domain of the inputs: the values that a record may have, known before any record."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.utils.checked_fields import CheckedFields


@dataclass(frozen=True, kw_only=True)
class InputDomain(CheckedFields):
    """Values that the input of one record may have, from public declarations only.

    The guard tests a model and its losses on synthetic records of this domain. Take the domain from
    the definition of the data (the range of a pixel, the size of a vocabulary), never from private
    records.

    >>> InputDomain(shape=(1, 28, 28), range=(0.0, 1.0))
    >>> InputDomain(
    ...     shape=(80,), dtype=torch.int64, vocabulary=1000, padding=0, sequence_axes=(0,)
    ... )

    Args:
        shape: shape of the input of one record, with the padded length of a sequence.
        dtype: dtype of the inputs.
        range: smallest and largest value of floating-point inputs; None if not declared.
        vocabulary: number of possible values of integer inputs, which are 0 .. vocabulary - 1.
        padding: number that fills a sequence after its end; floating-point sequences are filled
            with 0.
        sequence_axes: axes of `shape` along which records have different lengths.

    Raises:
        ConfigError: if the values contradict each other.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    range: tuple[float, float] | None = None
    vocabulary: int | None = None
    padding: int | None = None
    sequence_axes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype.is_complex:
            raise ConfigError.of("domain.dtype", self.dtype, "floating-point or whole numbers")
        if self.dtype.is_floating_point:
            self._check_floats()
        else:
            self._check_whole_numbers()
        if not all(0 <= axis < len(self.shape) for axis in self.sequence_axes):
            allowed = f"axes of one record, 0 to {len(self.shape) - 1}"
            raise ConfigError.of("domain.sequence_axes", self.sequence_axes, allowed)

    def _check_floats(self) -> None:
        for name in ("vocabulary", "padding"):
            if getattr(self, name) is not None:
                raise ConfigError.of(f"domain.{name}", getattr(self, name), "None for floats")
        if self.range is not None and not -torch.inf < self.range[0] < self.range[1] < torch.inf:
            raise ConfigError.of("domain.range", self.range, "(low, high), finite, with low < high")

    def _check_whole_numbers(self) -> None:
        if self.range is not None:
            raise ConfigError.of("domain.range", self.range, "None for whole numbers")
        if self.vocabulary is None or self.vocabulary < 1:
            raise ConfigError.of("domain.vocabulary", self.vocabulary, "1 or more")
        if self.padding is not None and not 0 <= self.padding < self.vocabulary:
            allowed = f"None, or a number from 0 to {self.vocabulary - 1}"
            raise ConfigError.of("domain.padding", self.padding, allowed)

    @property
    def numel(self) -> int:
        """Number of values in the input of one record."""
        return math.prod(self.shape)

    @property
    def floats(self) -> bool:
        """True if inputs are floating-point numbers."""
        return self.dtype.is_floating_point

    def including(self, value: float) -> "InputDomain":
        """Return the domain with its range extended to include `value`."""
        if self.range is None:
            return self
        low, high = self.range
        return replace(self, range=(min(low, value), max(high, value)))

    def fits(self, inputs: Tensor) -> bool:
        """Return True if inputs (n, ...) have the declared shape and dtype."""
        return tuple(inputs.shape[1:]) == self.shape and inputs.dtype == self.dtype

    def outside(self, inputs: Tensor) -> Tensor:
        """(n,) True for each record that has a value outside the domain.

        Infinite values and NaN do not count as outside: such a record counts as zero in training.
        """
        if self.floats and self.range is None:
            return torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
        if self.floats:
            assert self.range is not None
            beyond = (inputs < self.range[0]) | (inputs > self.range[1])
            beyond &= inputs.isfinite()
        else:
            assert self.vocabulary is not None
            numbers = inputs.long() if inputs.dtype == torch.bool else inputs
            beyond = (numbers < 0) | (numbers >= self.vocabulary)
        # the number of values is given, because torch cannot infer it without any record
        return beyond.view(len(inputs), math.prod(inputs.shape[1:])).any(1)

    def random(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, *shape) uniform random inputs on the CPU; in [0, 1) if no range is declared."""
        if not self.floats:
            assert self.vocabulary is not None
            drawn = torch.randint(self.vocabulary, (n, *self.shape), generator=generator)
            return drawn.to(self.dtype)
        low, high = self.range or (0.0, 1.0)
        return (low + (high - low) * torch.rand(n, *self.shape, generator=generator)).to(self.dtype)
