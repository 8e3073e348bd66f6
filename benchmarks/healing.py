"""Remedies of the doctor beside remedies drawn at random, on the fourteen faults of training.

Each row is one fault with one seed, as changes of a healthy config on the digits. `heal` restarts
it with the remedies of its findings, one cause at a time, at most two times. The other hand draws a
remedy at random from those that rules propose, two times, one on top of the other. A fault is
healed if a restart reaches the mean accuracy of the healthy config, less 2 points. Faults that cost
less than that are not counted. Some faults have no remedy in a config (softmax twice, frozen
parameters, shuffled labels), and count all the same.

    python benchmarks/healing.py --seeds 3 --json benchmarks/results/healing.json
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from challenges import changed
from rich.progress import Progress
from rows import Row, options, origin, show, store, stored

from perdure import PerdureError
from perdure.experiment import heal, parse, run, toml_text
from perdure.utils import generator

RESTARTS = 2
MARGIN = 2.0
"""Points below the healthy accuracy at which a fault counts as healed, or as harmless."""
CHANCE = 10.0
"""Accuracy in percent of a training that diverged."""
HEALTHY: dict[str, Any] = {
    "name": "healing",
    "data": {"name": "digits", "stream": "joint"},
    "model": {"name": "mlp", "hidden": [64, 64]},
    "training": {"optimizer": "Adam", "learning_rate": 3e-3, "epochs": 15, "batch_size": 64},
    "arms": [{"strategy": "naive"}],
}
SPOILT = {"name": "challenge_models:spoilt"}
FAULTS: dict[str, dict[str, Any]] = {
    "learning rate too high": {"training.learning_rate": 1.0},
    "learning rate too low": {"training.learning_rate": 3e-6},
    "vanishing gradient": {"model.hidden": [32] * 16, "model.activation": "tanh"},
    "exploding gradient": {"model": {"name": "challenge_models:large", "scale": 6.0}},
    "dead units": {"model": {**SPOILT, "fault": "dead"}},
    "saturated activation": {"model": {**SPOILT, "fault": "saturated", "activation": "tanh"}},
    "poor initialisation": {"model": {**SPOILT, "fault": "normal"}},
    "label noise": {"data.name": "challenge_data:noisy"},
    "imbalance": {"data.name": "challenge_data:rare"},
    "unscaled input": {"data.name": "challenge_data:unscaled"},
    "softmax twice": {"model": {**SPOILT, "fault": "softmax"}},
    "frozen parameters": {"model": {**SPOILT, "fault": "frozen"}},
    "shuffled labels": {"data.name": "challenge_data:shuffled"},
    "overfitting": {
        "data.name": "challenge_data:few",
        "data.options": {"each": 3},
        "model.hidden": [256, 256],
        "training.epochs": 300,
        "training.batch_size": 16,
    },
}
"""Changes of the healthy config, by the name of the fault."""
REMEDIES: tuple[dict[str, Any], ...] = (
    {"training.learning_rate": 3e-2},
    {"training.learning_rate": 3e-3},
    {"training.learning_rate": 3e-4},
    {"training.max_grad_norm": 1.0},
    {"training.loss": {"name": "generalised_cross_entropy"}},
    {"training.loss": {"name": "balanced_softmax"}},
    {"training.averaging": {"name": "ema"}},
    {"training.reset_optimizer": True},
    {"model.skip": True, "model.activation": "relu"},
    {"model.activation": "leaky_relu"},
    {"model.activation": "relu"},
    {"model.init": "he"},
    {"model.init": "xavier", "model.activation": "relu"},
    {"model.norm": "layer"},
    {"model.dropout": 0.3},
    {"data.options.standardise": [30.0, 110.0]},
)
"""Changes of settings that rules propose, of which the other hand draws."""


def accuracy(tables: Mapping[str, Any], folder: Path) -> float:
    """Train a config, and return its accuracy in percent."""
    text = toml_text(tables)
    found = run(parse(text), text, folder)["arms"][0]["average_accuracy"]
    return CHANCE if found is None else float(found)


def by_doctor(tables: Mapping[str, Any], folder: Path) -> tuple[list[float], list[str]]:
    """Restart a config with the doctor's remedies; return accuracies and the rules of each."""
    healing = heal(toml_text(tables), folder, restarts=RESTARTS)
    afters: list[float] = []
    for restart in healing.restarts:
        (arm,) = restart["arms"].values()
        afters.append(CHANCE if arm["after"] is None else float(arm["after"]))
    return afters, [", ".join(restart["rules"]) for restart in healing.restarts]


def by_chance(
    tables: Mapping[str, Any], folder: Path, draws: torch.Generator
) -> tuple[list[float], list[str]]:
    """Restart a config with random remedies; one that changes nothing or is refused is left out."""
    afters: list[float] = []
    drawn: list[str] = []
    for place in torch.randperm(len(REMEDIES), generator=draws).tolist():
        after = changed(tables, REMEDIES[place])
        if len(afters) == RESTARTS or after == tables:
            continue
        try:
            afters.append(accuracy(after, folder / str(place)))
        except PerdureError:
            continue
        drawn.append(str(REMEDIES[place]))
        tables = after
    return afters, drawn


def measure(fault: str, seed: int, healthy: float) -> Row:
    """Run a fault, and heal it in both ways."""
    tables = changed({**HEALTHY, "seed": seed}, FAULTS[fault])
    with TemporaryDirectory() as name:
        folder = Path(name)
        before = accuracy(tables, folder / "before")
        doctor, rules = by_doctor(tables, folder / "healing")
        draws = generator(seed, "random remedy", fault)
        chance, drawn = by_chance(tables, folder / "chance", draws)
    reached = healthy - MARGIN
    return {
        "fault": fault,
        "seed": seed,
        "healthy": healthy,
        "before": before,
        "hurts": before < reached,
        "doctor": doctor,
        "doctor_rules": rules,
        "doctor_healed": max(doctor, default=before) >= reached,
        "random": chance,
        "random_remedies": drawn,
        "random_healed": max(chance, default=before) >= reached,
        **origin(),
    }


def healthy_accuracy(seeds: int, tick: Callable[[], None]) -> float:
    """Mean accuracy of the healthy config over the seeds."""
    found = []
    for seed in range(seeds):
        with TemporaryDirectory() as name:
            found.append(accuracy({**HEALTHY, "seed": seed}, Path(name) / "healthy"))
        tick()
    return statistics.mean(found)


def summary(rows: Sequence[Row]) -> list[Row]:
    """Count, for each fault and in all, the seeds that it hurts and those that are healed."""
    found = []
    for fault in (*FAULTS, "all"):
        mine = [row for row in rows if row["hurts"] and fault in (row["fault"], "all")]
        found.append(
            {
                "fault": fault,
                "hurt": len(mine),
                "doctor": sum(row["doctor_healed"] for row in mine),
                "random": sum(row["random_healed"] for row in mine),
            }
        )
    return found


def main() -> None:
    """Run every fault with every seed, and print the counts."""
    parser = options(__doc__ or "", seeds=3, resumed=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = stored(args.json)
    done = {(row["fault"], row["seed"]) for row in rows}
    left = [(fault, seed) for seed in range(args.seeds) for fault in FAULTS]
    left = [each for each in left if each not in done]
    with Progress() as bar:
        task = bar.add_task("runs", total=args.seeds + len(left))
        healthy = healthy_accuracy(args.seeds, lambda: bar.advance(task)) if left else 0.0
        for fault, seed in left:
            rows.append(measure(fault, seed, healthy))
            store(args.json, rows)
            bar.advance(task)
    counts = summary(rows)
    show("healed", counts, tuple(counts[0]))


if __name__ == "__main__":
    main()
