"""Split MNIST by the protocol of van de Ven, Tuytelaars and Tolias (Nature Machine Intelligence, 2022).

Five experiences of two digits; an MLP of 2 x 400 units; Adam 1e-3 (kept over the experiences), batch 128, 2,000
iterations an experience; pixels in [0, 1]; 100 stored records a class. Seed 0 takes the digits in order, every other
seed in a random order, as the reference code does. Published values are means over 20 seeds.

    python benchmarks/split_mnist.py --scenario class --strategy replay --seeds 1
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from perdure.datasets import mnist
from perdure.environment import store_rows
from perdure.learner import Learner
from perdure.metrics import average_accuracy, forgetting
from perdure.models import mlp
from perdure.strategies.ewc import EWC
from perdure.strategies.joint import Joint
from perdure.strategies.lwf import LwF
from perdure.strategies.naive import Naive
from perdure.strategies.replay import Replay
from perdure.strategy import Scenario, Strategy
from perdure.streams import Stream, split

ITERATIONS, BATCH, LEARNING_RATE, HIDDEN = 2000, 128, 1e-3, (400, 400)
EWC_STRENGTH: dict[Scenario, float] = {"task": 1e5, "domain": 1e10, "class": 1e9}

PUBLISHED: dict[tuple[str, str], float] = {
    ("class", "none"): 19.9, ("class", "ewc"): 20.6, ("class", "lwf"): 21.9,
    ("class", "replay"): 88.8, ("class", "joint"): 98.2,
}  # fmt: skip
"""Average accuracy in percent, from the table of the paper."""


def strategies(scenario: Scenario) -> dict[str, Strategy]:
    """Every strategy with the paper's hyper-parameters for the scenario."""
    return {
        "none": Naive(),
        "ewc": EWC(strength=EWC_STRENGTH[scenario]),
        "lwf": LwF(temperature=2.0),
        "replay": Replay(memory_size=1000, per_class=100),
        "joint": Joint(),
    }


def run(stream: Stream, strategy: Strategy, seed: int, iterations: int) -> tuple[float, float]:
    """Average accuracy and forgetting, in percent, of one seed."""
    learner = Learner(
        model=mlp(input_shape=stream.input_shape, num_classes=stream.num_classes, hidden=HIDDEN, seed=seed),
        strategy=strategy, optimizer=partial(torch.optim.Adam, lr=LEARNING_RATE),
        iterations=iterations, batch_size=BATCH, seed=seed,
    )  # fmt: skip
    matrix = learner.fit(stream)
    return float(average_accuracy(matrix)), float(forgetting(matrix))


def row(name: str, scenario: Scenario, results: list[tuple[float, float]], seconds: float) -> dict[str, object]:
    """One stored row: means over the seeds with the standard error of the accuracy."""
    accuracies, forgettings = torch.tensor(results, dtype=torch.float64).T
    error = float(accuracies.std() / len(results) ** 0.5) if len(results) > 1 else None
    return {
        "benchmark": "split_mnist", "scenario": scenario, "strategy": name, "seeds": len(results),
        "average_accuracy": float(accuracies.mean()), "forgetting": float(forgettings.mean()),
        "standard_error": error, "epsilon": None, "seconds": seconds, "published": PUBLISHED.get((scenario, name)),
    }  # fmt: skip


def show(rows: list[dict[str, object]]) -> None:
    """Print the rows as a table."""
    table = Table(title="Split MNIST, accuracy and forgetting in percent, seconds per seed")
    columns = ("scenario", "strategy", "seeds", "average_accuracy", "standard_error", "forgetting", "published", "s")
    for column in columns:
        table.add_column(column.replace("_", " "))
    for entry in rows:
        cells = [entry["seconds" if column == "s" else column] for column in columns]
        table.add_row(*[f"{c:.2f}" if isinstance(c, float) else "-" if c is None else str(c) for c in cells])
    Console(width=110).print(table)


def main() -> None:
    """Run what the command line asks for."""
    names = list(strategies("class"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", choices=("task", "domain", "class"), default="class")
    parser.add_argument("--strategy", choices=(*names, "all"), default="all")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, from 0")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="per experience (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default %(default)s)")
    parser.add_argument("--data", type=Path, help="data root (default: PERDURE_DATA, else the user's cache folder)")
    parser.add_argument("--json", type=Path, help="store the rows in this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = mnist(args.data)
    rows = []
    with Progress() as progress:
        chosen = names if args.strategy == "all" else [args.strategy]
        task = progress.add_task("seeds", total=len(chosen) * args.seeds)
        for name in chosen:
            start, results = time.perf_counter(), []
            for seed in range(args.seeds):
                progress.update(task, description=f"{name}, seed {seed}")
                stream = split(data, scenario=args.scenario, experiences=5, seed=seed or None)
                results.append(run(stream, strategies(args.scenario)[name], seed, args.iterations))
                progress.advance(task)
            rows.append(row(name, args.scenario, results, (time.perf_counter() - start) / args.seeds))
    show(rows)
    if args.json:
        store_rows(args.json, rows, seed=0)


if __name__ == "__main__":
    main()
