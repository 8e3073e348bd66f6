"""Drift of reasons while a model learns on: accuracy and explanations kept, on digits.

Five experiences of two digits, a perceptron, naive training, EWC, replay and attribution
distillation, task- and class-incremental. After every experience the same 20 test records of every
earlier one are explained for their right classes (KernelSHAP over 16 superpixels, blank
background), and compared with the explanations when their experience was learnt: rank correlation
over superpixels. Settings are round numbers and were not searched.

    python benchmarks/explanation_drift.py
    python benchmarks/explanation_drift.py --json benchmarks/results/explanation_drift.json
    python benchmarks/explanation_drift.py --scenario task --picture drift-of-reasons.svg
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from perdure.experiment import Result, parse, run
from perdure.report import write_figures
from perdure.utils import store_rows

SCENARIOS = ("task", "class")
MEASURES = ("average_accuracy", "forgetting", "reason_correlation", "reason_overlap")
CONFIG = """
name = "explanation-drift"
seeds = {seeds}
[data]
name = "digits"
scenario = "{scenario}"
experiences = 5
[model]
hidden = [64]
[training]
iterations = {iterations}
batch_size = 32
optimizer = "Adam"
learning_rate = 0.001
[explain]
method = "kernel_shap"
samples = 256
cells = 4
records = 20
drift = true
[[arms]]
strategy = "naive"
[[arms]]
strategy = "ewc"
strength = 1000.0
[[arms]]
strategy = "replay"
memory_size = 200
[[arms]]
strategy = "attribution_distillation"
"""


def measured(
    scenario: str, seeds: Sequence[int], iterations: int, picture: Path | None
) -> list[Mapping[str, object]]:
    """Run all strategies in one scenario, and return one row for each.

    Args:
        scenario: task or class.
        seeds: seeds of the run.
        iterations: steps of an experience.
        picture: file for the picture of the matrices of reasons; None for none.
    """
    text = CONFIG.format(scenario=scenario, seeds=list(seeds), iterations=iterations)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.process_time()
        result = run(parse(text), text, folder)
        seconds = time.process_time() - start
        if picture is not None:
            drawn = {path.stem: path for path in write_figures(folder)}
            shutil.copy(drawn["reason_matrix"], picture)
    return [_row(result, number, scenario, seconds) for number in range(len(result["arms"]))]


def _row(result: Result, number: int, scenario: str, seconds: float) -> Mapping[str, object]:
    arm = result["arms"][number]
    numbers: Mapping[str, object] = {name: arm[name] for name in MEASURES}  # type: ignore[literal-required]
    errors = {f"{name}_error": arm["standard_error"][name] for name in MEASURES}
    return {
        "benchmark": "explanation_drift",
        "scenario": scenario,
        "strategy": arm["strategy"],
        "options": arm["options"],
        "seeds": len(arm["seeds"]),
        **numbers,
        **errors,
        "accuracy_matrix": arm["accuracy_matrix"],
        "reason_matrix": arm.get("reason_matrix"),
        "reason_overlap_matrix": arm.get("reason_overlap_matrix"),
        "seconds_of_all": seconds,
    }


def main() -> None:
    """Measure the requested scenarios, print the rows, and store them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenario", choices=SCENARIOS, help="default: both")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--picture", type=Path, help="draw the matrices of reasons into this file")
    parser.add_argument("--json", type=Path, help="store the rows in this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: list[Mapping[str, object]] = []
    for scenario in SCENARIOS if args.scenario is None else (args.scenario,):
        rows = measured(scenario, range(args.seeds), args.iterations, args.picture)
        for row in rows:
            told = ", ".join(f"{name} {row[name]:.3f}" for name in MEASURES)
            print(f"{scenario:5} {row['strategy']:25} {told}", flush=True)
        print(f"{scenario}: {rows[0]['seconds_of_all']:.0f} s of processor time", flush=True)
        found += rows
    if args.json:
        store_rows(args.json, found, seed=0)


if __name__ == "__main__":
    main()
