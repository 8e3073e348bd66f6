"""Missing replies of clients in a federation: lines for the terminal, and a table of the page."""

from collections import Counter
from html import escape

from perdure.experiment.result_schema import AbsenceResult, Result

SHOWN = 200
"""Most lines of the table on the page."""


def absence_lines(result: Result) -> list[str]:
    """Return one line for each training in which replies of clients are missing."""
    lines = []
    for trial, rows in _by_trial(result).items():
        count = Counter((row["client"], row["cause"]) for row in rows)
        parts = [f"client {client} {cause} {times}x" for (client, cause), times in count.items()]
        lines.append(f"{trial}: replies are missing: {', '.join(parts)}")
    return lines


def absences_section(result: Result) -> str:
    """Return the table of missing replies as HTML; "" if no reply is missing."""
    rows = [(trial, row) for trial, rows in _by_trial(result).items() for row in rows]
    if not rows:
        return ""
    body = "".join(_html(trial, row) for trial, row in rows[:SHOWN])
    more = f"<p>{len(rows) - SHOWN} more are in result.json.</p>" if len(rows) > SHOWN else ""
    heads = ("training", "experience", "round", "client", "cause", "part of the reply")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    caption = "Replies that are missing, because a client was absent, late, failed, or was rejected"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table><caption>'
        f"<span>{caption}. Clients count from 0.</span></caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>{more}"
    )


def _by_trial(result: Result) -> dict[str, list[AbsenceResult]]:
    trials = [trial for arm in result["arms"] for trial in arm["seeds"]]
    return {trial["trial"]: trial["absences"] for trial in trials if trial.get("absences")}


def _html(trial: str, row: AbsenceResult) -> str:
    number = "consolidation" if row["round"] is None else str(row["round"] + 1)
    cells = (str(row["experience"] + 1), number, str(row["client"]), row["cause"], row["field"])
    inside = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<tr><th scope="row">{escape(trial)}</th>{inside}</tr>'
