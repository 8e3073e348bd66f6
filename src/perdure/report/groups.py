"""Measures of groups of records: a table for the terminal, and a section of the report page."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from perdure.experiment.result_schema import ArmResult, GroupResult, Result
from perdure.experiment.seeds import mean
from perdure.report.wording import MISSING

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("arm", "experience", "group", "records", "accuracy", "selected")
GAPS = (
    ("accuracy_difference", "accuracy"),
    ("demographic_parity_difference", "demographic parity"),
    ("equalized_odds_difference", "equalised odds"),
)
"""Keys of differences between groups, and their names."""
CAPTION = (
    "Groups of the public test records at the end of the stream, in percent, as means over seeds. "
    "A finding of unequal groups measures an experience right after its training. "
    "Differences are those of the largest and the smallest group, by fairlearn."
)


def groups_table(result: Result) -> "Table | None":
    """Draw the measures of groups for the terminal; None if the run has none.

    Args:
        result: result of the run.
    """
    rows = group_rows(result)
    if not rows:
        return None
    from rich import box
    from rich.table import Table

    drawn = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        caption=CAPTION,
        caption_justify="left",
    )
    for column in COLUMNS:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    return drawn


def groups_section(result: Result) -> str:
    """Return the measures of groups as an HTML table; "" if the run has none."""
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f'<td class="number">{escape(cell)}</td>' for cell in row[1:])
        + "</tr>"
        for row in group_rows(result)
    )
    if not body:
        return ""
    heads = "".join(f'<th scope="col">{head}</th>' for head in COLUMNS)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{CAPTION}"><table>'
        f"<caption><span>{CAPTION}</span></caption><thead><tr>{heads}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def group_rows(result: Result) -> list[tuple[str, ...]]:
    """Return a row for each arm, experience and group, and one for each difference of groups."""
    rows: list[tuple[str, ...]] = []
    for arm in result["arms"]:
        for number in range(len(result["stream"]["classes"])):
            found = _of_experience(arm, number)
            place = (arm["name"], str(number + 1))
            for group in dict.fromkeys(name for each in found for name in each["records"]):
                rows.append((*place, *_group_cells(found, group)))
            for key, told in GAPS:
                gap = _percent([each[key] for each in found])  # type: ignore[literal-required]
                if found and gap != MISSING:
                    rows.append((*place, f"difference: {told}", "", gap, ""))
    return rows


def _of_experience(arm: ArmResult, number: int) -> list[GroupResult]:
    """Return the measures of one experience, from all seeds that have some."""
    all_seeds = [trial.get("by_group") or [] for trial in arm["seeds"]]
    each = [rows[number] if number < len(rows) else None for rows in all_seeds]
    return [row for row in each if row is not None]


def _group_cells(found: Sequence[GroupResult], group: str) -> tuple[str, str, str, str]:
    rates = [(each["selection_rate"] or {}).get(group) for each in found]
    records = next(each["records"][group] for each in found if group in each["records"])
    accuracies = [each["accuracy"].get(group) for each in found]
    return f"{found[0]['attribute']} {group}", str(records), _percent(accuracies), _percent(rates)


def _percent(shares: Sequence[float | None]) -> str:
    """Return the mean of the shares that are known, in percent."""
    average = mean([share for share in shares if share is not None])
    return MISSING if average is None else f"{100 * average:.1f}"
