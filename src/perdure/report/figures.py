"""Pictures of a run; matplotlib (without pyplot) is loaded when the first one is drawn."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from perdure.data.plots import stream_figure
from perdure.errors import RunError
from perdure.experiment.result_schema import ArmResult, Result
from perdure.report.findings import finding_pictures
from perdure.report.matrices import (
    accuracy_matrices,
    certified_matrices,
    has,
    last_accuracies,
    reason_matrices,
    robust_matrices,
    span_of,
)
from perdure.report.panels import LONGEST_NAME, MOST_CELLS, array, figure_of, measured, panels_of
from perdure.report.picture import MUTED, STYLE, Picture
from perdure.report.wording import (
    SIMULATION,
    axis_name,
    by_privacy,
    epsilon_number,
    explainer_name,
    terms,
)

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

    Line = tuple[list[str], list[float]]

FAINT = "#e3e7ec"
# Colours of Okabe and Ito that are visible on white; markers and dashes differ, too.
LINES = ["#0072b2", "#d55e00", "#009e73", "#aa4499", "#7a5c00", "#332288"]
MARKERS = ["o", "s", "^", "D", "v", "P"]
DASHES = ["-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.2, 1.2, 1.2))]
LINE_HEIGHT = 0.085  # height of a name beside a line, as a share of the panel's height


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
            accuracy_matrices(result) if measured(result) else None,
            _curves(result) if measured(result) else None,
            robust_matrices(result) if has(result, "robust_matrix") else None,
            certified_matrices(result) if has(result, "certified_matrix") else None,
            reason_matrices(result) if has(result, "reason_matrix") else None,
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


def _curves(result: Result) -> Picture:
    figure, panels = panels_of(result, 2.15, sharex=True, sharey=True)
    for arm, _, axes in panels:
        _experience_lines(axes, array(arm["accuracy_matrix"]), span_of(result))
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
        + last_accuracies(result),
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
    figure = figure_of(3.1)
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


def _last_epsilons(groups: dict[str, list[tuple[ArmResult, str]]]) -> list[str]:
    told = []
    for title, arms in groups.items():
        ends = ", ".join(
            f"{' and '.join(names)} {epsilon_number(line[-1])}" for names, line in _merged(arms)
        )
        told.append(f"At the end, {title.replace(chr(10), '; ')}: {ends}.")
    return told
