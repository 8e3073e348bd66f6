"""Inputs of a user's data: conversion and scaling by rules that are stated.

Constants for scaling say something of the records that they are computed from. So they are declared
(a range, a mean and a deviation that hold for any data of this kind), or they are a release.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeGuard

import torch
from torch import Tensor

from perdure.data.domain import InputDomain
from perdure.data.records import Records, Spent
from perdure.data.row_view import changed_rows
from perdure.data.sources.values import as_float32, refuse_not_finite, refuse_outside
from perdure.errors import ConfigError, DataError


class Release(Protocol):
    """Constants for scaling that are a paid release; see `perdure.privacy.ReleasedScaling`."""

    def constants(
        self, inputs: Tensor, low: Tensor, high: Tensor, *, partition: str, size: int
    ) -> tuple[Tensor, Tensor, tuple[Spent, ...]]:
        """Return mean and deviation, each broadcasting to one row, and what was spent."""


Number = float | Sequence[float]
"""One number for all columns or channels, or one for each."""
Standardise = Literal["declared", "released"] | tuple[Number, Number] | Release
CHANNELS = (1, 3, 4)
"""Channels of an image that stores them last."""


def float_inputs(values: Tensor, name: str, notes: dict[str, None]) -> Tensor:
    """Return inputs (n, ...) float32; images of bytes become (n, channels, h, w) in [0, 1].

    Args:
        values: (n, ...) numbers of any type.
        name: of the argument and its part, for notes and messages.
        notes: remarks, to which every change is added.

    Raises:
        DataError: for no rows, no columns, or bytes that are no images.
    """
    if values.dim() < 2:
        raise DataError(
            f"{name} have shape {tuple(values.shape)}; allowed: (n, ...), one row per record; for "
            "one number per record, use reshape(-1, 1)"
        )
    if not len(values) or not values[0].numel():
        raise DataError(
            f"{name} have shape {tuple(values.shape)}; allowed: at least one row and one column"
        )
    if values.dtype == torch.uint8:
        return _unit_images(values, name, notes)
    return as_float32(values, name, notes)


def _unit_images(values: Tensor, name: str, notes: dict[str, None]) -> Tensor:
    """Divide bytes by 255; add the axis of one channel, or move the channels to the front."""
    if values.dim() not in (3, 4):
        raise DataError(
            f"{name} are uint8 of shape {tuple(values.shape)}; allowed: images (n, height, width) "
            "or (n, channels, height, width), which are divided by 255; convert other bytes to "
            "float32"
        )
    if values.dim() == 3:
        values = values.unsqueeze(1)
        notes[f"{name} had shape (n, height, width) and have one channel now"] = None
    elif values.shape[1] not in CHANNELS and values.shape[3] in CHANNELS:
        values = values.permute(0, 3, 1, 2)
        notes[f"{name} had their channels last and have them first now"] = None
    notes[f"{name} were uint8 and are divided by 255: float32 from 0 to 1"] = None
    return changed_rows(values, _units_of_bytes)


def _units_of_bytes(values: Tensor) -> Tensor:
    return values.contiguous().float().div_(255)


def byte_range(values: Tensor) -> tuple[Number, Number] | None:
    """Range that inputs have by their type: (0, 1) for bytes, which are divided by 255."""
    return (0.0, 1.0) if values.dtype == torch.uint8 else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Scaling:
    """Constants that inputs are standardised with, and the range that they are declared to have.

        scaled = (value - mean) / deviation

    Args:
        mean: broadcasts to one row; None where nothing is scaled.
        deviation: as the mean.
        low: least value before scaling, broadcasts to one row; None where nothing is declared.
        high: greatest value before scaling.
    """

    mean: Tensor | None = None
    deviation: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None

    def applied(self, inputs: Tensor) -> Tensor:
        """Scale inputs (n, ...); large ones batch by batch."""
        if self.mean is None or self.deviation is None:
            return inputs
        return changed_rows(inputs, self._scaled)

    def _scaled(self, inputs: Tensor) -> Tensor:
        assert self.mean is not None and self.deviation is not None
        return (inputs - self.mean) / self.deviation

    def domain(self, shape: tuple[int, ...]) -> InputDomain | None:
        """Declared domain of the scaled inputs of this shape; None where no range is declared."""
        if self.low is None or self.high is None:
            return None
        # the same arithmetic as on the inputs, so that none of them leaves the range by rounding
        low = float(self.applied(self.low).min())
        high = float(self.applied(self.high).max())
        return InputDomain(shape=shape, range=(low, high))


def scaling_of(
    standardise: Standardise | None,
    value_range: tuple[Number, Number] | None,
    shape: tuple[int, ...],
) -> Scaling:
    """Return the constants that are declared.

    Args:
        standardise: "declared" for the middle and the half width of `value_range`, which gives
            numbers from -1 to 1, and for a release, before its constants are known; (mean,
            deviation), declared; None for no scaling.
        value_range: (least, greatest) value before scaling.
        shape: of one input; a sequence of constants has one for each column, or each channel.

    Raises:
        ConfigError: for constants that are missing, not finite or of another length.
    """
    low = high = None
    if value_range is not None:
        low, high = _constants("value_range", value_range, shape)
        if not bool((low < high).all()):
            raise ConfigError.of("value_range", value_range, "(least, greatest), least < greatest")
    if standardise is None:
        return Scaling(low=low, high=high)
    if standardise == "released":
        raise ConfigError(
            "standardise = 'released' has no price; allowed: perdure.privacy.ReleasedScaling("
            "noise_multiplier=20.0, folder='...'), whose noise and ledger you choose"
        )
    if standardise == "declared" or is_release(standardise):
        if low is None or high is None:
            given = standardise if isinstance(standardise, str) else type(standardise).__name__
            allowed = f"{given} beside value_range=(least, greatest)"
            raise ConfigError.of("standardise", given, allowed)
        return Scaling(mean=(low + high) / 2, deviation=(high - low) / 2, low=low, high=high)
    mean, deviation = _constants("standardise", standardise, shape)
    if not bool((deviation > 0).all()):
        raise ConfigError.of("standardise", standardise, "(mean, deviation), deviation above 0")
    return Scaling(mean=mean, deviation=deviation, low=low, high=high)


def is_release(standardise: object) -> TypeGuard[Release]:
    """Return whether constants are to be released from the records."""
    return callable(getattr(standardise, "constants", None))


def released_scaling(
    release: Release, scaling: Scaling, records: Records
) -> tuple[Scaling, Records]:
    """Release the constants of training records, which carry what they spent from then on.

    Guarantee: that of the release. Scaled test records are a function of it.

    Args:
        release: what is paid.
        scaling: with the declared range.
        records: to learn from, before scaling.
    """
    assert scaling.low is not None
    assert scaling.high is not None
    mean, deviation, spent = release.constants(
        records.inputs,
        scaling.low,
        scaling.high,
        partition=records.partition,
        size=records.declared_size,
    )
    found = replace(scaling, mean=mean, deviation=deviation)
    return found, replace(records, spent=(*records.spent, *spent))


def _constants(field: str, given: object, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return two constants, each of a shape that broadcasts to one input."""
    allowed = f"two numbers, or two sequences of {shape[0]} numbers"
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise ConfigError.of(field, given, allowed)
    found = []
    for each in given:
        try:
            value = torch.as_tensor(each, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError.of(field, given, allowed) from error
        if value.shape not in ((), (shape[0],)) or not bool(value.isfinite().all()):
            raise ConfigError.of(field, given, allowed)
        found.append(value.view(-1, *[1] * (len(shape) - 1)))
    return found[0], found[1]


def refuse_bad_inputs(
    inputs: Tensor, scaling: Scaling, name: str, columns: Sequence[str] = ()
) -> None:
    """Refuse inputs (n, ...) that are not finite or leave the declared range.

    Args:
        inputs: before scaling.
        scaling: with the declared range.
        name: of the argument and its part, for the message.
        columns: names of the columns of inputs (n, k), where they have names.

    Raises:
        DataError: with row and column of the first bad value.
    """
    refuse_not_finite(inputs, name, columns)
    if scaling.low is not None and scaling.high is not None:
        refuse_outside(inputs, scaling.low, scaling.high, name, columns)
