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
    best,
    by_privacy,
    decimal,
    epsilon_number,
    terms,
)

UNITS = (
    "accuracy, robust: % right at the end · forgetting: points lost · epsilon: no unit · time: s"
)
LONGEST_OPTION = 20
"""Width of an option in columns before it wraps, so that the table fits in 100 columns."""


def table(result: Mapping[str, object]) -> Table:
    """Draw a table with one row per arm, those without privacy first.

    The best average accuracy of each group is in bold.

    Args:
        result: content of a run's `result.json`, in schema 1.

    Raises:
        RunError: if the result has another schema, or is incomplete.
    """
    run = checked(result)
    drawn = _empty(run)
    arms = by_privacy(run["arms"])
    for private in (False, True):
        group = [named for named in arms if named[0]["private"] == private]
        winner = best(group)
        for arm, _ in group:
            drawn.add_row(*_cells(arm, run), style="bold" if winner and arm is winner[0] else "")
        drawn.add_section()
    return drawn


def _empty(run: Result) -> Table:
    drawn = Table(
        title=Text(run["name"]),
        title_style="bold",
        caption=Text(UNITS),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    attack = attack_name(run["attack"]).replace(", ", "\n")
    drawn.add_column("strategy,\nchanged options", overflow="fold", max_width=LONGEST_OPTION)
    drawn.add_column("private")
    for header in ("average\naccuracy", "forgetting", Text(f"robust\n{attack}")):
        drawn.add_column(header, justify="right", no_wrap=True)
    drawn.add_column("epsilon, rounded up", min_width=len(SIMULATION))
    drawn.add_column("time", justify="right", no_wrap=True)
    return drawn


def _cells(arm: ArmResult, run: Result) -> list[Text]:
    options = "".join(f"\n {option}" for option in shown_options(arm, run["arms"]))
    accuracies = [
        decimal(arm[name]) for name in ("average_accuracy", "forgetting", "robust_accuracy")
    ]
    others = (
        "yes" if arm["private"] else "no",
        *accuracies,
        _epsilon(arm),
        decimal(arm["seconds"]),
    )
    return [Text.assemble(arm["strategy"], (options, "dim not bold")), *map(Text, others)]


def _epsilon(arm: ArmResult) -> str:
    epsilon = arm["epsilon"]
    if epsilon is None:
        return MISSING
    stated = f"{epsilon_number(epsilon['value'])} {terms(epsilon)}"
    return f"{stated}\n{SIMULATION}" if epsilon["simulated"] else stated
