"""Tables of a comparison, for the terminal and for LaTeX: means of the arms, paired differences."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from perdure.experiment.comparison import Comparison
from perdure.experiment.paired_statistics import Estimate
from perdure.report.wording import MISSING, decimal, epsilon_number
from perdure.tasks import Metric

SHOWN = (
    "average_accuracy",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "robust_accuracy",
    "epsilon",
)
"""Metrics that the table of means shows if they were measured; CSV and JSON files have all."""
DIGITS = {"%": 2, "points": 2, "bytes": 0, "s": 1}
"""Digits after the point by unit; numbers of other units get three."""
ESCAPED = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\u00a0": "~",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "∞": r"$\infty$",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
}


class Grid(NamedTuple):
    """Content of a table as text, to be drawn for the terminal or in LaTeX.

    Args:
        title: line above the table.
        heads: heads of the columns; the first column has names.
        rows: cells of each row.
        best: indices of the rows that are set in bold.
    """

    title: str
    heads: list[str]
    rows: list[list[str]]
    best: frozenset[int]


def comparison_tables(comparison: Comparison, metric: str = "average_accuracy") -> list[Grid]:
    """Return the tables of a comparison: means of the arms, and differences of pairs of arms.

    Args:
        comparison: comparison of the arms.
        metric: metric whose differences and mean ranks are shown.

    Raises:
        ConfigError: for a metric that no arm has.
    """
    tables = [_means(comparison, metric)]
    if len(comparison.values(metric)) > 1:
        tables.append(_differences(comparison, metric))
    return tables


def _means(comparison: Comparison, metric: str) -> Grid:
    """Return the table with a row per arm: seeds, main metrics over the seeds, and mean rank."""
    comparison.values(metric)  # refuse an unknown one
    wanted = dict.fromkeys([*SHOWN, metric])
    shown = {name: comparison.metrics[name] for name in wanted if name in comparison.metrics}
    columns = [_mean_cells(comparison, name) for name in shown]
    ranks = comparison.mean_ranks(metric)
    heads = ["arm", "seeds", *map(_head, shown.values()), "mean rank"]
    rows = [
        [
            arm,
            str(len(of_arm.trials)),
            *(column.get(arm, MISSING) for column in columns),
            decimal(ranks.get(arm)),
        ]
        for arm, of_arm in comparison.arms.items()
    ]
    least = min(ranks.values(), default=None)
    best = frozenset(i for i, arm in enumerate(comparison.arms) if ranks.get(arm) == least)
    title = f"{comparison.stream}: mean ± standard error over seeds"
    return Grid(title, heads, rows, best if least is not None and len(rows) > 1 else frozenset())


def _differences(comparison: Comparison, metric: str) -> Grid:
    """Return the table of paired differences with intervals, in bold where 0 lies outside."""
    measured = comparison.differences(metric)
    kind = comparison.metrics[metric]
    level = f"{100 * comparison.confidence:g}\u00a0% interval"
    unit = f", {kind.unit}" if kind.unit else ""
    rows = []
    best = set()
    for number, difference in enumerate(measured):
        found = difference.estimate
        name = f"{difference.arm} − {difference.minus}"
        if found is None:
            rows.append([name, "0", MISSING, MISSING])
            continue
        rows.append(
            [name, str(len(found.seeds)), _number(found.mean, kind), _interval(found, kind)]
        )
        if found.low is not None and found.high is not None and found.low * found.high > 0:
            best.add(number)
    title = f"Paired differences at the same seeds, {kind.name}{unit}"
    return Grid(title, ["difference", "seeds", "mean", level], rows, frozenset(best))


def terminal_table(grid: Grid) -> Group:
    """Draw a table for the terminal, under its title."""
    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for number, head in enumerate(grid.heads):
        words = Text(head.replace(" ", "\n") if number else head)
        drawn.add_column(
            words, justify="right" if number else "left", no_wrap=bool(number), overflow="fold"
        )
    for number, row in enumerate(grid.rows):
        drawn.add_row(*map(Text, row), style="bold" if number in grid.best else "")
    return Group(Text(grid.title, style="bold"), drawn)


def latex(grids: Iterable[Grid]) -> str:
    r"""Write tables as LaTeX; the document needs `\usepackage{booktabs}`."""
    return "\n".join(["% needs \\usepackage{booktabs}", *map(_tabular, grids)])


def _tabular(grid: Grid) -> str:
    lines = [
        r"\begin{table}",
        r"\centering",
        f"\\caption{{{_escape(grid.title)}}}",
        f"\\begin{{tabular}}{{l{'r' * (len(grid.heads) - 1)}}}",
        r"\toprule",
        _line(grid.heads, _escape),
        r"\midrule",
        *(
            _line(row, _bold if number in grid.best else _escape)
            for number, row in enumerate(grid.rows)
        ),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str], write: Callable[[str], str]) -> str:
    return " & ".join(map(write, cells)) + r" \\"


def _bold(text: str) -> str:
    return f"\\textbf{{{_escape(text)}}}"


def _escape(text: str) -> str:
    return "".join(ESCAPED.get(letter, letter) for letter in text)


def _head(metric: Metric) -> str:
    return f"{metric.name}, {metric.unit}" if metric.unit else metric.name


def _mean_cells(comparison: Comparison, name: str) -> dict[str, str]:
    """Return the cell of each arm for a metric: mean ± standard error, or the largest epsilon."""
    metric = comparison.metrics[name]
    if name == "epsilon":
        values = comparison.values(name)
        return {arm: epsilon_number(max(of_arm.values())) for arm, of_arm in values.items()}
    written = {}
    for arm, found in comparison.estimates(name).items():
        error = found.standard_error
        spread = "" if error is None else f" ± {_number(error, metric)}"
        written[arm] = f"{_number(found.mean, metric)}{spread}"
    return written


def _interval(found: Estimate, metric: Metric) -> str:
    """Write the confidence interval of an estimate; a dash if it has one seed."""
    if found.low is None or found.high is None:
        return MISSING
    return f"{_number(found.low, metric)} to {_number(found.high, metric)}"


def _number(value: float, metric: Metric) -> str:
    return decimal(value, DIGITS.get(metric.unit, 3))
