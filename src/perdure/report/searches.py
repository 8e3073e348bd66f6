"""Results of a search for settings: the table for the terminal, and the picture of its front."""

from typing import TYPE_CHECKING

from perdure.experiment.config_searches import Tuning
from perdure.experiment.overrides import short_values
from perdure.experiment.searches import Score, Trial
from perdure.report.picture import Picture
from perdure.report.wording import MISSING

if TYPE_CHECKING:
    from rich.table import Table

DOTS = "#94a3b8"
FRONT = "#0f766e"
DEFAULT = "#b45309"


def search_table(found: Tuning) -> "Table":
    """Draw the best trials of a search beside the settings of the config.

    With one goal it has the best trial, with several ones the Pareto front: the trials that no
    other one beats in all goals.

    Args:
        found: result of the search.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    drawn.add_column("trial")
    for goal in found.goals:
        drawn.add_column(goal.replace("_", "\n"), justify="right")
    drawn.add_column("values", overflow="fold")
    if found.default is not None:
        drawn.add_row("default", *_numbers(found.default), Text("those of the config"))
    for trial in _shown(found):
        title = str(trial.number + 1) if found.trials else "best"
        values = Text(short_values(trial.values))
        drawn.add_row(
            title, *_numbers(trial.score), values, style="bold" if trial == found.best else ""
        )
    return drawn


def _shown(found: Tuning) -> list[Trial]:
    if len(found.goals) > 1:
        return sorted(found.front, key=lambda trial: trial.score.values)
    return [found.best] if found.best else []


def _numbers(score: Score) -> list[str]:
    return [MISSING if score.failed else f"{value:.4g}" for value in score.values]


def front_picture(found: Tuning) -> Picture:
    """Draw all trials of a search by their first two goals, with the Pareto front as a line.

    Args:
        found: result of a search with several goals.
    """
    from matplotlib.figure import Figure

    across, up = list(found.goals)[:2]
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    known = [trial.score.values for trial in found.trials if not trial.score.failed]
    axes.scatter([v[0] for v in known], [v[1] for v in known], color=DOTS, s=16, label="trials")
    line = sorted(trial.score.values for trial in found.front)
    axes.plot([v[0] for v in line], [v[1] for v in line], color=FRONT, marker="o", label="front")
    if found.default is not None and not found.default.failed:
        axes.plot(*found.default.values[:2], color=DEFAULT, marker="D", ls="none", label="default")
    axes.set_xlabel(across.replace("_", " "))
    axes.set_ylabel(up.replace("_", " "))
    axes.legend(frameon=False)
    return Picture(
        name="front",
        title="Pareto front of the search",
        caption="Trials that no other one beats in all goals, among all trials.",
        alternative=f"{len(line)} trials on the front of {up} against {across}",
        figure=figure,
    )
