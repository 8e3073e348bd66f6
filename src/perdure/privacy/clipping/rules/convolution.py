"""Norms and clipped sums of per-record gradients of convolutions.

Positions (see `base`) are places of the output.

The input of a place is the patch of the layer's input that it sees. All patches are much larger
than the input; so rows are formed without them, as the weight gradient of one convolution that has
a group for every record.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from perdure.privacy.clipping.norms import at_least, at_least_float32, squared_row_norms
from perdure.privacy.clipping.rules.base import (
    GHOST_COST,
    ClippingRule,
    FormedRows,
    LayerCall,
    RecordGradients,
    ghost_norms,
    sum_of,
    summed,
)
from perdure.types import Params

CHANNELS = 16
"""Input channels that a vectorised convolution takes at a time."""

Sides = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """Settings of a convolution over images; one over sequences is one over images of height 1."""

    ins: int
    outs: int
    kernel: Sides
    stride: Sides
    padding: Sides
    dilation: Sides

    @classmethod
    def of(cls, layer: nn.Module) -> "Geometry":
        """Read them off a layer with numeric padding and one group."""
        assert isinstance(layer, nn.Conv1d | nn.Conv2d)
        settings = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        pairs = [
            (*high, *own)[-2:] for high, own in zip(((1,), (1,), (0,), (1,)), settings, strict=True)
        ]
        return cls(layer.in_channels, layer.out_channels, *pairs)

    @property
    def fan_in(self) -> int:
        """Numbers of the input that one place of the output sees."""
        return self.ins * self.kernel[0] * self.kernel[1]

    def patches(self, x: Tensor) -> Tensor:
        """(n, fan_in, places) of (n, ins, height, width)."""
        return F.unfold(x, self.kernel, self.dilation, self.padding, self.stride)

    def gradients(self, x: Tensor, back: Tensor) -> Tensor:
        """(n, outs, fan_in).

        Gradient of every record's weight, as one convolution with a group a record.
        """
        n = len(x)
        rows = self.gradient(x.flatten(0, 1)[None], back.flatten(0, 1)[None], n)
        return rows.view(n, self.outs, self.fan_in)

    def gradient(self, x: Tensor, back: Tensor, groups: int = 1) -> Tensor:
        """(groups x outs, ins, *kernel): gradient of the weight, summed over records."""
        size = (groups * self.outs, self.ins, *self.kernel)
        answer: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
            x, size, back, self.stride, self.padding, self.dilation, groups
        )
        return answer

    @property
    def lines_up(self) -> bool:
        """True where channels alone do not fill vector registers, but columns of taps do."""
        height, width = self.kernel
        _, columns = self.stride
        fills = self.ins % CHANNELS > 0 and self.ins * columns * height % CHANNELS == 0
        return fills and width % columns == 0 and self.dilation == (1, 1)

    @property
    def lines(self) -> "Geometry":
        """The same convolution with columns of taps as channels.

        There is one for every column that the stride steps over.
        """
        height, width = self.kernel
        _, columns = self.stride
        return Geometry(
            self.ins * columns * height, self.outs, (1, width // columns), (1, 1), (0, 0), (1, 1)
        )

    def to_lines(self, x: Tensor, places: int) -> Tensor:
        """(n, ins x columns x height, ., .).

        The input of `lines`, for an output of `places` columns.
        """
        height, width = self.kernel
        rows, columns = self.stride
        top, left = self.padding
        # below 0 where no place sees the last columns
        right = columns * (places - 1) + width - x.shape[3] - left
        padded = F.pad(x, (left, right, top, top))
        split = padded.view(*padded.shape[:3], -1, columns).permute(0, 1, 4, 2, 3).contiguous()
        taps: Tensor = split.unfold(3, height, rows)
        return taps.permute(0, 1, 2, 5, 3, 4).flatten(1, 3)

    def from_lines(self, weight: Tensor) -> Tensor:
        """(outs, ins, *kernel) from a weight of `lines`."""
        height, width = self.kernel
        _, columns = self.stride
        return weight.view(self.outs, self.ins, columns, height, width // columns).permute(
            0, 1, 3, 4, 2
        )


class ConvolutionRule(ClippingRule):
    """`nn.Conv1d` and `nn.Conv2d`, from (n, in, ...) to (n, out, ...), the cheapest way.

    Several calls are places side by side.
    """

    layers = (nn.Conv1d, nn.Conv2d)

    def covers(self, layer: nn.Module) -> bool:
        """Return whether the layer has one group and pads with a number of zeros."""
        assert isinstance(layer, nn.Conv1d | nn.Conv2d)
        zeros = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return layer.groups == 1 and zeros

    def output_dims(self, layer: nn.Module) -> int:
        """See `ClippingRule`: records, channels, and one or two dimensions of places."""
        assert isinstance(layer, nn.Conv1d | nn.Conv2d)
        return layer.weight.dim()

    def gradients(self, layer: nn.Module, calls: list[LayerCall]) -> RecordGradients:
        """See `ClippingRule`."""
        assert isinstance(layer, nn.Conv1d | nn.Conv2d)
        geometry = Geometry.of(layer)
        fan_in = geometry.fan_in
        outs = geometry.outs
        places = sum(call.back[0, 0].numel() for call in calls)
        ghost = GHOST_COST * places * (fan_in + outs) < fan_in * outs
        images = [LayerCall(_image(call.entered), call.left, _image(call.back)) for call in calls]
        way = ConvGhost if ghost else ConvRows
        return way(geometry, images, layer.bias is not None, layer.weight.shape)


def _image(x: Tensor) -> Tensor:
    return x.unsqueeze(2) if x.dim() == 3 else x


class ConvRows(FormedRows):
    """Per-record gradients that are formed: for small kernels, or many places.

    Args:
        geometry: settings of the convolution.
        calls: its calls, with inputs (n, ins, height, width) and the gradients at their outputs.
        has_bias: whether there is a bias.
        shape: of the layer's weight.
    """

    def __init__(
        self, geometry: Geometry, calls: list[LayerCall], has_bias: bool, shape: torch.Size
    ) -> None:
        self.geometry = geometry
        self.calls = calls
        self.has_bias = has_bias
        self.shape = shape
        self.on_cpu = calls[0].back.device.type == "cpu"
        self.lined = self.on_cpu and geometry.lines_up
        super().__init__(len(calls[0].back), geometry.fan_in * geometry.outs)

    def finished(self, sums: Params) -> Params:
        """See `FormedRows`."""
        weight = self.geometry.from_lines(sums["weight"]) if self.lined else sums["weight"]
        return sums | {"weight": weight.reshape(self.shape)}

    def formed(self, piece: slice) -> Params:
        """See `FormedRows`."""
        flowed = [call.of(piece).flowed() for call in self.calls]
        rows = {"weight": sum_of([self._weights(x, back) for x, back in flowed])}
        return rows | (
            {"bias": sum_of([back.sum((2, 3)) for _, back in flowed])} if self.has_bias else {}
        )

    def _weights(self, x: Tensor, back: Tensor) -> Tensor:
        """(m, out, fan_in).

        Rows of the weight, in an order of their own where the convolution is by lines.
        """
        if self.lined:
            return self.geometry.lines.gradients(self.geometry.to_lines(x, back.shape[3]), back)
        return (
            self.geometry.gradients(x, back)
            if self.on_cpu
            else back.flatten(2) @ self.geometry.patches(x).mT
        )


class ConvGhost:
    """Ghost norms, which need no per-record gradient: for large kernels over few places.

    The bias is small, so the gradients of its n records are formed: (n, outs).

    Args:
        geometry, calls, has_bias, shape: see `ConvRows`.
    """

    def __init__(
        self, geometry: Geometry, calls: list[LayerCall], has_bias: bool, shape: torch.Size
    ) -> None:
        self.geometry = geometry
        self.calls = calls
        self.shape = shape
        # the gradient of a bias is the gradient at the output, summed over all places
        self.bias = (
            sum_of([at_least_float32(call.back).sum((2, 3)) for call in calls])
            if has_bias
            else None
        )
        self.places = sum(call.back[0, 0].numel() for call in calls)

    def squared_norms(self) -> Tensor:
        """See `RecordGradients`."""
        numbers = self.places * (self.geometry.fan_in + self.places)
        width = max(self.geometry.fan_in, self.geometry.outs)
        norms = ghost_norms(self._grams, len(self.calls[0].back), numbers, width)
        return norms if self.bias is None else norms + squared_row_norms(self.bias)[0]

    def weighted(self, factors: Tensor) -> Params:
        """See `RecordGradients`."""
        return summed(len(factors), self.places, lambda piece: self._piece(piece, factors[piece]))

    def _piece(self, piece: slice, factors: Tensor) -> Params:
        """Weighted sums of a piece of the records."""
        flowed = [call.of(piece).flowed() for call in self.calls]
        factors = factors.to(flowed[0][1].dtype)
        parts = [self.geometry.gradient(x, d * factors[:, None, None, None]) for x, d in flowed]
        sums = {"weight": sum_of(parts).view(self.shape)}
        return sums if self.bias is None else sums | {"bias": factors @ self.bias[piece]}

    def _grams(self, piece: slice | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Inner products (m, places, places) of the inputs and of the gradients at the outputs."""
        flowed = [call.of(piece).flowed() for call in self.calls]
        a = torch.cat([self.geometry.patches(at_least(x, dtype)) for x, _ in flowed], 2)
        d = torch.cat([at_least(back, dtype).flatten(2) for _, back in flowed], 2)
        return a.mT @ a, d.mT @ d
