"""Picture of a comparison: every seed of every arm, and the paired differences with intervals."""

from typing import TYPE_CHECKING

from perdure.experiment.comparison import Comparison
from perdure.experiment.paired_statistics import Estimate
from perdure.report.picture import INK, MUTED, STYLE, Picture
from perdure.report.wording import count, decimal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 10.0  # inches
ROW = 0.28  # inches of one arm or difference
FRAME = 1.1  # inches of title, axis and caption
BELOW = 0.24  # of a row
POINTS = "#0072b2"  # Okabe and Ito's blue: it carries on white, in print and for every eye


def comparison_picture(comparison: Comparison, metric: str = "average_accuracy") -> Picture:
    """Draw a metric of all arms: on the left each seed and the mean, on the right the differences.

    Args:
        comparison: comparison of the arms.
        metric: name of the metric to draw.

    Raises:
        ConfigError: for a metric that no arm has.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    values = comparison.values(metric)
    estimates = comparison.estimates(metric)
    paired = [
        (f"{each.arm} − {each.minus}", each.estimate)
        for each in comparison.differences(metric)
        if each.estimate
    ]
    kind = comparison.metrics[metric]
    axis = f"{kind.name}, {kind.unit}" if kind.unit else kind.name
    level = f"{100 * comparison.confidence:g} %"
    with rc_context(STYLE):
        height = FRAME + ROW * max(len(values), len(paired), 2)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        left, *right = figure.subplots(1, 2 if paired else 1, squeeze=False)[0]
        for row, of_arm in enumerate(values.values()):
            # a little below the interval, which would hide them
            seeds = (list(of_arm.values()), [row + BELOW] * len(of_arm))
            left.plot(*seeds, "o", color=MUTED, alpha=0.6, markersize=4, markeredgewidth=0)
        _intervals(left, list(estimates.items()))
        left.set(title="Arms", xlabel=axis)
        for axes in right:
            axes.axvline(0, color=MUTED, linewidth=0.8, linestyle=(0, (4, 2)))
            _intervals(axes, paired)
            axes.set(title="Paired differences", xlabel=f"difference in {axis}")
    return Picture(
        name="comparison",
        title=f"Comparison of {kind.name}",
        caption="Grey points are seeds, blue points means, and lines their "
        f"{level} intervals. On the right are differences at the same seeds; where a line does not "
        "cross the dashed one, the interval has no 0.",
        alternative=_words(comparison, metric),
        figure=figure,
    )


def _intervals(axes: "Axes", rows: list[tuple[str, Estimate]]) -> None:
    """Draw one named confidence interval per row, from the top down."""
    for row, (_, found) in enumerate(rows):
        if found.low is not None and found.high is not None:
            axes.plot([found.low, found.high], [row, row], "-", color=POINTS, linewidth=1.6)
        axes.plot([found.mean], [row], "o", color=POINTS, markersize=5.5, markeredgecolor="white")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelcolor=INK)


def _words(comparison: Comparison, metric: str) -> str:
    """Describe the numbers of the picture in words, for readers who cannot see it."""
    name = comparison.metrics[metric].name
    found = comparison.estimates(metric)
    told = ", ".join(f"{arm} {decimal(each.mean, 2)}" for arm, each in found.items())
    return f"Mean {name} of {count(len(found), 'arm')}: {told}."
