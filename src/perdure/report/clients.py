"""Clients of a federation: lines for the terminal, and a table of the page."""

from html import escape

from perdure.experiment.result_schema import ClientResult, OverClients, Result, TrialResult

SHOWN = 200
"""Most lines of the table on the page."""
HEADS = ("training", "client", "took part", "sent to it (kB)", "received (kB)", "seconds")


def client_lines(result: Result) -> list[str]:
    """Return one line for each training of a federation: accuracy over clients, and bytes."""
    lines = []
    for trial in _federated(result):
        rows = trial["clients"]
        over = trial.get("accuracy_over_clients")
        robust = trial.get("robust_accuracy_over_clients")
        metric = result["task"]["metric"]
        unit = "%" if result["task"]["unit"] == "%" else ""
        told = (
            f"{metric} over {len(rows)} clients: {_summary(over, unit)}"
            if over
            else f"{len(rows)} clients, whose own test records are not known to the server"
        )
        if robust:
            told += f"; under attack: {_summary(robust, '%')}"
        megabytes = sum(row["bytes_sent"] + row["bytes_received"] for row in rows) / 1e6
        lines.append(f"{trial['trial']}: {told}; {megabytes:.2f} MB sent and received")
    return lines


def _summary(over: OverClients, unit: str) -> str:
    return (
        f"mean {over['mean']:.2f}{unit}, worst {over['worst']:.2f}{unit}, standard deviation "
        f"{over['spread']:.2f}"
    )


def clients_section(result: Result) -> str:
    """Return the table of all clients as HTML; "" without a federation."""
    rows = [(trial["trial"], row) for trial in _federated(result) for row in trial["clients"]]
    if not rows:
        return ""
    summary = "".join(f"<p>{escape(line)}.</p>" for line in client_lines(result))
    attacked = any("robust_accuracy" in row for _, row in rows)
    body = "".join(_html(trial, row, attacked=attacked) for trial, row in rows[:SHOWN])
    more = f"<p>{len(rows) - SHOWN} more are in result.json.</p>" if len(rows) > SHOWN else ""
    names: tuple[str, ...] = (*HEADS, f"{result['task']['metric']} on its own test records")
    if attacked:
        names = (*names, "accuracy under attack (%)")
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    caption = "Clients: exchanges with an accepted reply of those in which they were asked"
    return (
        f'{summary}<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table>'
        f"<caption><span>{caption}. Clients count from 0; bytes are those of the tensors.</span>"
        f"</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{more}"
    )


def _federated(result: Result) -> list[TrialResult]:
    trials = [trial for arm in result["arms"] for trial in arm["seeds"]]
    return [trial for trial in trials if trial.get("clients")]


def _html(trial: str, row: ClientResult, *, attacked: bool) -> str:
    cells = [
        str(row["client"]),
        f"{row['accepted']} of {row['asked']}",
        f"{row['bytes_sent'] / 1000:.1f}",
        f"{row['bytes_received'] / 1000:.1f}",
        _number(row.get("seconds")),
        _number(row["accuracy"]),
        *([_number(row.get("robust_accuracy"))] if attacked else []),
    ]
    inside = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<tr><th scope="row">{escape(trial)}</th>{inside}</tr>'


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
