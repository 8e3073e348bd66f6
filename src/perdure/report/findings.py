"""Findings of the doctor: tables for the terminal, and the section and pictures of the page."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from perdure.experiment.finding_rows import finding_of
from perdure.experiment.overrides import changes_in_words
from perdure.experiment.result_schema import FindingResult, Restart, Result
from perdure.report.picture import Picture
from perdure.report.wording import MISSING

if TYPE_CHECKING:
    from rich.table import Table

LINE = "#0f766e"
LIMIT = "#b45309"
NAME = "finding"
"""Beginning of the names of the pictures of findings."""


def findings_table(found: Mapping[str, Sequence[FindingResult]]) -> "Table":
    """Draw the findings of every arm for the terminal, in the order of repair.

    A rule has one line in an arm: its first finding, and the other experiences that have one.

    Args:
        found: findings by the name of the arm.
    """
    drawn = _terminal_table("arm", "cause", "finding", "found", "evidence", "remedy")
    for arm, rows in found.items():
        alike = [[row for row in rows if row["rule"] == rule] for rule in _rules(rows)]
        for number, (row, *others) in enumerate(alike):
            evidence = row["evidence"] + _also(others)
            found_at = finding_of(row).found
            cells = (row["cause"], row["rule"], found_at, evidence, remedy_in_words(row))
            drawn.add_row(*map(_plain, ("" if number else arm, *cells)))
        drawn.add_section()
    return drawn


def _rules(rows: Sequence[FindingResult]) -> list[str]:
    return list(dict.fromkeys(row["rule"] for row in rows))


def _also(others: Sequence[FindingResult]) -> str:
    """Return the experiences, counted from 1, of further findings of a rule."""
    places = sorted({row["experience"] + 1 for row in others if row["experience"] is not None})
    if not places:
        return ""
    noun = "experience" if len(places) == 1 else "experiences"
    return f"; also in {noun} {', '.join(map(str, places))}"


def healing_table(restarts: Sequence[Restart]) -> "Table":
    """Draw the restarts of a run with remedies: settings, and accuracy before and after.

    Args:
        restarts: restarts in their order.
    """
    drawn = _terminal_table("run", "cause", "changes", "arm", "before", "after")
    for restart in restarts:
        head = [_restarted(restart), restart["cause"], changes_in_words(restart["changes"])]
        for arm, values in restart["arms"].items():
            cells = (*head, arm, _number(values["before"]), _number(values["after"]))
            drawn.add_row(*map(_plain, cells))
            head = ["", "", ""]
        drawn.add_section()
    return drawn


def _restarted(restart: Restart) -> str:
    """Return the name of a restart, marked if its remedies were withdrawn."""
    return f"{restart['run']} (worse, withdrawn)" if restart["worse"] else restart["run"]


def _terminal_table(*headers: str) -> "Table":
    from rich import box
    from rich.table import Table

    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for header in headers:
        drawn.add_column(header, overflow="fold")
    return drawn


def _plain(text: str) -> str:
    from rich.markup import escape as without_markup

    return without_markup(text)


def remedy_in_words(row: FindingResult) -> str:
    """Return the advice of a finding, with those settings that it does not name."""
    unnamed = {
        path: value
        for path, value in row["changes"].items()
        if f"{path.rpartition('.')[2]} = " not in row["remedy"]
    }
    return f"{row['remedy']} ({changes_in_words(unnamed)})" if unnamed else row["remedy"]


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"


# --------------------------------------------------------------------------- the page


def findings_section(result: Result, pictures: Sequence[Picture]) -> str:
    """Return the findings of all arms as HTML, each with a picture of its evidence.

    Args:
        result: result of the run.
        pictures: pictures from `finding_pictures`.
    """
    found = [(arm["name"], row) for arm in result["arms"] for row in arm.get("findings", ())]
    if not found:
        return f"{_healing(result)}<p>The doctor has no findings about this run.</p>"
    drawn = {picture.name: picture for picture in pictures}
    items = "".join(
        _article(arm, row, drawn.get(_picture_name(number)))
        for number, (arm, row) in enumerate(found, 1)
    )
    return f"{_healing(result)}{items}"


def _article(arm: str, row: FindingResult, picture: Picture | None) -> str:
    facts = {
        "evidence": row["evidence"],
        "measured": f"{_short(row['measured'])}; threshold {_short(row['threshold'])}",
        "remedy": remedy_in_words(row),
        "source": row["source"],
    }
    told = "".join(f"<dt>{key}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
    figure = (
        ""
        if picture is None
        else f'<div class="paper">{picture.inline_svg()}</div>'
        f"<figcaption>{escape(picture.caption)}</figcaption>"
    )
    title = escape(f"{row['rule']} ({row['cause']}): {arm}, {finding_of(row).found}")
    return f'<figure><h3>{title}</h3><dl class="facts">{told}</dl>{figure}</figure>\n'


def _healing(result: Result) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{escape(_restarted(restart))}</th><td>{escape(restart['cause'])}</td>"
        f"<td>{escape(changes_in_words(restart['changes']))}</td><td>{escape(arm)}</td>"
        f"<td class='number'>{_number(values['before'])}</td>"
        f"<td class='number'>{_number(values['after'])}</td></tr>"
        for restart in result.get("healing", ())
        for arm, values in restart["arms"].items()
    )
    if not rows:
        return ""
    heads = "".join(
        f'<th scope="col">{head}</th>'
        for head in ("run", "cause", "changes", "arm", "before", "after")
    )
    caption = "Restarts with remedies, and the average accuracy of each arm before and after"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table>'
        f"<caption><span>{caption}</span></caption><thead><tr>{heads}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def finding_pictures(result: Result) -> list[Picture]:
    """Draw the evidence of every finding that has a series of measurements."""
    found = [row for arm in result["arms"] for row in arm.get("findings", ())]
    return [
        _drawn(row, _picture_name(number))
        for number, row in enumerate(found, 1)
        if len([value for value in row["series"] if value is not None]) > 1
    ]


def _picture_name(number: int) -> str:
    return f"{NAME}-{number}"


def _drawn(row: FindingResult, name: str) -> Picture:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    values = [float("nan") if value is None else value for value in row["series"]]
    known = [value for value in row["series"] if value is not None]
    figure = Figure(figsize=(5.2, 1.9), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(1, len(values) + 1), values, color=LINE, marker="o", markersize=2.5)
    limit = row["threshold"]
    if limit is not None and min(known) <= limit <= max(known):
        axes.axhline(limit, color=LIMIT, linewidth=0.9, linestyle="--")
    if min(known) > 0 and max(known) > 1000 * min(known):
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(row["rule"])
    return Picture(
        name=name,
        title=row["rule"],
        caption=f"{(row['series_name'] or 'measurements').capitalize()}.",
        alternative=f"Line of {len(values)} measurements: {row['evidence']}",
        figure=figure,
    )


def _short(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
