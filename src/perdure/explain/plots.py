"""Pictures of explanations; matplotlib (without pyplot) is loaded when the first is drawn."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perdure.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL_INCHES = 1.25
INK = "#333333"


def heat_maps(
    inputs: Tensor, rows: Sequence[tuple[str, Tensor]], titles: Sequence[str]
) -> "Figure":
    """Draw each input and, below it, its attributions for the explained class over time.

    There is one column per input and one row per time. Positive and negative values have different
    colours. All rows of a column share one scale, so a paler colour means a smaller value.

    Guarantee: none. The picture shows the inputs themselves, which must be public.

    Args:
        inputs: (n, height, width) or (n, channels, height, width) inputs.
        rows: one (label, attributions) per time; attributions have the shape of the inputs, and are
            summed over channels.
        titles: n column titles.

    Raises:
        ConfigError: if shapes or counts do not fit.
    """
    _check(inputs, rows, titles)
    figure, axes = _grid(1 + len(rows), len(inputs))
    maps = torch.stack([_flat(values) for _, values in rows])
    scale = maps.abs().amax((0, 2, 3)).clamp_min(torch.finfo(maps.dtype).tiny).tolist()
    for column, title in enumerate(titles):
        _draw_input(axes[0][column], inputs[column], title)
        for row in range(len(rows)):
            _draw_map(axes[1 + row][column], maps[row, column], scale[column])
    for row, (label, _) in enumerate(rows):
        axes[1 + row][0].set_ylabel(textwrap.fill(label, 16), fontsize=8, color=INK, labelpad=6)
    _draw_key(figure, axes[1:])
    return figure


def _check(inputs: Tensor, rows: Sequence[tuple[str, Tensor]], titles: Sequence[str]) -> None:
    if inputs.ndim not in (3, 4) or len(inputs) == 0:
        shapes = "(n, height, width) or (n, channels, height, width)"
        raise ConfigError.of("inputs.shape", tuple(inputs.shape), shapes)
    if not rows:
        raise ConfigError.of("rows", list(rows), "at least one (label, attributions)")
    for label, values in rows:
        if values.shape != inputs.shape:
            raise ConfigError.of(
                f"rows[{label!r}].shape", tuple(values.shape), f"{tuple(inputs.shape)}"
            )
    if len(titles) != len(inputs):
        raise ConfigError.of("titles", list(titles), f"{len(inputs)} titles, one per input")


def _flat(values: Tensor) -> Tensor:
    """Sum attributions over channels: (n, height, width), on the CPU."""
    values = values.detach().cpu().double()
    return values.sum(1) if values.ndim == 4 else values


def _grid(rows: int, columns: int) -> tuple["Figure", list[list["Axes"]]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (CELL_INCHES * columns + 0.5, CELL_INCHES * rows + 0.7)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = [
        [figure.add_subplot(rows, columns, 1 + row * columns + c) for c in range(columns)]
        for row in range(rows)
    ]
    for axis in (axis for line in axes for axis in line):
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(color="#cccccc", linewidth=0.6)
    return figure, axes


def _draw_input(axis: "Axes", picture: Tensor, title: str) -> None:
    picture = picture.detach().cpu().double()
    axis.set_title(title, fontsize=9, color=INK)
    if picture.ndim == 3 and len(picture) == 3:
        axis.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy())
    else:
        grey = picture.mean(0) if picture.ndim == 3 else picture
        axis.imshow(grey.numpy(), cmap="gray_r", interpolation="nearest")


def _draw_map(axis: "Axes", values: Tensor, scale: float) -> None:
    axis.imshow(values.numpy(), cmap="RdBu_r", vmin=-scale, vmax=scale, interpolation="nearest")


def _draw_key(figure: "Figure", axes: Sequence[Sequence["Axes"]]) -> None:
    """Add one colour bar without numbers, because every column has its own scale.

    Only sign and zero are common to all columns.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    shades = ScalarMappable(norm=Normalize(-1, 1), cmap="RdBu_r")
    every = [axis for line in axes for axis in line]
    key = figure.colorbar(shades, ax=every, location="bottom", aspect=40, fraction=0.05, pad=0.03)
    key.set_ticks([-1, 0, 1], labels=["against", "0", "for"])
    key.ax.tick_params(length=0, labelsize=8, labelcolor=INK)
    key.outline.set_visible(False)
