"""The challenges of training deep networks: a fault, the rule that names it, and its remedy.

Each row is a healthy set-up, the same with one fault, and the faulty one with one remedy, all as
changes of one config, on real data (digits, where no other set is named). Measures are declared in
`challenge_rows.py`, before anything is run. `recovered` is the share of the loss by the fault that
the remedy wins back, in means over the seeds; `named` counts the seeds in which the doctor names
the fault by one of the rules of the row, among its findings before and in training. A row is met if
the fault costs at least 5 points of its measure (30 % where less is better), if most seeds name it,
and if the remedy wins back at least 80 %. Rows with fewer seeds than asked for are run again.

    python benchmarks/challenges.py --seeds 5 --json benchmarks/results/challenges.json
    python benchmarks/challenges.py --only label-noise --seeds 2
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from challenge_measures import MEASURES, measured
from challenge_rows import BASE, CHALLENGES, Challenge, Changes
from rich.progress import Progress
from rows import Row, options, origin, show, spread, store, stored

COLUMNS = ("challenge", "measure", "healthy", "faulty", "remedied", "recovered", "named", "met")
LEAST_RECOVERED = 0.8
LEAST_POINTS = 5.0
LEAST_SHARE = 0.3

# --------------------------------------------------------------------------- configs


def changed(tables: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
    """Return the tables of a config with some values replaced; None removes a key."""
    result: dict[str, Any] = json.loads(json.dumps(tables))
    for path, value in changes.items():
        *parents, key = path.split(".")
        table = result
        for parent in parents:
            table = table.setdefault(parent, {})
        if value is None:
            table.pop(key, None)
        else:
            table[key] = value
    return result


def set_ups(challenge: Challenge) -> dict[str, dict[str, Any]]:
    """Return the tables of the healthy, the faulty and the remedied config."""
    healthy = changed(BASE, challenge.healthy)
    faulty = changed(healthy, challenge.fault)
    return {"healthy": healthy, "faulty": faulty, "remedied": changed(faulty, challenge.remedy)}


# --------------------------------------------------------------------------- rows


def row_of(challenge: Challenge, seeds: int, tick: Callable[[], None]) -> Row:
    """Run the three set-ups of a challenge with every seed, and compare them."""
    values: dict[str, list[float]] = {}
    accuracies: dict[str, list[float | None]] = {}
    found: dict[str, list[list[str]]] = {}
    for name, tables in set_ups(challenge).items():
        measure = challenge.measure
        if name == "healthy" and measure == "robust_accuracy":
            measure = "average_accuracy"
        each = []
        for seed in range(seeds):
            outcome = measured(
                tables, measure, seed, limits=challenge.limits, examined=name == "faulty"
            )
            each.append(outcome)
            tick()
        values[name] = [value for value, _, _ in each]
        accuracies[name] = [accuracy for _, accuracy, _ in each]
        found[name] = [names for _, _, names in each]
    mean = {name: spread(numbers)[0] for name, numbers in values.items()}
    named = sum(any(rule in names for rule in challenge.rules) for names in found["faulty"])
    return {
        "challenge": challenge.name,
        "title": challenge.challenge,
        "measure": MEASURES[challenge.measure][0],
        **mean,
        "values": values,
        "accuracies": accuracies,
        "findings": found,
        "standard_errors": {name: spread(numbers)[1] for name, numbers in values.items()},
        **judged(challenge, mean, 2 * named > seeds),
        "named": named,
        "rules": list(challenge.rules),
        "limits": {name: dict(limit) for name, limit in challenge.limits.items()},
        "seeds": seeds,
        "fault": dict(challenge.fault),
        "remedy": dict(challenge.remedy),
        "note": challenge.note,
        **origin(),
    }


def judged(challenge: Challenge, mean: Mapping[str, float], named: bool) -> Row:
    """Return the share of the loss that the remedy wins back, and True if the row meets its aim.

    Args:
        challenge: challenge with its measure.
        mean: mean of the measure for each set-up.
        named: True if most seeds name the fault.
    """
    _, higher, _ = MEASURES[challenge.measure]
    lost = mean["healthy"] - mean["faulty"]
    won = mean["remedied"] - mean["faulty"]
    recovered = won / lost if lost else 0.0
    cost = lost if higher else -lost / mean["healthy"]
    enough = cost >= (LEAST_POINTS if higher else LEAST_SHARE)
    return {
        "recovered": recovered,
        "met": bool(enough and recovered >= LEAST_RECOVERED and named),
    }


def main() -> None:
    """Run the challenges that are not stored yet, and print the table."""
    parser = options(__doc__ or "", seeds=5, resumed=True)
    parser.add_argument("--only", nargs="+", help="names of rows to run")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = stored(given.json)
    rows = [row for row in rows if row["seeds"] >= given.seeds]
    done = {row["challenge"] for row in rows}
    left = [
        challenge
        for challenge in CHALLENGES
        if challenge.name not in done and (not given.only or challenge.name in given.only)
    ]
    with Progress() as bar:
        task = bar.add_task("runs", total=3 * given.seeds * len(left))
        for challenge in left:
            rows.append(row_of(challenge, given.seeds, lambda: bar.advance(task)))
            store(given.json, rows)
    show("challenges", rows, COLUMNS)


if __name__ == "__main__":
    main()
