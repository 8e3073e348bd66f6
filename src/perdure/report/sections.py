"""Sections of the report page: functions from the result to HTML, in which all text is escaped."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, cast

from perdure.experiment.result_schema import MEASURES, ArmResult, Result, TaskResult
from perdure.report.options import shown_options
from perdure.report.picture import Picture
from perdure.report.wording import (
    MISSING,
    SIMULATION,
    attack_name,
    axis_name,
    best,
    by_privacy,
    certificate_name,
    count,
    decimal,
    digits,
    epsilon_number,
    failed_in_words,
    has_own_name,
    phrase,
    points,
    sentence_start,
    terms,
    with_error,
    with_unit,
)

CHANGES = ("forgetting", "backward_transfer", "forward_transfer")
"""Keys among `MEASURES` that are differences of the metric, so that percent become points."""
TITLES = {
    "average_accuracy": "average {metric}",
    "learning_accuracy": "learning {metric}",
    "worst_experience_accuracy": "worst experience",
    "area_under_accuracy": "area under the curve",
}
"""Column titles of keys in `MEASURES` whose title is not the key itself."""
GLOSSARY = (
    (
        "arm",
        "One strategy in one mode, with or without privacy. All arms of a run see the same stream.",
    ),
    (
        "area under the curve",
        "{Value} on the experiences seen so far, averaged over all moments of the stream.",
    ),
    ("average {metric}", "{Value} at the very end, averaged over all experiences."),
    (
        "backward transfer",
        "Change on past experiences since they were learnt; negative if forgotten.",
    ),
    ("worst experience", "{Value} at the very end on the experience with the worst value."),
    (
        "experience",
        "One stage of the stream: data that arrive together and are not available afterwards.",
    ),
    (
        "forgetting",
        "{Points} lost on past experiences between their best moment and the end; lower is better.",
    ),
    (
        "forward transfer",
        "Head start on experiences before they are learnt, over an untrained model.",
    ),
    ("learning {metric}", "{Value} on each experience just after it was learnt, averaged."),
    (
        "robust accuracy",
        "Percent still right when an attacker changes each input within the stated limit.",
    ),
    (
        "strategy",
        "The method against forgetting; for example penalties on change, distillation or replay.",
    ),
    (
        "epsilon (ε)",
        "Limit on the change of the results by one unit. Every use adds to it; lower is better.",
    ),
    (
        "certified accuracy",
        "Percent proved right for every change within the stated radius. Accuracy under any such "
        "attack is at least this; by smoothing, of the vote over noisy copies.",
    ),
    ("delta (δ)", "Small number: about the probability that the promise of epsilon does not hold."),
    ("unit", "The protected unit of the promise: one record, or one client with all its records."),
    (
        "relation",
        "Pairs of data sets that must look alike: add-remove (one unit more or less), or "
        "replace-one.",
    ),
    (
        "accountant",
        "The calculation that adds up all uses; PLD is tight, RDP is a safe overestimate.",
    ),
    (
        "sampling",
        "The choice of records for a step. Poisson: each at random, independently and in secret.",
    ),
    (
        "noise multiplier",
        "Standard deviation of the noise divided by the largest influence of one unit.",
    ),
    ("sampling rate", "The probability that a given record takes part in one step."),
    (
        "trust model",
        "The party that can see raw data or sums without noise, and so must be trusted.",
    ),
    (
        "release",
        "One noisy sum that the holder of the records gave out. Only releases are given out.",
    ),
)


def answer(result: Result) -> str:
    """Return two sentences with the best results without and with privacy."""
    arms = by_privacy(result["arms"])
    task = result["task"]
    free = best([named for named in arms if not named[0]["private"]], task)
    paid = best([named for named in arms if named[0]["private"]], task)
    return (
        f"<p>{_best_without(free, result)}</p>\n<p>{_best_with(paid, free, result)}</p>"
        f"{_failed(result)}"
    )


def _best_without(free: tuple[ArmResult, str] | None, result: Result) -> str:
    if free is None:
        return "No model was measured without privacy."
    arm, label = free
    task = result["task"]
    return (
        f"Without privacy, <strong>{escape(label)}</strong> remembers most: "
        f"<strong>{with_unit(arm['average_accuracy'], task)}</strong> average {task['metric']} "
        f"after {count(result['stream']['experiences'], 'experience')}, with "
        f"{decimal(arm['forgetting'], digits(task))} {points(task)} forgotten{_over(result)}."
    )


def _best_with(
    paid: tuple[ArmResult, str] | None, free: tuple[ArmResult, str] | None, result: Result
) -> str:
    if paid is None or paid[0]["epsilon"] is None:
        return "No model was measured with privacy, so nothing in this run may be called private."
    arm, label = paid
    task = result["task"]
    return (
        f"With privacy, <strong>{escape(label)}</strong> is best at "
        f"<strong>{with_unit(arm['average_accuracy'], task)}</strong>{_price(arm, free, task)}, at "
        f"epsilon {escape(phrase(paid[0]['epsilon']))}."
    )


def _price(arm: ArmResult, free: tuple[ArmResult, str] | None, task: TaskResult) -> str:
    if free is None:
        return ""
    price = (free[0]["average_accuracy"] or 0.0) - (arm["average_accuracy"] or 0.0)
    return (
        f", {decimal(abs(price), digits(task))} {points(task)} {'less' if price >= 0 else 'more'}"
    )


def _over(result: Result) -> str:
    """Return a clause that all numbers are means over seeds; "" for a run with one seed."""
    seeds = len(result["seeds"])
    return f"; all numbers are means over {seeds} seeds" if seeds > 1 else ""


def _failed(result: Result) -> str:
    """Return the list of the trainings that diverged, with the reasons; "" if there are none."""
    failures = [
        f"<li>{escape(each['trial'])}: {escape(each['failure'])}</li>"
        for arm in result["arms"]
        for each in arm["failures"]
    ]
    if not failures:
        return ""
    return (
        '<p class="warning">Trainings that diverged; no number on this page includes them:</p>'
        f"<ul>{''.join(failures)}</ul>"
    )


def arms_table(result: Result) -> str:
    """Return all arms with their numbers, grouped by privacy; the best of each group marked."""
    heads = [_head(name, result["task"]) for name in MEASURES]
    heads.append(
        "robust accuracy<small>%, "
        f"{escape(attack_name(result['attack'])).replace(', ', ',<br>')}</small>"
    )
    if certificate := result.get("certificate"):
        told = escape(certificate_name(certificate)).replace(", ", ",<br>")
        heads.append(f"certified accuracy<small>%, {told}</small>")
    columns = ["strategy", *heads, "epsilon<small>rounded up</small>", "time<small>seconds</small>"]
    body = "".join(_group(result, private) for private in (False, True))
    caption = (
        "Every arm of the run. The best average accuracy of each group is marked with a star. "
        "Below an arm are the options that differ from the defaults of its strategy."
    )
    if len(result["seeds"]) > 1:
        caption += f" Numbers are means ± standard errors of {len(result['seeds'])} seeds."
    return _table(caption, columns, body)


def _head(name: str, task: TaskResult) -> str:
    """Return the head of a column of the table of all arms, with the unit."""
    title = TITLES.get(name, name.replace("_", " ")).format(metric=task["metric"])
    unit = points(task) if name in CHANGES else task["unit"]
    return f"{escape(title)}<small>{escape(unit)}</small>"


def _group(result: Result, private: bool) -> str:
    arms = [named for named in by_privacy(result["arms"]) if named[0]["private"] == private]
    if not arms:
        return ""
    title = "With privacy" if private else "Without privacy"
    measures = _measures(result)
    head = f'<tr><th scope="rowgroup" colspan="{len(measures) + 3}">{title}</th></tr>'
    winner = best(arms, result["task"])
    rows = "".join(
        _arm_row(
            arm,
            label,
            shown_options(arm, result["arms"]),
            measures,
            wins=winner is not None and arm is winner[0],
            places=digits(result["task"]),
        )
        for arm, label in arms
    )
    return f"<tbody>{head}{rows}</tbody>"


def _measures(result: Result) -> list[str]:
    """Return the keys of the measures in the table of all arms, in the order of its columns."""
    certified = ["certified_accuracy"] if result.get("certificate") else []
    return [*MEASURES, "robust_accuracy", *certified]


def _arm_row(
    arm: ArmResult,
    label: str,
    options: Sequence[str],
    measures: Sequence[str],
    *,
    wins: bool,
    places: int,
) -> str:
    """Return the arm's numbers, and a second row with its options where it has any to show."""
    star = (
        '&nbsp;<span class="star" role="img" aria-label="best of its group">★</span>'
        if wins
        else ""
    )
    numbers = cast(Mapping[str, float | None], arm)
    errors = arm["standard_error"]
    values = [with_error(numbers.get(name), errors.get(name), places) for name in measures]
    cells = "".join(f'<td class="number">{value}</td>' for value in values)
    # epsilon takes several lines, so its cell and the time span the row of options, too
    height = ' rowspan="2"' if options else ""
    return (
        f'<tr class="arm{" best" * wins}">'
        f'<th scope="row">{escape(_shown_name(arm))}{star}</th>{cells}'
        f'<td class="epsilon"{height}>{_epsilon_cell(arm)}</td>'
        f'<td class="number"{height}>{decimal(arm["seconds"])}</td></tr>'
        f"{_options_row(options, label, wins, columns=len(measures) + 1)}"
    )


def _shown_name(arm: ArmResult) -> str:
    """Return the name of an arm, with a note on the seeds at which training diverged."""
    name = arm["name"] if has_own_name(arm) else arm["strategy"]
    return f"{name} ({failed_in_words(arm)})" if arm["failures"] else name


def _options_row(options: Sequence[str], label: str, wins: bool, columns: int) -> str:
    if not options:
        return ""
    chips = "".join(f"<li>{escape(option)}</li>" for option in options)
    return (
        f'<tr class="options{" best" * wins}"><td colspan="{columns}">'
        f'<ul class="chips" aria-label="options of {escape(label)}">{chips}</ul></td></tr>'
    )


def _epsilon_cell(arm: ArmResult) -> str:
    epsilon = arm["epsilon"]
    if epsilon is None:
        return "none, no guarantee"
    label = f'<span class="simulated">{SIMULATION}</span>' if epsilon["simulated"] else ""
    return (
        f"<b>{epsilon_number(epsilon['value'])}</b><small>{escape(terms(epsilon))}</small>{label}"
    )


def gallery(result: Result, pictures: Sequence[Picture]) -> str:
    """Return the pictures with captions, and tables of the numbers in the pictures."""
    return "".join(_figure(picture) for picture in pictures) + _numbers_behind(result)


def _figure(picture: Picture) -> str:
    return (
        f"<figure><h3>{escape(picture.title)}</h3>"
        f'<div class="paper">{picture.inline_svg()}</div>'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>\n"
    )


def _numbers_behind(result: Result) -> str:
    tables = "".join(
        _matrix_table(arm, label, result["task"])
        for arm, label in by_privacy(result["arms"])
        if arm["accuracy_matrix"]
    )
    return _details("The numbers behind the pictures", f'<div class="columns">{tables}</div>')


def _matrix_table(arm: ArmResult, label: str, task: TaskResult) -> str:
    matrix = arm["accuracy_matrix"]
    columns = ["after", *(f"exp. {j + 1}" for j in range(len(matrix[0])))]
    body = "".join(
        _row(str(i + 1), [decimal(value, digits(task)) for value in row], "number")
        for i, row in enumerate(matrix)
    )
    name = f"{label}{', private' * arm['private']}: {axis_name(task)}"
    return _table(escape(name), columns, f"<tbody>{body}</tbody>")


def facts(result: Result, config: str | None) -> str:
    """Return the settings of the run, and the command to repeat it."""
    stream = result["stream"]
    federation = result["federation"]
    order = "; ".join(
        f"{i + 1}: {', '.join(map(str, names))}" for i, names in enumerate(stream["classes"])
    )
    kind = (
        f"{stream['name']}, {stream['scenario']}-incremental, "
        f"{count(stream['experiences'], 'experience')}"
    )
    shared = (
        "none: one learner" if federation is None else _listed(federation, without="declared_sizes")
    )
    told = {
        "name": result["name"],
        "seeds": ", ".join(map(str, result["seeds"])),
        "task": f"{result['task']['name']}, measured by {axis_name(result['task'])}",
        "stream": kind,
        "classes of each experience": order,
        "model": _listed(result["model"]),
        "federation": shared,
        "attack behind robust accuracy": _threat_model(result),
        **_certificate_fact(result),
        "strategies": "; ".join(dict.fromkeys(arm["options"] for arm in result["arms"])),
        "versions": _listed(result["environment"]),
    }
    rows = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in told.items()
    )
    return f'<dl class="facts">{rows}</dl>{_declared_sizes(federation)}{_again(result, config)}'


def _threat_model(result: Result) -> str:
    """Return the attack, its losses, and the share of records that hide their gradient from it."""
    attack = result["attack"]
    if attack is None:
        return attack_name(None)
    shares = [
        f"{label} {decimal(share, 1)} %"
        for arm, label in by_privacy(result["arms"])
        if (share := arm.get("zero_gradients")) is not None
    ]
    blind = f"; test records without a gradient: {', '.join(shares)}" if shares else ""
    losses = attack.get("objectives")
    worst = f"; a record must survive {' and '.join(losses)}" if losses else ""
    return f"{attack_name(attack)}{worst}{blind}"


def _certificate_fact(result: Result) -> dict[str, str]:
    """Return the certificate with its radius and records; nothing without one."""
    certificate = result.get("certificate")
    if not certificate:
        return {}
    records = f"at most {count(certificate['records'], 'test record')} of each experience"
    sure = f", wrong with probability {certificate['alpha']:g} per record"
    by_votes = certificate["method"] == "smoothing"
    told = f"{certificate_name(certificate)}; {records}{sure * by_votes}"
    return {"certificate behind certified accuracy": told}


def _declared_sizes(federation: Mapping[str, Any] | None) -> str:
    if not federation or not federation.get("declared_sizes"):
        return ""
    sizes: list[list[int]] = federation["declared_sizes"]
    columns = ["client", *(f"exp. {j + 1}" for j in range(len(sizes[0])))]
    body = "".join(
        _row(str(i), [str(size) for size in row], "number") for i, row in enumerate(sizes)
    )
    caption = (
        "Declared number of records of each client in each experience; clients count from 0. "
        "Declared sizes are public."
    )
    return _details(
        "Declared sizes of the clients", _table(caption, columns, f"<tbody>{body}</tbody>")
    )


def _again(result: Result, config: str | None) -> str:
    if config is None:
        command = f"perdure run {shlex.quote('runs/' + result['name'] + '/config.toml')}"
        return f"<p>To run it again:</p><pre><code>{escape(command)}</code></pre>"
    return (
        "<p>To run it again, save the configuration as <code>config.toml</code> and "
        "type:</p><pre><code>perdure run config.toml</code></pre>"
        + _details("The configuration", f"<pre><code>{escape(config)}</code></pre>")
    )


def glossary(task: TaskResult) -> str:
    """Return the words of the page, explained to someone who has not read the papers."""
    right = task["metric"] == "accuracy"
    words = {
        "metric": task["metric"],
        "Value": "Percent answered right" if right else sentence_start(axis_name(task)),
        "Points": sentence_start(points(task) or task["metric"]),
    }
    told = "".join(
        f"<div><dt>{escape(word.format(**words))}</dt><dd>{escape(text.format(**words))}</dd></div>"
        for word, text in GLOSSARY
    )
    return f'<dl class="glossary">{told}</dl>'


def spending_table(arm: ArmResult, label: str) -> str:
    """Return the charges of an arm as a table."""
    rows = (
        _row(
            entry["purpose"],
            [str(entry["steps"]), f"{entry['noise_multiplier']:g}", f"{entry['sampling_rate']:g}"],
            "number",
        )
        for entry in arm["spending"]
    )
    columns = ["purpose", "steps", "noise multiplier", "sampling rate"]
    return _table(f"Charges of {escape(label)}", columns, f"<tbody>{''.join(rows)}</tbody>")


def _table(caption: str, columns: Iterable[str], body: str) -> str:
    """Return a table that can scroll sideways.

    Caption, columns and body must be escaped before.
    """
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}">'
        f"<table><caption><span>{caption}</span></caption>"
        f"<thead><tr>{head}</tr></thead>{body}</table></div>"
    )


def _row(name: str, cells: Iterable[str], kind: str) -> str:
    inside = "".join(f'<td class="{kind}">{escape(cell)}</td>' for cell in cells)
    return f'<tr><th scope="row">{escape(name)}</th>{inside}</tr>'


def _details(summary: str, inside: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{inside}</details>"


def _listed(mapping: Mapping[str, Any], without: str = "") -> str:
    told = [f"{key.replace('_', ' ')} {value}" for key, value in mapping.items() if key != without]
    return ", ".join(told) or MISSING
