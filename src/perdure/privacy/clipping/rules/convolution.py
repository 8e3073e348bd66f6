"""Norms and clipped sums of per-record gradients of convolutions.

Positions (see `base`) are places of the output.

The input of a place is the patch of the layer's input that it sees. All patches are much larger
than the input; so rows are formed without them, as the weight gradient of one convolution that has
a group for every record, or as many groups for every record as the layer has.

A convolution over volumes is one over images: the taps along the depth are channels, and the places
along the depth are images whose gradients add up.
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
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


@dataclass(frozen=True)
class Axis:
    """Settings of a convolution along one axis."""

    kernel: int
    stride: int
    padding: int
    dilation: int


@dataclass(frozen=True)
class Geometry:
    """Settings of a convolution over images.

    One over sequences is one over images of height 1, and one over volumes has a depth.

    A transposed convolution is the backward pass of a convolution. So its weight's gradient is that
    of a convolution whose input is the gradient at the layer's output, and whose output's gradient
    is the layer's input.

    Args:
        ins: channels of the input, times taps along the depth.
        outs: channels of the output.
        groups: of channels.
        depth: settings along the depth; None for images.
        transposed: of a transposed convolution.
    """

    ins: int
    outs: int
    kernel: Sides
    stride: Sides
    padding: Sides
    dilation: Sides
    groups: int = 1
    depth: Axis | None = None
    transposed: bool = False

    @classmethod
    def of(cls, layer: nn.Module) -> "Geometry":
        """Read them off a layer with numeric padding."""
        assert isinstance(layer, Convolution | Transposed)
        settings = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        # along the last two axes; a sequence has a height of 1
        kernel, stride, padding, dilation = (
            (*high, *own)[-2:] for high, own in zip(((1,), (1,), (0,), (1,)), settings, strict=True)
        )
        depth = Axis(*(int(own[0]) for own in settings)) if layer.weight.dim() == 5 else None
        transposed = isinstance(layer, Transposed)
        sides = (layer.in_channels, layer.out_channels)
        ins, outs = reversed(sides) if transposed else sides
        taps = depth.kernel if depth else 1
        return cls(
            ins=ins * taps,
            outs=outs,
            kernel=kernel,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=layer.groups,
            depth=depth,
            transposed=transposed,
        )

    @property
    def fan_in(self) -> int:
        """Numbers of the input that one place of the output sees."""
        return self.ins // self.groups * self.kernel[0] * self.kernel[1]

    def places(self, call: LayerCall) -> int:
        """Places of the output of one record."""
        return (call.entered if self.transposed else call.back)[0, 0].numel()

    def images(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        """Input (n, depth, ins, ., .) and gradient (n, depth, outs, ., .) as of a convolution."""
        entered, back = call.flowed()
        x, d = (back, entered) if self.transposed else (entered, back)
        if self.depth is None:
            return _image(x)[:, None], _image(d)[:, None]
        far = (d.shape[2] - 1) * self.depth.stride + 1
        padded = F.pad(x, (0, 0, 0, 0, self.depth.padding, self.depth.padding))
        starts = range(0, self.depth.kernel * self.depth.dilation, self.depth.dilation)
        taps = [padded[:, :, start : start + far : self.depth.stride] for start in starts]
        return torch.stack(taps, 2).movedim(3, 1).flatten(2, 3), d.movedim(2, 1)

    def patches(self, x: Tensor) -> Tensor:
        """(n, groups, fan_in, places) of (n, depth, ins, height, width)."""
        n, depth = x.shape[:2]
        flat = F.unfold(x.flatten(0, 1), self.kernel, self.dilation, self.padding, self.stride)
        split = flat.view(n, depth, self.groups, self.fan_in, -1)
        return split.movedim(1, 3).flatten(3)

    def gradients_by_patches(self, x: Tensor, back: Tensor) -> Tensor:
        """(n, outs, fan_in), see `gradients`, as products of matrices."""
        n = len(x)
        split = back.movedim(1, 2).reshape(n, self.groups, self.outs // self.groups, -1)
        return (split @ self.patches(x).mT).view(n, self.outs, self.fan_in)

    def gradients(self, x: Tensor, back: Tensor) -> Tensor:
        """(n, outs, fan_in).

        Gradient of every record's weight, as one convolution with groups for every record.
        """
        n = len(x)
        rows = self.gradient(_side_by_side(x), _side_by_side(back), n * self.groups)
        return rows.view(n, self.outs, self.fan_in)

    def gradient(self, x: Tensor, back: Tensor, groups: int | None = None) -> Tensor:
        """(channels of `back`, ins, *kernel): gradient of the weight, summed over images."""
        size = (back.shape[1], self.ins // self.groups, *self.kernel)
        answer: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
            x, size, back, self.stride, self.padding, self.dilation, groups or self.groups
        )
        return answer

    @property
    def lines_up(self) -> bool:
        """True where channels alone do not fill vector registers, but columns of taps do."""
        height, width = self.kernel
        _, columns = self.stride
        fills = self.ins % CHANNELS > 0 and self.ins * columns * height % CHANNELS == 0
        whole = width % columns == 0 and self.dilation == (1, 1)
        return fills and whole and self.groups == 1

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
        """(n, depth, ins x columns x height, ., .).

        The input of `lines`, for an output of `places` columns.
        """
        n, depth = x.shape[:2]
        x = x.flatten(0, 1)
        height, width = self.kernel
        rows, columns = self.stride
        top, left = self.padding
        # below 0 where no place sees the last columns
        right = columns * (places - 1) + width - x.shape[3] - left
        padded = F.pad(x, (left, right, top, top))
        split = padded.view(*padded.shape[:3], -1, columns).permute(0, 1, 4, 2, 3).contiguous()
        taps: Tensor = split.unfold(3, height, rows)
        lines = taps.permute(0, 1, 2, 5, 3, 4).flatten(1, 3)
        return lines.view(n, depth, *lines.shape[1:])

    def from_lines(self, weight: Tensor) -> Tensor:
        """(outs, ins, *kernel) from a weight of `lines`."""
        height, width = self.kernel
        _, columns = self.stride
        return weight.view(self.outs, self.ins, columns, height, width // columns).permute(
            0, 1, 3, 4, 2
        )


class ConvolutionRule(ClippingRule):
    """Convolutions, from (n, in, ...) to (n, out, ...), the cheapest way; also transposed ones.

    Several calls are places side by side.
    """

    layers = (
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
    )

    def covers(self, layer: nn.Module) -> bool:
        """Return whether the layer pads with a number of zeros."""
        assert isinstance(layer, Convolution | Transposed)
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)

    def output_dims(self, layer: nn.Module) -> int:
        """See `ClippingRule`: records, channels, and one to three dimensions of places."""
        assert isinstance(layer, Convolution | Transposed)
        return layer.weight.dim()

    def gradients(self, layer: nn.Module, calls: list[LayerCall]) -> RecordGradients:
        """See `ClippingRule`."""
        assert isinstance(layer, Convolution | Transposed)
        geometry = Geometry.of(layer)
        fan_in = geometry.fan_in
        outs = geometry.outs
        places = sum(map(geometry.places, calls))
        few = GHOST_COST * places * (fan_in + outs) < fan_in * outs
        way = ConvGhost if few and geometry.groups == 1 else ConvRows
        return way(geometry, calls, layer.bias is not None, layer.weight.shape)


def _image(x: Tensor) -> Tensor:
    return x.unsqueeze(2) if x.dim() == 3 else x


def _side_by_side(x: Tensor) -> Tensor:
    """(depth, n x channels, ., .) of (n, depth, channels, ., .)."""
    return x.transpose(0, 1).flatten(1, 2)


def _bias_rows(call: LayerCall) -> Tensor:
    """(n, out): the gradient of a bias is the gradient at the output, summed over all places."""
    return at_least_float32(call.back).flatten(2).sum(2)


class ConvRows(FormedRows):
    """Per-record gradients that are formed: for small kernels, or many places.

    Args:
        geometry: settings of the convolution.
        calls: its calls.
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
        calls = [call.of(piece) for call in self.calls]
        rows = {"weight": sum_of([self._weights(*self.geometry.images(call)) for call in calls])}
        return rows | ({"bias": sum_of([*map(_bias_rows, calls)])} if self.has_bias else {})

    def _weights(self, x: Tensor, back: Tensor) -> Tensor:
        """(m, out, fan_in).

        Rows of the weight, in an order of their own where the convolution is by lines.
        """
        if self.lined:
            return self.geometry.lines.gradients(self.geometry.to_lines(x, back.shape[4]), back)
        if self.on_cpu:
            return self.geometry.gradients(x, back)
        return self.geometry.gradients_by_patches(x, back)


class ConvGhost:
    """Ghost norms, which need no per-record gradient: for large kernels over few places.

    The bias is small, so the gradients of its n records are formed: (n, outs).

    Args:
        geometry: see `ConvRows`; one group.
        calls: see `ConvRows`.
        has_bias: see `ConvRows`.
        shape: see `ConvRows`.
    """

    def __init__(
        self, geometry: Geometry, calls: list[LayerCall], has_bias: bool, shape: torch.Size
    ) -> None:
        self.geometry = geometry
        self.calls = calls
        self.shape = shape
        self.bias = sum_of([*map(_bias_rows, calls)]) if has_bias else None
        self.places = sum(map(geometry.places, calls))

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
        images = [self.geometry.images(call.of(piece)) for call in self.calls]
        factors = factors.to(images[0][1].dtype)
        shares = factors[:, None, None, None, None]
        parts = [
            self.geometry.gradient(x.flatten(0, 1), (d * shares).flatten(0, 1)) for x, d in images
        ]
        sums = {"weight": sum_of(parts).view(self.shape)}
        return sums if self.bias is None else sums | {"bias": factors @ self.bias[piece]}

    def _grams(self, piece: slice | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Inner products (m, places, places) of the inputs and of the gradients at the outputs."""
        images = [self.geometry.images(call.of(piece)) for call in self.calls]
        a = torch.cat([self.geometry.patches(at_least(x, dtype))[:, 0] for x, _ in images], 2)
        d = torch.cat([at_least(back, dtype).movedim(1, 2).flatten(2) for _, back in images], 2)
        return a.mT @ a, d.mT @ d
