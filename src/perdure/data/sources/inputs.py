"""Conversion and scaling of a user's inputs, by documented rules.

Constants that are computed from records reveal something about them. So constants for scaling are
either declared (a range, or a mean and a deviation that hold for any data of this kind), or
released.
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
    """Interface of a private release of scaling constants: `perdure.privacy.ReleasedScaling`."""

    def constants(
        self, inputs: Tensor, low: Tensor, high: Tensor, *, partition: str, size: int
    ) -> tuple[Tensor, Tensor, tuple[Spent, ...]]:
        """Return noisy mean and deviation, each broadcasting to one row, and the privacy cost."""


Number = float | Sequence[float]
"""One number for all columns or channels, or one number for each."""
Standardise = Literal["declared", "released"] | tuple[Number, Number] | Release
CHANNELS = (1, 3, 4)
"""Numbers of channels of an image that has its channels in the last axis."""


def float_inputs(values: Tensor, name: str, notes: dict[str, None]) -> Tensor:
    """Return inputs (n, ...) float32; images of bytes become (n, channels, h, w) in [0, 1].

    Args:
        values: (n, ...) numbers of any type.
        name: name of the argument and its part, for notes and messages.
        notes: notes about changes to the data, to which new ones are added.

    Raises:
        DataError: if there are no rows or columns, or if bytes are not images.
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
    """Divide bytes by 255; add an axis for one channel, or move the channels to the front."""
    if values.dim() not in (3, 4):
        raise DataError(
            f"{name} are uint8 of shape {tuple(values.shape)}; allowed: images (n, height, width) "
            "or (n, channels, height, width), which are divided by 255; convert other bytes to "
            "float32"
        )
    if values.dim() == 3:
        values = values.unsqueeze(1)
        notes[f"{name} had shape (n, height, width); they now have an axis for one channel"] = None
    elif values.shape[1] not in CHANNELS and values.shape[3] in CHANNELS:
        values = values.permute(0, 3, 1, 2)
        notes[f"{name} had their channels last; they now have them first"] = None
    notes[f"{name} were uint8; they are divided by 255 to float32 from 0 to 1"] = None
    return changed_rows(values, _units_of_bytes)


def _units_of_bytes(values: Tensor) -> Tensor:
    return values.contiguous().float().div_(255)


def byte_range(values: Tensor) -> tuple[Number, Number] | None:
    """Return the range of inputs that follows from their type: (0, 1) for bytes, else None."""
    return (0.0, 1.0) if values.dtype == torch.uint8 else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Scaling:
    """Constants for the standardisation of inputs, and the declared range of the inputs.

        scaled = (value - mean) / deviation

    Args:
        mean: mean, which broadcasts to one row; None if nothing is scaled.
        deviation: standard deviation, in the shape of the mean.
        low: smallest value before scaling, which broadcasts to one row; None if not declared.
        high: largest value before scaling.
    """

    mean: Tensor | None = None
    deviation: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None

    def applied(self, inputs: Tensor) -> Tensor:
        """Scale inputs (n, ...); large inputs are scaled batch by batch."""
        if self.mean is None or self.deviation is None:
            return inputs
        return changed_rows(inputs, self._scaled)

    def _scaled(self, inputs: Tensor) -> Tensor:
        assert self.mean is not None and self.deviation is not None
        return (inputs - self.mean) / self.deviation

    def domain(self, shape: tuple[int, ...]) -> InputDomain | None:
        """Domain of scaled inputs with this shape; None if no range is declared."""
        if self.low is None or self.high is None:
            return None
        # computed like the inputs, so that rounding moves no input out of the range
        low = float(self.applied(self.low).min())
        high = float(self.applied(self.high).max())
        return InputDomain(shape=shape, range=(low, high))


def scaling_of(
    standardise: Standardise | None,
    value_range: tuple[Number, Number] | None,
    shape: tuple[int, ...],
) -> Scaling:
    """Return the declared constants for scaling.

    Args:
        standardise: "declared" scales `value_range` to -1 .. 1, and so does a release, until its
            constants are known; (mean, deviation) are declared constants; None for no scaling.
        value_range: (smallest, largest) value before scaling.
        shape: shape of one input; a sequence of constants has one for each column or channel.

    Raises:
        ConfigError: if constants are missing, not finite or of a wrong length.
    """
    low = high = None
    if value_range is not None:
        low, high = _constants("value_range", value_range, shape)
        if not bool((low < high).all()):
            raise ConfigError.of("value_range", value_range, "(smallest, largest), in this order")
    if standardise is None:
        return Scaling(low=low, high=high)
    if standardise == "released":
        raise ConfigError(
            "standardise = 'released' has no noise; allowed: perdure.privacy.ReleasedScaling("
            "noise_multiplier=20.0, folder='...'), whose noise and ledger you choose"
        )
    if standardise == "declared" or is_release(standardise):
        if low is None or high is None:
            given = standardise if isinstance(standardise, str) else type(standardise).__name__
            allowed = f"{given} together with value_range=(smallest, largest)"
            raise ConfigError.of("standardise", given, allowed)
        return Scaling(mean=(low + high) / 2, deviation=(high - low) / 2, low=low, high=high)
    mean, deviation = _constants("standardise", standardise, shape)
    if not bool((deviation > 0).all()):
        raise ConfigError.of("standardise", standardise, "(mean, deviation), deviation above 0")
    return Scaling(mean=mean, deviation=deviation, low=low, high=high)


def is_release(standardise: object) -> TypeGuard[Release]:
    """Return True if the constants are to be released from the records."""
    return callable(getattr(standardise, "constants", None))


def released_scaling(
    release: Release, scaling: Scaling, records: Records
) -> tuple[Scaling, Records]:
    """Release the constants of training records; the records then carry the privacy cost.

    Guarantee: the guarantee of the release; scaled test records are computed from it.

    Args:
        release: release of the constants.
        scaling: scaling with the declared range.
        records: training records before scaling.
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
    """Return two constants, each in a shape that broadcasts to one input."""
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
        inputs: inputs before scaling.
        scaling: scaling with the declared range.
        name: name of the argument and its part, for the message.
        columns: names of the columns of inputs (n, k), if they have names.

    Raises:
        DataError: names row and column of the first bad value.
    """
    refuse_not_finite(inputs, name, columns)
    if scaling.low is not None and scaling.high is not None:
        refuse_outside(inputs, scaling.low, scaling.high, name, columns)
