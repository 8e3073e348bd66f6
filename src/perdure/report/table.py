"""Table of a finished run for the terminal, readable in 100 columns.

Below its strategy, each arm shows the options that differ from the strategy's defaults.
"""

from collections.abc import Mapping

from rich import box
from rich.table import Table
from rich.text import Text

from perdure.experiment.result_schema import ArmResult, Result, checked
from perdure.report.options import shown_options
from perdure.report.wording import (
    MISSING,
    SIMULATION,
    attack_name,
    axis_name,
    best,
    by_privacy,
    certificate_name,
    decimal,
    digits,
    epsilon_number,
    failed_in_words,
    has_own_name,
    is_percent,
    points,
    terms,
    with_error,
)

UNITS = "epsilon: no unit · time: s"
LONGEST_OPTION = 20
"""Width of an option in columns before it wraps, so that the table fits in 100 columns."""


def table(result: Mapping[str, object]) -> Table:
    """Draw a table with one row per arm, those without privacy first.

    The best average accuracy of each group is in bold.

    Args:
        result: a run's `result.json` as read.

    Raises:
        RunError: if the result has another schema, or is incomplete.
    """
    run = checked(result)
    drawn = _empty(run)
    arms = by_privacy(run["arms"])
    for private in (False, True):
        group = [named for named in arms if named[0]["private"] == private]
        winner = best(group, run["task"])
        for arm, _ in group:
            drawn.add_row(*_cells(arm, run), style="bold" if winner and arm is winner[0] else "")
        drawn.add_section()
    return drawn


def _empty(run: Result) -> Table:
    drawn = Table(
        title=Text(run["name"]),
        title_style="bold",
        caption=Text(_caption(run)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    attack = attack_name(run["attack"]).replace(", ", "\n")
    drawn.add_column("strategy,\nchanged options", overflow="fold", max_width=LONGEST_OPTION)
    drawn.add_column("private")
    metric = run["task"]["metric"].replace(" ", "\n")
    headers: list[str | Text] = [f"average\n{metric}", "forgetting", Text(f"robust\n{attack}")]
    if certificate := run.get("certificate"):
        method, radius = certificate_name(certificate).split(", ")
        headers.append(Text("\n".join(["certified", *method.split(), radius])))
    for header in headers:
        drawn.add_column(header, justify="right", no_wrap=True)
    drawn.add_column("epsilon, rounded up", min_width=len(SIMULATION))
    drawn.add_column("time", justify="right", no_wrap=True)
    return drawn


def _cells(arm: ArmResult, run: Result) -> list[Text]:
    options = "".join(f"\n {option}" for option in shown_options(arm, run["arms"]))
    places = digits(run["task"])
    errors = arm["standard_error"]
    shown_numbers = {
        "average_accuracy": arm["average_accuracy"],
        "forgetting": arm["forgetting"],
        "robust_accuracy": arm["robust_accuracy"],
    }
    if run.get("certificate"):
        shown_numbers["certified_accuracy"] = arm.get("certified_accuracy")
    accuracies = [
        with_error(value, errors.get(name), places).replace(" ", "\n", 1)
        for name, value in shown_numbers.items()
    ]
    others = (
        "yes" if arm["private"] else "no",
        *accuracies,
        _epsilon(arm),
        decimal(arm["seconds"]),
    )
    shown = arm["name"] if has_own_name(arm) else arm["strategy"]
    failed = f"\n {failed_in_words(arm)}" if arm["failures"] else ""
    return [Text.assemble(shown, (failed, "red"), (options, "dim not bold")), *map(Text, others)]


def _caption(run: Result) -> str:
    """Return the line below the table: units of the columns, and the meaning of ±."""
    task = run["task"]
    if is_percent(task):
        certified = ", certified" * bool(run.get("certificate"))
        right = "right " * (task["metric"] == "accuracy")
        told = f"{task['metric']}, robust{certified}: % {right}at the end"
    else:
        better = "higher" if task["higher_is_better"] else "lower"
        told = f"{axis_name(task)}: at the end, {better} is better"
    lost = f"forgetting: {points(task) or task['metric']} lost"
    seeds = run["seeds"]
    several = f" · mean ± standard error of {len(seeds)} seeds" if len(seeds) > 1 else ""
    return f"{told} · {lost} · {UNITS}{several}"


def _epsilon(arm: ArmResult) -> str:
    epsilon = arm["epsilon"]
    if epsilon is None:
        return MISSING
    stated = f"{epsilon_number(epsilon['value'])} {terms(epsilon)}"
    return f"{stated}\n{SIMULATION}" if epsilon["simulated"] else stated
