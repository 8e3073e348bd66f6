"""Table of a replay for the terminal, readable in 100 columns."""

from collections.abc import Mapping

from rich import box
from rich.table import Table
from rich.text import Text

from perdure.experiment.config import Config
from perdure.privacy.adaptive_clipping import Adaptive
from perdure.privacy.settings import Privacy
from perdure.testing.replay import ReplayResult

SHOWN = 20
"""Most findings of an arm that are listed one by one."""


def replay_table(config: Config, results: Mapping[str, ReplayResult]) -> Table:
    """Draw a table of the largest change of each release, relative to the charged sensitivity.

    There is one row per arm, client and kind of release.

    Args:
        config: config that was replayed.
        results: results of the replay by arm.
    """
    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for header in ("strategy", "clipping", "place", "release"):
        drawn.add_column(header, overflow="fold")
    for header in ("times", "ratio", "unexplained", "unpaid"):
        drawn.add_column(header, justify="right", no_wrap=True)
    clipping = clipping_name(config.privacy)
    names = {arm.name: arm.file for arm in config.arms}
    for arm, result in results.items():
        others = [str(len(result.unexplained)), str(len(result.unpaid))]
        for row in result.releases:
            ratio = Text(f"{row.ratio:.4f}", style="bold" if row.ratio > 1 else "")
            drawn.add_row(
                names[arm], clipping, row.place, row.release, str(row.times), ratio, *others
            )
            others = ["", ""]
        drawn.add_section()
    return drawn


def clipping_name(privacy: Privacy | None) -> str:
    """Name of the clipping: `flat`, `per-layer` or `adaptive`, with bands of correlated noise."""
    if privacy is None:
        return ""
    name = "adaptive" if isinstance(privacy.clipping, Adaptive) else privacy.clipping
    return name if privacy.bands is None else f"{name}, correlated over {privacy.bands} steps"


def findings(results: Mapping[str, ReplayResult]) -> list[str]:
    """List the faults that a replay found: unexplained outputs, and uncharged noise draws."""
    lines = []
    for arm, result in results.items():
        found = [f"{arm}: {name} differs without a release" for name in result.unexplained]
        found += [f"{arm}: {text}" for text in result.unpaid]
        lines += found[:SHOWN]
        if len(found) > SHOWN:
            lines.append(f"{arm}: {len(found) - SHOWN} more")
        if result.holds:
            lines.append(f"{arm}: every change is at most as large as charged")
    return lines
