"""Clipping rule of convolutions: norms and clipped sums of their per-record gradients.

The positions of a record (see `base`) are the pixels of the layer's output.

The input of an output pixel is the patch of the layer's input that it is computed from. All patches
together are much larger than the input. So per-record gradients are computed without patches, as
the weight gradient of one grouped convolution that has separate groups for every record.

A convolution over volumes is computed as one over images: the kernel's entries along the depth
become channels, and the output positions along the depth become images whose gradients add up.
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
"""Fewest input channels with which a vectorised convolution is efficient."""

Sides = tuple[int, int]
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


@dataclass(frozen=True)
class Axis:
    """Kernel size, stride, padding and dilation of a convolution along one axis."""

    kernel: int
    stride: int
    padding: int
    dilation: int


@dataclass(frozen=True)
class Geometry:
    """Settings of a convolution, written as a convolution over images.

    A convolution over sequences is one over images of height 1; a convolution over volumes has a
    depth.

    A transposed convolution is the backward pass of a convolution. So the gradient of its weight is
    the weight gradient of a convolution whose input is the gradient at the layer's output, and
    whose output gradient is the layer's input.

    Args:
        ins: number of input channels, times the kernel's size along the depth.
        outs: number of output channels.
        kernel: height and width of the kernel.
        stride: stride along height and width.
        padding: padding along height and width.
        dilation: dilation along height and width.
        groups: number of groups of channels.
        depth: settings along the depth; None for images.
        transposed: True for a transposed convolution.
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
        """Read the settings of a layer whose padding is numeric."""
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
        """Number of input values that one output pixel is computed from."""
        return self.ins // self.groups * self.kernel[0] * self.kernel[1]

    def places(self, call: LayerCall) -> int:
        """Number of output pixels of one record."""
        return (call.entered if self.transposed else call.back)[0, 0].numel()

    def images(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        """Input (n, depth, ins, ., .) and gradient at the output (n, depth, outs, ., .)."""
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
        """Patches (n, groups, fan_in, places) of an input (n, depth, ins, height, width)."""
        n, depth = x.shape[:2]
        flat = F.unfold(x.flatten(0, 1), self.kernel, self.dilation, self.padding, self.stride)
        split = flat.view(n, depth, self.groups, self.fan_in, -1)
        return split.movedim(1, 3).flatten(3)

    def gradients_by_patches(self, x: Tensor, back: Tensor) -> Tensor:
        """(n, outs, fan_in) per-record gradients of the weight, as matrix products with patches."""
        n = len(x)
        split = back.movedim(1, 2).reshape(n, self.groups, self.outs // self.groups, -1)
        return (split @ self.patches(x).mT).view(n, self.outs, self.fan_in)

    def gradients(self, x: Tensor, back: Tensor) -> Tensor:
        """Return (n, outs, fan_in) per-record gradients of the weight.

        They are computed by one convolution with separate groups for every record.
        """
        n = len(x)
        rows = self.gradient(_side_by_side(x), _side_by_side(back), n * self.groups)
        return rows.view(n, self.outs, self.fan_in)

    def gradient(self, x: Tensor, back: Tensor, groups: int | None = None) -> Tensor:
        """Return (channels of `back`, ins, *kernel) gradient of the weight, summed over images."""
        size = (back.shape[1], self.ins // self.groups, *self.kernel)
        answer: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
            x, size, back, self.stride, self.padding, self.dilation, groups or self.groups
        )
        return answer

    @property
    def lines_up(self) -> bool:
        """Return True if the channels alone are too few for the vector registers of the processor.

        Then columns of the kernel are turned into channels, if that fills the registers.
        """
        height, width = self.kernel
        _, columns = self.stride
        fills = self.ins % CHANNELS > 0 and self.ins * columns * height % CHANNELS == 0
        whole = width % columns == 0 and self.dilation == (1, 1)
        return fills and whole and self.groups == 1

    @property
    def lines(self) -> "Geometry":
        """Settings of the same convolution with columns of the kernel turned into channels.

        There is one such channel for every column that the stride steps over.
        """
        height, width = self.kernel
        _, columns = self.stride
        return Geometry(
            self.ins * columns * height, self.outs, (1, width // columns), (1, 1), (0, 0), (1, 1)
        )

    def to_lines(self, x: Tensor, places: int) -> Tensor:
        """Return (n, depth, ins x columns x height, ., .) input in the form that `lines` takes.

        `places` is the number of columns of the output.
        """
        n, depth = x.shape[:2]
        x = x.flatten(0, 1)
        height, width = self.kernel
        rows, columns = self.stride
        top, left = self.padding
        # below 0 if no output pixel depends on the last columns
        right = columns * (places - 1) + width - x.shape[3] - left
        padded = F.pad(x, (left, right, top, top))
        split = padded.view(*padded.shape[:3], -1, columns).permute(0, 1, 4, 2, 3).contiguous()
        taps: Tensor = split.unfold(3, height, rows)
        lines = taps.permute(0, 1, 2, 5, 3, 4).flatten(1, 3)
        return lines.view(n, depth, *lines.shape[1:])

    def from_lines(self, weight: Tensor) -> Tensor:
        """Return (outs, ins, *kernel) weight gradient, from the gradient in the form of `lines`."""
        height, width = self.kernel
        _, columns = self.stride
        return weight.view(self.outs, self.ins, columns, height, width // columns).permute(
            0, 1, 3, 4, 2
        )


class ConvolutionRule(ClippingRule):
    """Clip convolutions, from (n, in, ...) to (n, out, ...), also transposed ones.

    The cheaper one of two ways is used. The output pixels of several calls are taken together.
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
        """Return True if the layer pads with a given number of zeros."""
        assert isinstance(layer, Convolution | Transposed)
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)

    def output_dims(self, layer: nn.Module) -> int:
        """Number of dimensions of a batch of outputs: records, channels and one to three axes."""
        assert isinstance(layer, Convolution | Transposed)
        return layer.weight.dim()

    def gradients(self, layer: nn.Module, calls: list[LayerCall]) -> RecordGradients:
        """Choose between `ConvRows` and `ConvGhost` for the calls of a layer, by their cost."""
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
    """Reshape (n, depth, channels, ., .) to (depth, n x channels, ., .)."""
    return x.transpose(0, 1).flatten(1, 2)


def _bias_rows(call: LayerCall) -> Tensor:
    """(n, out) per-record gradients of a bias: gradients at the output, summed over its pixels."""
    return at_least_float32(call.back).flatten(2).sum(2)


class ConvRows(FormedRows):
    """Computed per-record gradients of a convolution, for small kernels or many output pixels.

    Args:
        geometry: settings of the convolution.
        calls: calls of the layer.
        has_bias: True if the layer has a bias.
        shape: shape of the layer's weight.
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
        """Return the summed gradients in the shapes of the parameters."""
        weight = self.geometry.from_lines(sums["weight"]) if self.lined else sums["weight"]
        return sums | {"weight": weight.reshape(self.shape)}

    def formed(self, piece: slice) -> Params:
        """Compute the gradients of some records in weight and bias."""
        calls = [call.of(piece) for call in self.calls]
        rows = {"weight": sum_of([self._weights(*self.geometry.images(call)) for call in calls])}
        return rows | ({"bias": sum_of([*map(_bias_rows, calls)])} if self.has_bias else {})

    def _weights(self, x: Tensor, back: Tensor) -> Tensor:
        """Return (m, out, fan_in) per-record gradients of the weight.

        With columns of the kernel as channels, the last axis has another order.
        """
        if self.lined:
            return self.geometry.lines.gradients(self.geometry.to_lines(x, back.shape[4]), back)
        if self.on_cpu:
            return self.geometry.gradients(x, back)
        return self.geometry.gradients_by_patches(x, back)


class ConvGhost:
    """Ghost norms of a convolution, for large kernels over few output pixels.

    No per-record gradient of the weight is computed. The bias is small, so its per-record gradients
    (n, outs) are.

    Args:
        geometry: settings of the convolution; one group.
        calls: calls of the layer.
        has_bias: True if the layer has a bias.
        shape: shape of the layer's weight.
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
        """Compute the (n,) squared norms of the records' gradients."""
        numbers = self.places * (self.geometry.fan_in + self.places)
        width = max(self.geometry.fan_in, self.geometry.outs)
        norms = ghost_norms(self._grams, len(self.calls[0].back), numbers, width)
        return norms if self.bias is None else norms + squared_row_norms(self.bias)[0]

    def weighted(self, factors: Tensor) -> Params:
        """Sum the per-record gradients times factors (n,), by parameter name."""
        return summed(len(factors), self.places, lambda piece: self._piece(piece, factors[piece]))

    def _piece(self, piece: slice, factors: Tensor) -> Params:
        """Compute the weighted sums over one slice of the records."""
        images = [self.geometry.images(call.of(piece)) for call in self.calls]
        factors = factors.to(images[0][1].dtype)
        shares = factors[:, None, None, None, None]
        parts = [
            self.geometry.gradient(x.flatten(0, 1), (d * shares).flatten(0, 1)) for x, d in images
        ]
        sums = {"weight": sum_of(parts).view(self.shape)}
        return sums if self.bias is None else sums | {"bias": factors @ self.bias[piece]}

    def _grams(self, piece: slice | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(m, places, places) inner products of patches, and of gradients at output pixels."""
        images = [self.geometry.images(call.of(piece)) for call in self.calls]
        a = torch.cat([self.geometry.patches(at_least(x, dtype))[:, 0] for x, _ in images], 2)
        d = torch.cat([at_least(back, dtype).movedim(1, 2).flatten(2) for _, back in images], 2)
        return a.mT @ a, d.mT @ d
