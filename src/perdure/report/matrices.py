"""Pictures of matrices: a measure on each experience after training on each."""

from typing import TYPE_CHECKING, Any

from perdure.experiment.result_schema import Result, TaskResult
from perdure.report.panels import MOST_CELLS, array, measured, panels_of
from perdure.report.picture import INK, MUTED, Picture
from perdure.report.wording import (
    attack_name,
    axis_name,
    by_privacy,
    decimal,
    is_percent,
    sentence_start,
    with_unit,
)

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HOLE = "#eceff2"
# Light to dark in one hue, so that the order is visible in grey and for any colour vision.
SHADES = ["#f3f6fa", "#b5d0e8", "#5b9bd0", "#1f66ab", "#0a3463"]


def accuracy_matrices(result: Result) -> Picture:
    """Draw the accuracy matrix of every arm."""
    task = result["task"]
    span = span_of(result)
    figure, panels = panels_of(result, 2.45)
    for arm, _, axes in panels:
        shaded = _of_task(axes, array(arm["accuracy_matrix"]), span, task)
    _label_matrices(figure, [axes for *_, axes in panels], shaded, axis_name(task))
    figure.supxlabel(f"{task['metric']} on experience", fontsize=8.5, color=MUTED)
    return Picture(
        name="accuracy_matrix",
        title=f"{sentence_start(task['metric'])} kept and lost over time",
        caption="One matrix per arm. A row, from left to right, has the accuracy on each "
        "experience after training on one. A column, downwards, has the accuracy on one "
        "experience over time. Framed cells are measured directly after training on the "
        "experience; paler cells below them show forgetting.",
        alternative="Heat maps of accuracy per experience, one per arm. " + last_accuracies(result),
        figure=figure,
    )


def _label_matrices(figure: "Figure", axes: "list[Axes]", shaded: Any, name: str) -> None:
    """Add the bar of shades with the name of the measure, and the label of the rows."""
    bar = figure.colorbar(shaded, ax=axes, aspect=50, fraction=0.015, pad=0.015)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    bar.set_label(name)
    figure.supylabel("after training on experience", fontsize=8.5, color=MUTED)


def robust_matrices(result: Result) -> Picture:
    """Draw the matrix of robust accuracy of every arm."""
    figure, panels = panels_of(result, 2.45)
    for arm, _, axes in panels:
        rows = arm.get("robust_matrix") or []
        shaded = _of_task(axes, array(rows), (0.0, 100.0), result["task"])
    _label_matrices(figure, [axes for *_, axes in panels], shaded, "robust accuracy (%)")
    figure.supxlabel("robust accuracy on experience", fontsize=8.5, color=MUTED)
    named = attack_name(result["attack"])
    told = [
        f"{label} {decimal(arm['robust_accuracy'], 1)} %"
        for arm, label in by_privacy(measured(result))
    ]
    return Picture(
        name="robust_matrix",
        title="Robustness kept and lost over time",
        caption=f"Accuracy on the test records of each experience so far under attack ({named}), "
        "one matrix per arm, as above. It is an upper bound: a stronger attack may find more.",
        alternative="Heat maps of robust accuracy per experience, one per arm. Mean at the end: "
        + ", ".join(told)
        + ".",
        figure=figure,
    )


def reason_matrices(result: Result) -> Picture:
    """Draw the rank correlation of explanations with those when each experience was learnt."""
    figure, panels = panels_of(result, 2.45)
    for arm, _, axes in panels:
        rows = arm.get("reason_matrix") or []
        shaded = _matrix(axes, array(rows), (0.0, 1.0), places=2)
    _label_matrices(figure, [axes for *_, axes in panels], shaded, "rank correlation")
    figure.supxlabel("reasons on experience", fontsize=8.5, color=MUTED)
    told = [
        f"{label} {decimal(arm.get('reason_correlation'), 2)}"
        for arm, label in by_privacy(measured(result))
    ]
    return Picture(
        name="reason_matrix",
        title="Reasons kept and lost over time",
        caption="Rank correlation of the explanations of fixed test records, for their right "
        "classes, with the explanations when their experience was learnt, one matrix per arm, as "
        "above. At 1 the model orders the features as then, at 0 the orders have nothing in "
        "common. Accuracy may stay while the reasons change.",
        alternative="Heat maps of rank correlation per experience, one per arm. Mean over earlier "
        "experiences at the end: " + ", ".join(told) + ".",
        figure=figure,
    )


def certified_matrices(result: Result) -> Picture:
    """Draw the matrix of certified accuracy of every arm."""
    figure, panels = panels_of(result, 2.45)
    for arm, _, axes in panels:
        rows = arm.get("certified_matrix") or []
        shaded = _of_task(axes, array(rows), (0.0, 100.0), result["task"])
    _label_matrices(figure, [axes for *_, axes in panels], shaded, "certified accuracy (%)")
    figure.supxlabel("certified accuracy on experience", fontsize=8.5, color=MUTED)
    chosen = result.get("certificate") or {}
    method = str(chosen.get("method", "")).replace("_", " ")
    told = [
        f"{label} {decimal(arm.get('certified_accuracy'), 1)} %"
        for arm, label in by_privacy(measured(result))
    ]
    return Picture(
        name="certified_matrix",
        title="Certified accuracy kept and lost over time",
        caption=f"Share of test records of each experience so far that no attack within "
        f"{chosen.get('epsilon', 0):g} can mislead ({method}), one matrix per arm, as above.",
        alternative="Heat maps of certified accuracy per experience, one per arm. Mean at the "
        f"end: {', '.join(told)}.",
        figure=figure,
    )


def has(result: Result, matrix: str) -> bool:
    """Return True if all trained arms have a matrix of this name."""
    arms = measured(result)
    return bool(arms) and all(arm.get(matrix) for arm in arms)


def span_of(result: Result) -> tuple[float, float]:
    """Return the ends of the metric's axis: 0 to 100 for percent, else 0 to the largest value."""
    import numpy as np

    if is_percent(result["task"]):
        return 0.0, 100.0
    found = np.concatenate([array(arm["accuracy_matrix"]).ravel() for arm in measured(result)])
    found = found[np.isfinite(found)]
    most = float(found.max()) if len(found) else 1.0
    return 0.0, most or 1.0


def _of_task(
    axes: "Axes", values: "np.ndarray[Any, Any]", span: tuple[float, float], task: TaskResult
) -> Any:
    """Draw a matrix of the task's metric; see `_matrix`."""
    places = 0 if is_percent(task) else 2
    return _matrix(axes, values, span, places=places, higher_is_better=task["higher_is_better"])


def _matrix(
    axes: "Axes",
    values: "np.ndarray[Any, Any]",
    span: tuple[float, float],
    *,
    places: int,
    higher_is_better: bool = True,
) -> Any:
    """Draw a matrix with its numbers, and return what the bar of shades needs."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    moments, experiences = values.shape
    # dark is good
    ordered = SHADES if higher_is_better else SHADES[::-1]
    shades = LinearSegmentedColormap.from_list("accuracy", ordered)
    shaded = axes.pcolormesh(
        np.ma.masked_invalid(values),
        cmap=shades,
        vmin=span[0],
        vmax=span[1],
        edgecolors="white",
        linewidth=1.2,
    )
    axes.set_facecolor(HOLE)
    axes.set(xlim=(0, experiences), ylim=(moments, 0), aspect="equal")
    axes.spines[:].set_visible(False)
    _tick_every(axes, experiences, moments)
    for i in range(min(moments, experiences)):
        axes.add_patch(
            Rectangle((i + 0.04, i + 0.04), 0.92, 0.92, fill=False, edgecolor=INK, linewidth=0.9)
        )
    if experiences <= MOST_CELLS and moments <= MOST_CELLS:
        _write_cells(axes, values, span[1], places, higher_is_better=higher_is_better)
    return shaded


def _tick_every(axes: "Axes", experiences: int, moments: int) -> None:
    step = 1 if max(experiences, moments) <= MOST_CELLS else 5
    columns, rows = (range(0, n, step) for n in (experiences, moments))
    axes.set_xticks([i + 0.5 for i in columns], [str(i + 1) for i in columns])
    axes.set_yticks([i + 0.5 for i in rows], [str(i + 1) for i in rows])
    axes.tick_params(length=0)


def _write_cells(
    axes: "Axes",
    values: "np.ndarray[Any, Any]",
    most: float,
    places: int,
    *,
    higher_is_better: bool,
) -> None:
    size = 8.0 if values.shape[1] <= 6 else 6.0
    for (i, j), value in _cells(values):
        share = value / most if higher_is_better else 1 - value / most
        color = "white" if share > 0.58 else INK
        axes.text(
            j + 0.5,
            i + 0.5,
            decimal(value, places),
            ha="center",
            va="center",
            fontsize=size,
            color=color,
        )


def _cells(values: "np.ndarray[Any, Any]") -> list[tuple[tuple[int, int], float]]:
    return [
        ((i, j), float(values[i, j]))
        for i in range(values.shape[0])
        for j in range(values.shape[1])
    ]


def last_accuracies(result: Result) -> str:
    """Return the mean accuracy of every arm at the end, as a sentence."""
    task = result["task"]
    told = [
        f"{label}{' with privacy' * arm['private']} {with_unit(arm['average_accuracy'], task)}"
        for arm, label in by_privacy(measured(result))
    ]
    return f"Average {task['metric']} at the end: {', '.join(told)}."
