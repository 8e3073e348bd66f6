"""Doctor on seeded faults and healthy trainings, beside two doctors with published rules.

Fourteen faults of training, and twelve healthy set-ups of which six chose the thresholds and six
test them, on the embedded digits, with several seeds each; and faults of privacy, federations and
streams. Each row is one run. A fault is rightly named if the first finding, in the order of repair,
is one of the fault's rules. A finding in a healthy run is a false alarm.

Findings come from `examine` before training and from `Monitor` in it. The published rules of
SageMaker Debugger and AutoTrainer watch the same runs at their defaults; they have no order, so a
fault counts as named by them if its rule is among those that were raised. They have no rules for
unscaled input, softmax twice, label noise and shuffled labels; "loss not decreasing" counts for
shuffled labels.

A stopped run goes on: rows that the file has are not run again.

    python benchmarks/doctor.py --seeds 3 --json benchmarks/results/doctor.json
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from doctor_baselines import Published
from doctor_setups import CALIBRATION, FAULTS, HELD_OUT, OTHER_FAULTS, Setup
from rich.progress import Progress
from rows import Row, options, origin, show, store, stored
from torch import Tensor

from perdure import Learner, PerdureError
from perdure.doctor import Finding, Monitor, examine
from perdure.federated import fit_federated

GROUPS: dict[str, tuple[Setup, ...]] = {
    "fault": FAULTS,
    "held out": HELD_OUT,
    "other fault": OTHER_FAULTS,
    "calibration": CALIBRATION,
}
ALIASES = {
    "frozen parameters": {"unchanged parameters"},
    "shuffled labels": {"loss plateau"},
    "imbalance": {"class imbalance"},
    "poor initialisation": {"initial variance"},
}
"""Names of rules of the published doctors that count for a fault, beside the fault's own name."""


def train(setup: Setup, seed: int, callbacks: Sequence[Any], monitor: Monitor) -> Tensor:
    """Train a set-up, and return its accuracy matrix."""
    stream = setup.stream(seed)
    blocks = setup.federation["rounds"] if setup.federation else 1

    def learner(client: int = 0) -> Learner:
        return Learner(
            model=setup.model(seed),
            strategy=setup.strategy,
            optimizer=setup.optimizer,
            privacy=setup.privacy_of(seed),
            seed=seed,
            blocks=blocks,
            callbacks=[monitor, *callbacks],
            **setup.length,
        )

    federation = setup.federation_of(seed)
    if federation is None or setup.clients is None:
        return learner().fit(stream)
    clients = setup.clients(stream, seed)
    return fit_federated(learner, clients, federation, callbacks=[monitor.server])


def measure(group: str, setup: Setup, seed: int) -> Row:
    """Examine and train a set-up with one seed, and return its row."""
    began = time.process_time()
    examined = examine(
        setup.model(seed),
        setup.stream(seed),
        optimizer=setup.optimizer,
        privacy=setup.privacy_of(seed),
        strategy=setup.strategy,
        seed=seed,
        **setup.length,
    )
    monitor = Monitor(examined=examined)
    published = Published()
    failure = accuracy = None
    try:
        matrix = train(setup, seed, [published], monitor)
        accuracy = float(matrix[-1].nanmean())
    except PerdureError as error:
        failure = str(error)
    findings = monitor.findings
    wanted = set(setup.named) | ALIASES.get(setup.name, set())
    return {
        "group": group,
        "setup": setup.name,
        "seed": seed,
        "accuracy": accuracy,
        "failure": failure,
        "findings": list(map(_facts, findings)),
        "named": _is_first(setup, findings),
        "examined_named": _is_first(setup, examined),
        "sagemaker": sorted(published.sagemaker),
        "sagemaker_named": bool(wanted & published.sagemaker),
        "autotrainer": sorted(published.autotrainer),
        "autotrainer_named": bool(wanted & published.autotrainer),
        "seconds": time.process_time() - began,
        **origin(),
    }


def _is_first(setup: Setup, findings: Sequence[Finding]) -> bool:
    """Return True if the first finding is one of the fault's rules."""
    return bool(findings) and findings[0].rule in setup.named


def _facts(finding: Finding) -> dict[str, Any]:
    return {
        "rule": finding.rule,
        "measured": finding.measured,
        "threshold": finding.threshold,
        "experience": finding.experience,
        "evidence": finding.evidence,
    }


def summary(rows: Sequence[Row]) -> list[Row]:
    """Return the counts of each group: faults that were named, or runs with a false alarm."""
    found = []
    for group in GROUPS:
        mine = [row for row in rows if row["group"] == group]
        faulty = "fault" in group
        found.append(
            {
                "group": group,
                "runs": len(mine),
                "counted": "rightly named" if faulty else "with a false alarm",
                "before training": sum(row["examined_named"] for row in mine),
                "perdure": sum(row["named"] if faulty else bool(row["findings"]) for row in mine),
                "sagemaker": sum(
                    row["sagemaker_named"] if faulty else bool(row["sagemaker"]) for row in mine
                ),
                "autotrainer": sum(
                    row["autotrainer_named"] if faulty else bool(row["autotrainer"]) for row in mine
                ),
            }
        )
    return found


def main() -> None:
    """Run every set-up with every seed, and print the counts."""
    parser = options(__doc__ or "", seeds=3, resumed=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = stored(args.json)
    done = {(row["group"], row["setup"], row["seed"]) for row in rows}
    wanted = [
        (group, setup, seed)
        for group, setups in GROUPS.items()
        for seed in range(args.seeds)
        for setup in setups
        if (group, setup.name, seed) not in done
    ]
    with Progress() as progress:
        for group, setup, seed in progress.track(wanted, description="runs"):
            rows.append(measure(group, setup, seed))
            store(args.json, rows)
    show_row = partial(show, columns=("setup", "seed", "accuracy", "first", "named"))
    show_row("runs", [{**row, "first": _first(row)} for row in rows])
    counts = summary(rows)
    show("counts", counts, tuple(counts[0]))


def _first(row: Row) -> str:
    return row["findings"][0]["rule"] if row["findings"] else "-"


if __name__ == "__main__":
    main()
