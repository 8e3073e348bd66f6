"""The challenges of training deep networks: a fault, the rule that names it, and its remedy.

Each row is a healthy set-up, the same with one fault, and the faulty one with one remedy, all as
changes of one config, on real data (digits, where no other set is named). Its measure is declared
in `CHALLENGES`, before anything is run. `recovered` is the share of the loss by the fault that the
remedy wins back, in means over the seeds; `named` counts the seeds in which the doctor names the
fault by one of the rules of the row, among its findings before and in training.

    python benchmarks/challenges.py --seeds 5 --json benchmarks/results/challenges.json
    python benchmarks/challenges.py --only label-noise --seeds 2
"""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.progress import Progress
from rows import Row, options, origin, show, spread, store, stored

from perdure.experiment import load, parse, run, toml_text

Changes = Mapping[str, object]
"""Paths in a config, such as "training.learning_rate", and their values; None removes a key."""
BASE: dict[str, Any] = {
    "name": "challenge",
    "data": {"name": "digits", "stream": "joint"},
    "model": {"name": "mlp", "hidden": [64]},
    "training": {
        "optimizer": "SGD",
        "learning_rate": 0.05,
        "momentum": 0.9,
        "epochs": 10,
        "batch_size": 32,
    },
    "arms": [{"strategy": "naive"}],
}
COLUMNS = ("challenge", "measure", "healthy", "faulty", "remedied", "recovered", "named", "met")
LEAST_RECOVERED = 0.8
LEAST_POINTS = 5.0
LEAST_SHARE = 0.3


@dataclass(frozen=True, kw_only=True)
class Challenge:
    """One challenge as three set-ups.

    Args:
        name: short name of the row.
        challenge: challenge as the documentation lists it.
        measure: key of an arm's result, or one of `OWN`.
        healthy: changes of `BASE` for the healthy set-up.
        fault: further changes for the faulty set-up.
        remedy: further changes for the remedied set-up.
        rules: names of the doctor's rules that name the fault; empty if no rule can.
        note: remark for the documentation.
    """

    name: str
    challenge: str
    measure: str = "average_accuracy"
    healthy: Changes = field(default_factory=dict)
    fault: Changes
    remedy: Changes
    rules: tuple[str, ...]
    note: str = ""


DEEP = {"model.hidden": [32] * 16, "model.activation": "tanh"}
CNN = {"model.name": "cnn", "model.hidden": None, "model.width": 8}
CLASSES = {"data.stream": "split", "data.scenario": "class", "data.experiences": 5}
CHALLENGES = (
    Challenge(
        name="vanishing-gradients",
        challenge="vanishing gradients",
        healthy={"model.hidden": [32]},
        fault=DEEP,
        remedy={"model.skip": True},
        rules=("vanishing gradient", "initial variance"),
    ),
    Challenge(
        name="exploding-gradients",
        challenge="exploding gradients",
        healthy={"model.hidden": [64, 64]},
        fault={"training.learning_rate": 1.0},
        remedy={"training.max_grad_norm": 0.1},
        rules=("exploding gradient", "learning rate too high", "unstable loss"),
    ),
    Challenge(
        name="overfitting",
        challenge="overfitting",
        healthy={
            "data.name": "challenge_data:noisy",
            "data.options": {"share": 0.3},
            "model.hidden": [256],
        },
        fault={"training.epochs": 60},
        remedy={"training.validation": {"share": 0.15, "patience": 3}},
        rules=("overfitting",),
    ),
    Challenge(
        name="augmentation",
        challenge="data augmentation and preprocessing",
        healthy={**CNN, "model.width": 16, "training.epochs": 30},
        fault={"data.name": "challenge_data:shifted"},
        remedy={"training.views": {"count": 1, "change": "shift_and_flip", "pixels": 1}},
        rules=("overfitting",),
    ),
    Challenge(
        name="preprocessing",
        challenge="data augmentation and preprocessing",
        fault={"data.name": "challenge_data:unscaled"},
        remedy={"model.norm": "layer", "training.optimizer": "Adam", "training.momentum": None},
        rules=("unscaled input",),
    ),
    Challenge(
        name="label-noise",
        challenge="label noise",
        healthy={"model.hidden": [256], "training.epochs": 40},
        fault={"data.name": "challenge_data:noisy"},
        remedy={"training.loss": {"name": "generalised_cross_entropy", "q": 0.7}},
        rules=("label noise",),
    ),
    Challenge(
        name="imbalance",
        challenge="imbalanced data sets",
        fault={"data.name": "challenge_data:imbalanced", "data.options": {"ratio": 30.0}},
        remedy={"training.loss": {"name": "balanced_softmax"}},
        rules=("class imbalance",),
    ),
    Challenge(
        name="convergence",
        challenge="convergence speed",
        healthy={"training.epochs": 2},
        fault={"training.momentum": 0.0, "training.learning_rate": 0.005},
        remedy={"training.momentum": 0.9, "training.learning_rate": 0.05},
        rules=("learning rate too low", "loss plateau", "learning rate range"),
    ),
    Challenge(
        name="activation",
        challenge="activation function selection",
        healthy={"model.hidden": [16, 16, 16], "model.activation": "gelu"},
        fault={"model.activation": "relu", "training.learning_rate": 0.4},
        remedy={"model.activation": "leaky_relu", "training.learning_rate": 0.05},
        rules=("dead units", "saturated activation", "learning rate too high"),
    ),
    Challenge(
        name="optimiser",
        challenge="gradient descent optimisation",
        healthy={"training.optimizer": "Adam", "training.momentum": None},
        fault={
            "data.name": "challenge_data:unscaled",
            "data.options": {"spread": 1.0},
            "training.optimizer": "SGD",
            "training.learning_rate": 1e-4,
        },
        remedy={"training.optimizer": "Adam", "training.learning_rate": 1e-2},
        rules=("unscaled input", "learning rate too low", "loss plateau"),
    ),
    Challenge(
        name="memory",
        challenge="memory constraints",
        measure="step_bytes",
        healthy={**CNN, "training.epochs": 1},
        fault={"training.batch_size": 512},
        remedy={"training.micro_batch_size": 32},
        rules=("memory need",),
    ),
    Challenge(
        name="architecture",
        challenge="architecture design space",
        fault={"model.hidden": [2]},
        remedy={"model.hidden": [64]},
        rules=("cannot overfit", "loss plateau"),
    ),
    Challenge(
        name="adversarial",
        challenge="adversarial attacks",
        measure="robust_accuracy",
        healthy={"model.hidden": [256], "training.epochs": 20},
        fault={"attack": {"name": "pgd", "epsilon": 0.1, "steps": 10, "step_size": 0.025}},
        remedy={
            "training.adversary": {"name": "pgd", "epsilon": 0.1, "steps": 5, "step_size": 0.04}
        },
        rules=(),
        note="The healthy number is the accuracy without an attack.",
    ),
    Challenge(
        name="forgetting",
        challenge="catastrophic forgetting",
        healthy={"data.experiences": 1, **CLASSES, "arms": [{"strategy": "joint"}]},
        fault={"arms": [{"strategy": "naive"}]},
        remedy={"arms": [{"strategy": "replay", "memory_size": 500}]},
        rules=("forgotten experience", "bias to new classes"),
    ),
    Challenge(
        name="long-training",
        challenge="long training times",
        measure="cpu_seconds",
        healthy={**CLASSES, "arms": [{"strategy": "naive"}], "training.epochs": 20},
        fault={"arms": [{"strategy": "joint"}]},
        remedy={"arms": [{"strategy": "er_ace", "memory_size": 200}]},
        rules=(),
    ),
    Challenge(
        name="memory-growth",
        challenge="exploding memory usage",
        measure="state_bytes",
        healthy={**CLASSES, "arms": [{"strategy": "ewc", "strength": 10.0}]},
        fault={"arms": [{"strategy": "ogd"}]},
        remedy={"arms": [{"strategy": "agem", "memory_size": 200}]},
        rules=("growing memory",),
    ),
    Challenge(
        name="schedule",
        challenge="learning rate scheduling",
        healthy={"model.activation": "gelu", "training.learning_rate": 0.1},
        fault={"training.learning_rate": 0.5},
        remedy={"training.schedule": {"name": "CosineAnnealingLR"}},
        rules=("learning rate too high", "unstable loss"),
    ),
    Challenge(
        name="saddle",
        challenge="local minima and saddle points",
        healthy={"model.hidden": [64, 64, 64]},
        fault={"model": {"name": "challenge_data:saddle"}},
        remedy={"model": {"name": "mlp", "hidden": [64, 64, 64], "init": "he"}},
        rules=("initial variance", "vanishing gradient", "loss plateau"),
    ),
    Challenge(
        name="unstable",
        challenge="unstable loss surfaces",
        healthy={"model.activation": "tanh"},
        fault={"training.batch_size": 4, "training.learning_rate": 0.06},
        remedy={"training.averaging": {"name": "swa", "start": 0.5}},
        rules=("unstable loss", "learning rate too high"),
    ),
)


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


# --------------------------------------------------------------------------- measurements


class StepBytes:
    """Count the bytes that steps keep for their backward passes; the largest count of a pass."""

    def __init__(self) -> None:
        self.largest = 0
        self._now = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count a tensor that a pass keeps."""
        self._now += tensor.nbytes
        self.largest = max(self.largest, self._now)
        return tensor

    def counting(self) -> AbstractContextManager[object]:
        """Return a context in which passes are counted."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)

    def unpack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Begin a new count: the backward pass has begun."""
        self._now = 0
        return tensor


def from_result(name: str) -> Callable[[Path, Row, int, float], float]:
    """Return a function that reads a number of a trial's result."""
    return lambda folder, trial, largest, seconds: float(trial[name])


def gap(folder: Path, trial: Row, largest: int, seconds: float) -> float:
    """Accuracy on the training records minus accuracy on the test records, in points."""
    learner = load(folder, trial["trial"])
    return learner.score(learner.stream[0].train) - float(trial["average_accuracy"])


MEASURES: dict[str, tuple[str, bool, Callable[[Path, Row, int, float], float]]] = {
    "average_accuracy": ("accuracy in %", True, from_result("average_accuracy")),
    "robust_accuracy": ("accuracy in %, under attack", True, from_result("robust_accuracy")),
    "state_bytes": ("bytes of the strategy's state", False, from_result("state_bytes")),
    "gap": ("points between training and test accuracy", False, gap),
    "step_bytes": ("bytes kept for a backward pass", False, lambda f, t, largest, s: largest),
    "cpu_seconds": ("seconds of processor time", False, lambda f, t, b, seconds: seconds),
}
"""Measures: unit, direction (True where higher is better), and function."""


def measured(tables: Mapping[str, Any], measure: str, seed: int) -> tuple[float, list[str]]:
    """Run one config, and return its measure and the names of the doctor's findings."""
    text = toml_text(changed(tables, {"seed": seed}))
    count = StepBytes()
    with TemporaryDirectory() as name:
        folder = Path(name) / "run"
        began = time.process_time()
        with count.counting() if measure == "step_bytes" else nullcontext():
            result = run(parse(text), text, folder, examine="full")
        seconds = time.process_time() - began
        trial: Row = dict(result["arms"][0]["seeds"][0])
        if trial["failure"] is not None:
            # a training that diverged answers by chance
            value = 100.0 / 10 if MEASURES[measure][1] else float("nan")
        else:
            value = MEASURES[measure][2](folder, trial, count.largest, seconds)
        return value, [finding["rule"] for finding in trial["findings"]]


def row_of(challenge: Challenge, seeds: int, tick: Callable[[], None]) -> Row:
    """Run the three set-ups of a challenge with every seed, and compare them."""
    unit, higher, _ = MEASURES[challenge.measure]
    values: dict[str, list[float]] = {}
    found: dict[str, list[list[str]]] = {}
    for name, tables in set_ups(challenge).items():
        measure = challenge.measure
        if name == "healthy" and measure == "robust_accuracy":
            measure = "average_accuracy"
        each = []
        for seed in range(seeds):
            each.append(measured(tables, measure, seed))
            tick()
        values[name] = [value for value, _ in each]
        found[name] = [names for _, names in each]
    mean = {name: spread(numbers)[0] for name, numbers in values.items()}
    lost = mean["healthy"] - mean["faulty"]
    won = mean["remedied"] - mean["faulty"]
    points = abs(lost) if higher or challenge.measure == "gap" else abs(lost) / mean["healthy"]
    enough = points >= (LEAST_POINTS if higher or challenge.measure == "gap" else LEAST_SHARE)
    named = sum(any(rule in names for rule in challenge.rules) for names in found["faulty"])
    recovered = won / lost if lost else 0.0
    return {
        "challenge": challenge.name,
        "title": challenge.challenge,
        "measure": unit,
        **{name: mean[name] for name in values},
        "values": values,
        "findings": found,
        "standard_errors": {name: spread(numbers)[1] for name, numbers in values.items()},
        "recovered": recovered,
        "named": named,
        "rules": list(challenge.rules),
        "seeds": seeds,
        "fault": dict(challenge.fault),
        "remedy": dict(challenge.remedy),
        "note": challenge.note,
        "met": bool(
            enough and (lost > 0) == higher and recovered >= LEAST_RECOVERED and 2 * named > seeds
        ),
        **origin(),
    }


def main() -> None:
    """Run the challenges that are not stored yet, and print the table."""
    parser = options(__doc__ or "", seeds=5, resumed=True)
    parser.add_argument("--only", nargs="+", help="names of rows to run")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = stored(given.json)
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
