r"""Permuted MNIST: ten experiences, each with its own fixed order of the pixels.

Domain-incremental, one head of ten.

The network is that of Hsu, Liu, Ramasamy and Kira, Re-evaluating Continual Learning Scenarios,
2018, and of van de Ven and Tolias, Three scenarios for continual learning, 2019: an MLP of 2 x
1,000 units, batches of 128. Shorter, to suit a processor: 1,200 steps an
experience instead of 4,690 or 5,000, at Adam 1e-3 instead of 1e-4, begun anew with every
experience. Pixels are in [0, 1]. A seed sets the permutations (all ten), the model and the order of
images. These settings were chosen by looking at whole streams of seed 10, measured on held-out
training records: SI had 88.4 % with 2 x 400 units and 2,500 steps at 1e-4, 91.8 % with 1,876 steps
at 1e-3, 94.8 % with 2 x 800 units and 1,200.

Strengths are tuned, not given: by `perdure.experiment.tune` on the training records of the
first three experiences of seed 0, a fifth of which is held out to be measured on. No test record
and no later experience has a say. Every trial is stored beside the result.

The targets are those of a table of results: EWC at least 94 and SI at least 95 %.

    python benchmarks/permuted_mnist.py --strategy all --seeds 5 \
        --json benchmarks/results/permuted_mnist.json
"""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rows import options, origin, show, spread, store, stored

from perdure import Learner, Strategy, Stream
from perdure.data import mnist, permuted
from perdure.experiment import Space, Tuned, Values, tune
from perdure.metrics import average_accuracy, forgetting
from perdure.models import mlp
from perdure.strategies import EWC, SI, Naive

EXPERIENCES = 10
ITERATIONS = 1200
BATCH = 128
LEARNING_RATE = 1e-3
HIDDEN = (1000, 1000)
TUNED_ON = 3
TRIALS = 5
MAKERS: dict[str, Callable[..., Strategy]] = {"none": Naive, "ewc": EWC, "si": SI}
SPACE: dict[str, Space] = {"ewc": {"strength": (30.0, 1000.0)}, "si": {"strength": (0.5, 5.0)}}
TARGET = {"ewc": 94.0, "si": 95.0}
"""Average accuracy in percent that is aimed at, by strategy."""
COLUMNS = (
    "strategy",
    "options",
    "seeds",
    "average_accuracy",
    "standard_error",
    "forgetting",
    "target",
    "met",
    "seconds",
)


def stream_of(root: Path | None, experiences: int, seed: int) -> Stream:
    """Make the stream with the permutations of a seed."""
    return permuted(mnist(root), experiences=experiences, seed=seed, first_identity=False)


def learner(stream: Stream, strategy: Strategy, seed: int, iterations: int) -> Learner:
    """Make an untrained learner with the settings of the benchmark."""
    return Learner(
        model=mlp(
            input_shape=stream.input_shape, num_classes=stream.num_classes, hidden=HIDDEN, seed=seed
        ),
        strategy=strategy,
        optimizer=partial(torch.optim.Adam, lr=LEARNING_RATE, fused=True),
        reset_optimizer=True,
        iterations=iterations,
        batch_size=BATCH,
        seed=seed,
    )


def search(name: str, root: Path | None, iterations: int) -> Tuned | None:
    """Find the best strength on held-out training records of the first experiences.

    None if the strategy has no strength.
    """
    torch.set_num_threads(1)
    if name not in SPACE:
        return None

    def make(values: Values) -> Learner:
        return learner(stream, MAKERS[name](**values), 0, iterations)

    # the permutation of an experience depends on seed and number alone
    stream = stream_of(root, TUNED_ON + 1, 0)
    return tune(make, SPACE[name], stream, experiences=TUNED_ON, trials=TRIALS, seed=0)


def run(
    name: str, values: Values, seed: int, root: Path | None, experiences: int, iterations: int
) -> tuple[float, float, float]:
    """Run one seed in a process of its own.

    Returns average accuracy and forgetting in percent, and the seconds.
    """
    torch.set_num_threads(1)
    stream = stream_of(root, experiences, seed)
    start = time.perf_counter()
    matrix = learner(stream, MAKERS[name](**values), seed, iterations).fit(stream)
    return float(average_accuracy(matrix)), float(forgetting(matrix)), time.perf_counter() - start


def row(
    name: str, tuned: Tuned | None, results: list[tuple[float, float, float]], asked: Values
) -> dict[str, Any]:
    """Build one row to store: means over the seeds, with the standard error of the accuracy.

    It also describes the search for the strength.
    """
    accuracies, forgettings, seconds = (list(column) for column in zip(*results, strict=True))
    mean, error = spread(accuracies)
    target = TARGET.get(name) if asked["experiences"] == EXPERIENCES else None
    return {
        "benchmark": "permuted_mnist",
        "scenario": "domain",
        "strategy": name,
        **asked,
        "options": repr(MAKERS[name](**(tuned.values if tuned else {}))),
        "tuned": tuned.row() if tuned else None,
        "average_accuracy": mean,
        "standard_error": error,
        "target": target,
        "met": None if target is None else mean >= target,
        "accuracies": accuracies,
        "forgetting": statistics.mean(forgettings),
        "epsilon": None,
        "seconds": statistics.mean(seconds),
        **origin(),
    }


def same(entry: dict[str, Any], name: str, asked: Values) -> bool:
    """Return True if the stored row has the given strategy and settings."""
    return entry["strategy"] == name and all(
        entry.get(key) == value for key, value in asked.items()
    )


def main() -> None:
    """Run the benchmark with the options of the command line."""
    parser = options(__doc__ or "", seeds=1, resumed=True)
    parser.add_argument("--strategy", nargs="+", choices=(*MAKERS, "all"), default=["all"])
    parser.add_argument(
        "--experiences", type=int, default=EXPERIENCES, help="(default %(default)s)"
    )
    parser.add_argument(
        "--iterations", type=int, default=ITERATIONS, help="per experience (default %(default)s)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="seeds at a time, one thread each (default %(default)s)"
    )
    args = parser.parse_args()
    asked = {"experiences": args.experiences, "iterations": args.iterations, "seeds": args.seeds}
    rows = stored(args.json)
    names = list(MAKERS) if "all" in args.strategy else args.strategy
    waiting = [name for name in names if not any(same(entry, name, asked) for entry in rows)]
    with (
        Progress() as progress,
        ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool,
    ):
        task = progress.add_task("searches and seeds", total=len(waiting) * (1 + args.seeds))
        searches = {name: pool.submit(search, name, args.data, args.iterations) for name in waiting}
        for name in waiting:
            progress.update(task, description=name)
            tuned = searches[name].result()
            progress.advance(task)
            own = (name, tuned.values if tuned else {})
            runs = [
                pool.submit(run, *own, seed, args.data, args.experiences, args.iterations)
                for seed in range(args.seeds)
            ]
            results = []
            for future in runs:
                results.append(future.result())
                progress.advance(task)
            rows = [entry for entry in rows if entry["strategy"] != name] + [
                row(name, tuned, results, asked)
            ]
            store(args.json, rows)
    title = "Permuted MNIST, accuracy and forgetting in percent, seconds per seed"
    show(title, [entry for entry in rows if entry["strategy"] in names], COLUMNS)


if __name__ == "__main__":
    main()
