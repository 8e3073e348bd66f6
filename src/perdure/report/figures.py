"""Pictures of a run; matplotlib (without pyplot) is loaded when the first one is drawn."""

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from perdure.data.plots import stream_figure
from perdure.errors import RunError
from perdure.experiment.result_schema import ArmResult, Result, TaskResult
from perdure.report.findings import finding_pictures
from perdure.report.picture import INK, MUTED, STYLE, Picture
from perdure.report.wording import (
    SIMULATION,
    attack_name,
    axis_name,
    by_privacy,
    decimal,
    epsilon_number,
    explainer_name,
    is_percent,
    sentence_start,
    terms,
    with_unit,
)

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Line = tuple[list[str], list[float]]

# inches; panels in a row
WIDTH = 10.0
COLUMNS = 4
FAINT = "#e3e7ec"
HOLE = "#eceff2"
# Light to dark in one hue, so that the order is visible in grey and for any colour vision.
SHADES = ["#f3f6fa", "#b5d0e8", "#5b9bd0", "#1f66ab", "#0a3463"]
# Colours of Okabe and Ito that are visible on white; markers and dashes differ, too.
LINES = ["#0072b2", "#d55e00", "#009e73", "#aa4499", "#7a5c00", "#332288"]
MARKERS = ["o", "s", "^", "D", "v", "P"]
DASHES = ["-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.2, 1.2, 1.2))]
LONGEST_NAME = 26  # characters; a longer line does not fit into a panel
LINE_HEIGHT = 0.085  # height of a name beside a line, as a share of the panel's height
MOST_CELLS = 10  # the cells of a wider matrix have no space for numbers


def pictures(result: Result, run: Path) -> list[Picture]:
    """Draw every picture for which the result has numbers, in the order of the page.

    Args:
        result: checked result of a run.
        run: folder of the run, which has the explanation tensors.

    Raises:
        RunError: if the explanation file is missing, or does not match the result.
    """
    from matplotlib import rc_context

    with rc_context(STYLE):
        drawn = [
            _stream(result),
            _matrices(result) if _measured(result) else None,
            _curves(result) if _measured(result) else None,
            _robust_matrices(result) if _has(result, "robust_matrix") else None,
            _certified_matrices(result) if _has(result, "certified_matrix") else None,
            _epsilons(result),
            _explanations(result, run),
            *finding_pictures(result),
        ]
    return [picture for picture in drawn if picture is not None]


def _stream(result: Result) -> Picture | None:
    told = result["stream"]
    sizes = told.get("declared_sizes")
    if sizes is None:
        return None
    figure = stream_figure(
        classes=told["classes"], sizes=sizes, borders=range(len(sizes)), first_number=1
    )
    return Picture(
        name="stream",
        title="The stream",
        caption="Declared training records of every experience, and its declared classes: the "
        "darker, the more records of a class, if all classes of the experience have as many.",
        alternative=f"Classes and sizes of {told['experiences']} experiences: "
        + "; ".join(f"{size} records" for size in sizes)
        + ".",
        figure=figure,
    )


def _matrices(result: Result) -> Picture:
    task = result["task"]
    span = _span(result)
    figure, panels = _panels(result, 2.45)
    for arm, _, axes in panels:
        shaded = _matrix(axes, array(arm["accuracy_matrix"]), span, task)
    _label_matrices(figure, [axes for *_, axes in panels], shaded, axis_name(task))
    figure.supxlabel(f"{task['metric']} on experience", fontsize=8.5, color=MUTED)
    return Picture(
        name="accuracy_matrix",
        title=f"{sentence_start(task['metric'])} kept and lost over time",
        caption="One matrix per arm. A row, from left to right, has the accuracy on each "
        "experience after training on one. A column, downwards, has the accuracy on one "
        "experience over time. Framed cells are measured directly after training on the "
        "experience; paler cells below them show forgetting.",
        alternative="Heat maps of accuracy per experience, one per arm. "
        + _last_accuracies(result),
        figure=figure,
    )


def _label_matrices(figure: "Figure", axes: "list[Axes]", shaded: Any, name: str) -> None:
    """Add the bar of shades with the name of the measure, and the label of the rows."""
    bar = figure.colorbar(shaded, ax=axes, aspect=50, fraction=0.015, pad=0.015)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    bar.set_label(name)
    figure.supylabel("after training on experience", fontsize=8.5, color=MUTED)


def _robust_matrices(result: Result) -> Picture:
    figure, panels = _panels(result, 2.45)
    for arm, _, axes in panels:
        rows = arm.get("robust_matrix") or []
        shaded = _matrix(axes, array(rows), (0.0, 100.0), result["task"])
    _label_matrices(figure, [axes for *_, axes in panels], shaded, "robust accuracy (%)")
    figure.supxlabel("robust accuracy on experience", fontsize=8.5, color=MUTED)
    named = attack_name(result["attack"])
    told = [
        f"{label} {decimal(arm['robust_accuracy'], 1)} %"
        for arm, label in by_privacy(_measured(result))
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


def _certified_matrices(result: Result) -> Picture:
    figure, panels = _panels(result, 2.45)
    for arm, _, axes in panels:
        rows = arm.get("certified_matrix") or []
        shaded = _matrix(axes, array(rows), (0.0, 100.0), result["task"])
    _label_matrices(figure, [axes for *_, axes in panels], shaded, "certified accuracy (%)")
    figure.supxlabel("certified accuracy on experience", fontsize=8.5, color=MUTED)
    chosen = result.get("certificate") or {}
    method = str(chosen.get("method", "")).replace("_", " ")
    told = [
        f"{label} {decimal(arm.get('certified_accuracy'), 1)} %"
        for arm, label in by_privacy(_measured(result))
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


def _has(result: Result, matrix: str) -> bool:
    """Return True if all trained arms have this matrix of accuracies over time."""
    arms = _measured(result)
    return bool(arms) and all(arm.get(matrix) for arm in arms)


def _span(result: Result) -> tuple[float, float]:
    """Return the ends of the metric's axis: 0 to 100 for percent, else 0 to the largest value."""
    import numpy as np

    if is_percent(result["task"]):
        return 0.0, 100.0
    found = np.concatenate([array(arm["accuracy_matrix"]).ravel() for arm in _measured(result)])
    found = found[np.isfinite(found)]
    most = float(found.max()) if len(found) else 1.0
    return 0.0, most or 1.0


def _matrix(
    axes: "Axes", values: "np.ndarray[Any, Any]", span: tuple[float, float], task: TaskResult
) -> Any:
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    moments, experiences = values.shape
    # dark is good
    ordered = SHADES if task["higher_is_better"] else SHADES[::-1]
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
        _write_cells(axes, values, span, task)
    return shaded


def _tick_every(axes: "Axes", experiences: int, moments: int) -> None:
    step = 1 if max(experiences, moments) <= MOST_CELLS else 5
    columns, rows = (range(0, n, step) for n in (experiences, moments))
    axes.set_xticks([i + 0.5 for i in columns], [str(i + 1) for i in columns])
    axes.set_yticks([i + 0.5 for i in rows], [str(i + 1) for i in rows])
    axes.tick_params(length=0)


def _write_cells(
    axes: "Axes", values: "np.ndarray[Any, Any]", span: tuple[float, float], task: TaskResult
) -> None:
    size = 8.0 if values.shape[1] <= 6 else 6.0
    for (i, j), value in _cells(values):
        share = value / span[1] if task["higher_is_better"] else 1 - value / span[1]
        color = "white" if share > 0.58 else INK
        axes.text(
            j + 0.5,
            i + 0.5,
            decimal(value, 0 if is_percent(task) else 2),
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


def _curves(result: Result) -> Picture:
    figure, panels = _panels(result, 2.15, sharex=True, sharey=True)
    for arm, _, axes in panels:
        _experience_lines(axes, array(arm["accuracy_matrix"]), _span(result))
    handles, names = panels[0][2].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside upper left", ncols=min(len(names), 6), handlelength=2.6
    )
    figure.supxlabel("after training on experience", fontsize=8.5, color=MUTED)
    figure.supylabel(axis_name(result["task"]), fontsize=8.5, color=MUTED)
    return Picture(
        name="accuracy_over_time",
        title="Every experience over time",
        caption="Each coloured line starts when its experience is learnt. A flat line means that "
        "the experience is remembered, a falling line that it is forgotten. The grey band is "
        "the mean over the experiences learnt so far.",
        alternative="Lines of accuracy on every experience over time, one panel per arm. "
        + _last_accuracies(result),
        figure=figure,
    )


def _experience_lines(
    axes: "Axes", values: "np.ndarray[Any, Any]", span: tuple[float, float]
) -> None:
    import numpy as np

    moments, experiences = values.shape
    seen = [
        np.mean(known) if len(known := row[: i + 1][~np.isnan(row[: i + 1])]) else np.nan
        for i, row in enumerate(values)
    ]
    when = range(1, moments + 1)
    axes.plot(
        when,
        seen,
        color="#aab4bf",
        linewidth=5,
        alpha=0.55,
        label="mean so far",
        solid_capstyle="round",
    )
    for j in range(min(experiences, moments)):
        axes.plot(
            when[j:],
            values[j:, j],
            color=LINES[j % len(LINES)],
            marker=MARKERS[j % len(MARKERS)],
            markersize=4,
            linewidth=1.5,
            label=f"experience {j + 1}",
            clip_on=False,
            zorder=3,
        )
    axes.set(ylim=(-0.03 * span[1], 1.03 * span[1]), xlim=(0.8, moments + 0.2))
    if span[1] == 100:
        axes.set_yticks([0, 25, 50, 75, 100])
    axes.set_xticks(list(when)[:: 1 if moments <= MOST_CELLS else 5])
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.tick_params(length=0)


def _epsilons(result: Result) -> Picture | None:
    groups = _same_terms(result)
    if not groups:
        return None
    figure = _figure(3.1)
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (title, arms) in zip(panels, groups.items(), strict=True):
        _epsilon_lines(axes, title, _merged(arms))
    return Picture(
        name="epsilon_over_time",
        title="Privacy spent over time",
        caption="Epsilon of the record or client with the largest epsilon, after each experience. "
        "It never falls, because spent privacy cannot be taken back. Arms with the same "
        "epsilon share one line. Only "
        "arms with the same unit, relation and delta share axes.",
        alternative="Lines of epsilon after each experience. " + " ".join(_last_epsilons(groups)),
        figure=figure,
    )


def _same_terms(result: Result) -> dict[str, list[tuple[ArmResult, str]]]:
    """Group private arms by unit, relation and delta of epsilon: one group for each drawing."""
    groups: dict[str, list[tuple[ArmResult, str]]] = {}
    for arm, label in by_privacy(result["arms"]):
        if arm["epsilon"] and arm["epsilon_over_time"]:
            simulated = f"\n{SIMULATION}" if arm["epsilon"]["simulated"] else ""
            groups.setdefault(terms(arm["epsilon"]) + simulated, []).append((arm, label))
    return groups


def _merged(arms: Sequence[tuple[ArmResult, str]]) -> "list[Line]":
    """Combine arms with equal epsilons at every time into one line with all their names."""
    lines: dict[tuple[float | None, ...], list[str]] = {}
    for arm, label in arms:
        lines.setdefault(tuple(arm["epsilon_over_time"] or ()), []).append(label)
    return [(names, array([list(line)])[0].tolist()) for line, names in lines.items()]


def _epsilon_lines(axes: "Axes", title: str, lines: "list[Line]") -> None:
    moments = max(len(line) for _, line in lines)
    for k, (_, line) in enumerate(lines):
        axes.plot(
            range(1, len(line) + 1),
            line,
            color=LINES[k % len(LINES)],
            marker=MARKERS[k % len(MARKERS)],
            markersize=4.5,
            linewidth=1.7,
            linestyle=DASHES[k % len(DASHES)],
            clip_on=False,
            zorder=3,
        )
    axes.set_title(title, fontsize=9)
    axes.set(xlim=(0.9, moments + 0.1), xlabel="after training on experience", ylabel="epsilon")
    axes.set_ylim(
        0,
        1.08 * max([value for _, line in lines for value in line if 0 < value < 1e9], default=1.0),
    )
    axes.set_xticks(range(1, moments + 1, 1 if moments <= MOST_CELLS else 5))
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.tick_params(length=0)
    _name_line_ends(axes, lines)


def _name_line_ends(axes: "Axes", lines: "list[Line]") -> None:
    """Write the names next to the ends of the lines, moved apart if they would overlap."""
    top = axes.get_ylim()[1]
    ceiling = 1.0 + LINE_HEIGHT / 2
    for k in sorted(range(len(lines)), key=lambda k: -lines[k][1][-1]):
        names, line = lines[k]
        named = fill(f"{', '.join(names)}: {epsilon_number(line[-1])}", LONGEST_NAME)
        # a name is centred at its height, so a name of more lines needs space on both sides
        half = LINE_HEIGHT / 2 * len(named.splitlines())
        height = min(line[-1] / top, ceiling - half)
        ceiling = height - half
        axes.annotate(
            named,
            (1.0, height),
            xycoords="axes fraction",
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            fontweight="bold",
            color=LINES[k % len(LINES)],
        )


def _explanations(result: Result, run: Path) -> Picture | None:
    told = result["explanations"]
    if told is None:
        return None
    from matplotlib import rc_context

    from perdure.explain.plots import heat_maps

    tensors = _read_tensors(run / told["file"])
    inputs = tensors["inputs"]
    values = tensors["values"]
    if len(values) != len(told["moments"]):
        raise RunError(
            f"{run / told['file']} has explanations of {len(values)} moments, but result.json "
            f"names {told['moments']}"
        )
    titles = [f"class {label}" for label in tensors["labels"].tolist()]
    with rc_context({"axes.spines.top": True, "axes.spines.right": True}):
        figure = heat_maps(inputs, list(zip(told["moments"], values, strict=True)), titles)
    return Picture(
        name="explanations",
        title="Explanations before and after",
        caption=f"The arm {told['arm']}, explained with {explainer_name(told['method'])} on a few "
        "test inputs. Red pixels support the class named above, blue pixels oppose it. If the "
        "colours change between the rows, the model uses other pixels than before, even if its "
        "answer is still right.",
        alternative=f"Heat maps of {len(inputs)} inputs ({', '.join(titles)}), arm "
        f"{told['arm']}: " + ", then ".join(told["moments"]) + ".",
        figure=figure,
    )


def _read_tensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read ({error}); run the experiment again") from error
    missing = {"inputs", "labels", "values"} - set(tensors)
    if missing:
        raise RunError(f"{path} has no {', '.join(sorted(missing))}; run the experiment again")
    return tensors


def _figure(height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def _panels(
    result: Result, height: float, *, sharex: bool = False, sharey: bool = False
) -> "tuple[Figure, list[tuple[ArmResult, str, Axes]]]":
    """Make one panel per arm.

    Arms without privacy come first, then arms with privacy, at most `COLUMNS` in a row.
    """
    rows = _rows(result)
    figure = _figure(height * len(rows) + 0.35)
    width = max(len(row) for row in rows)
    grid = figure.subplots(len(rows), width, squeeze=False, sharex=sharex, sharey=sharey)
    panels = []
    for line, row in zip(grid, rows, strict=True):
        for axes, named in zip_longest(line, row):
            if named is None:
                axes.set_visible(False)
                continue
            arm, label = named
            axes.set_title(fill(f"{label}, private" if arm["private"] else label, LONGEST_NAME))
            panels.append((arm, label, axes))
    return figure, panels


def _rows(result: Result) -> list[list[tuple[ArmResult, str]]]:
    arms = by_privacy(_measured(result))
    groups = [
        [named for named in arms if named[0]["private"] == private] for private in (False, True)
    ]
    return [group[k : k + COLUMNS] for group in groups for k in range(0, len(group), COLUMNS)]


def _measured(result: Result) -> list[ArmResult]:
    """Return the arms of which at least one training did not fail."""
    return [arm for arm in result["arms"] if arm["accuracy_matrix"]]


def array(rows: Sequence[Sequence[float | None]]) -> "np.ndarray[Any, Any]":
    """Convert rows of numbers to a float array; null becomes NaN."""
    import numpy as np

    return np.array(
        [[np.nan if value is None else value for value in row] for row in rows], dtype=float
    )


def _last_accuracies(result: Result) -> str:
    task = result["task"]
    told = [
        f"{label}{' with privacy' * arm['private']} {with_unit(arm['average_accuracy'], task)}"
        for arm, label in by_privacy(_measured(result))
    ]
    return f"Average {task['metric']} at the end: {', '.join(told)}."


def _last_epsilons(groups: dict[str, list[tuple[ArmResult, str]]]) -> list[str]:
    told = []
    for title, arms in groups.items():
        ends = ", ".join(
            f"{' and '.join(names)} {epsilon_number(line[-1])}" for names, line in _merged(arms)
        )
        told.append(f"At the end, {title.replace(chr(10), '; ')}: {ends}.")
    return told
