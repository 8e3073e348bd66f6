"""Panels of a picture, one for each arm of a run; matplotlib is loaded when one is drawn."""

from collections.abc import Sequence
from itertools import zip_longest
from textwrap import fill
from typing import TYPE_CHECKING, Any

from perdure.experiment.result_schema import ArmResult, Result
from perdure.report.wording import by_privacy

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# inches; panels in a row
WIDTH = 10.0
COLUMNS = 4
MOST_CELLS = 10  # the cells of a wider matrix have no space for numbers
LONGEST_NAME = 26  # characters; a longer line does not fit into a panel


def figure_of(height: float) -> "Figure":
    """Make an empty figure of the page's width, and a height in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def panels_of(
    result: Result, height: float, *, sharex: bool = False, sharey: bool = False
) -> "tuple[Figure, list[tuple[ArmResult, str, Axes]]]":
    """Make one panel per arm.

    Arms without privacy come first, then arms with privacy, at most `COLUMNS` in a row.
    """
    rows = _rows(result)
    figure = figure_of(height * len(rows) + 0.35)
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
    arms = by_privacy(measured(result))
    groups = [
        [named for named in arms if named[0]["private"] == private] for private in (False, True)
    ]
    return [group[k : k + COLUMNS] for group in groups for k in range(0, len(group), COLUMNS)]


def measured(result: Result) -> list[ArmResult]:
    """Return the arms of which at least one training did not fail."""
    return [arm for arm in result["arms"] if arm["accuracy_matrix"]]


def array(rows: Sequence[Sequence[float | None]]) -> "np.ndarray[Any, Any]":
    """Convert rows of numbers to a float array; null becomes NaN."""
    import numpy as np

    return np.array(
        [[np.nan if value is None else value for value in row] for row in rows], dtype=float
    )
