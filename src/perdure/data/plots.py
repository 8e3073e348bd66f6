"""Pictures of streams; matplotlib (without pyplot) is loaded when the first one is drawn."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from perdure.data.experience import Stream

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#333333"
SHADES = ["#d3e3f1", "#5b9bd0", "#1f66ab", "#0a3463"]
"""Colours from light to dark in one hue, so that the order is visible in grey print."""
HOLE = "#f3f5f7"
MOST_TICKS = 12
MOST_BORDERS = 60
"""Most experiences, or stages, between which lines are drawn; more lines would hide the data."""


def plot_stream(stream: Stream) -> "Figure":
    """Draw the classes and the size of every experience.

    The upper part shows the declared number of training records of each experience. The lower part
    shows its declared classes; a darker colour means more records per class, assuming classes of
    equal size. White lines separate the stages.

    >>> plot_stream(stream).savefig("stream.svg")

    Guarantee: the picture shows declared classes and declared sizes only; no record is read. If no
    size was declared, the number of records is already public.

    Args:
        stream: stream to draw.
    """
    return stream_figure(
        classes=[each.classes for each in stream],
        sizes=[each.train.declared_size for each in stream],
        borders=[stage.first for stage in stream.stages],
    )


def stream_figure(
    *,
    classes: Sequence[Sequence[int]],
    sizes: Sequence[int],
    borders: Sequence[int],
    first_number: int = 0,
) -> "Figure":
    """Draw a stream from its declared facts (see `plot_stream`).

    Args:
        classes: declared classes of each experience.
        sizes: declared number of training records of each.
        borders: indices of the experiences that begin a stage.
        first_number: number of the first experience on the axis.
    """
    from matplotlib.figure import Figure

    highest = max(map(max, classes))
    height = 2.0 + min(3.2, 0.17 * (highest + 1))
    figure = Figure(figsize=(7.0, height), layout="constrained")
    top, below = figure.subplots(2, sharex=True, height_ratios=[1.0, height - 1.4])
    edges = [first_number - 0.5 + i for i in range(len(sizes) + 1)]
    top.stairs(sizes, edges, fill=True, color=SHADES[1])
    top.set_ylabel("records", color=INK)
    top.set_ylim(bottom=0)
    _draw_classes(below, classes, sizes, edges, highest + 1)
    below.set(xlabel="experience", ylabel="class", xlim=(edges[0], edges[-1]))
    if len(borders) <= MOST_BORDERS:
        for axes in (top, below):
            for index in borders[1:]:
                axes.axvline(edges[index], color="white", linewidth=1.2)
    for axes in (top, below):
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, colors=INK, labelsize=8)
    return figure


def _draw_classes(
    axes: "Axes",
    classes: Sequence[Sequence[int]],
    sizes: Sequence[int],
    edges: Sequence[float],
    count: int,
) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import MaxNLocator

    shares = torch.full((count, len(classes)), torch.nan)
    for index, (own, size) in enumerate(zip(classes, sizes, strict=True)):
        shares[list(own), index] = size / len(own)
    axes.set_facecolor(HOLE)
    axes.pcolormesh(
        edges,
        [label - 0.5 for label in range(count + 1)],
        shares.numpy(),
        cmap=LinearSegmentedColormap.from_list("records of a class", SHADES),
        vmin=0,
        vmax=float(shares.nan_to_num().max()),
        edgecolors="white" if count * len(classes) <= MOST_BORDERS**2 else "none",
        linewidth=0.6,
    )
    axes.set_ylim(count - 0.5, -0.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(MOST_TICKS, integer=True))
