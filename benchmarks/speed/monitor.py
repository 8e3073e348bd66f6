"""Cost of the monitor: processor time of training steps with it, relative to those without it.

The set-up is the one of the loop's benchmark: a perceptron with two layers of 400 units on
MNIST, batches of 128. Runs with and without the monitor take turns in one process. Rows of random
numbers stand in for the images if there are none: the time does not depend on the values.

    python benchmarks/speed/monitor.py --repeats 9 --json benchmarks/results/monitor.json
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from perdure import Learner, Records, Stream
from perdure.data import Dataset, joint, mnist
from perdure.doctor import Monitor
from perdure.learner import Callback
from perdure.models import mlp
from perdure.strategies import Naive
from perdure.utils import generator, store_rows

BATCH = 128
HIDDEN = (400, 400)


def stand_in() -> Dataset:
    """Return random images with the shape of MNIST."""
    parts = []
    for name, count in (("train", 10_000), ("test", 2_000)):
        draws = generator(0, name)
        parts.append(
            Records(
                inputs=torch.rand(count, 1, 28, 28, generator=draws),
                labels=torch.arange(count) % 10,
                ids=torch.arange(count) + (0 if name == "train" else 10_000),
                partition=name,
            )
        )
    return Dataset(
        name="random", train=parts[0], test=parts[1], num_classes=10, input_shape=(1, 28, 28)
    )


def seconds(stream: Stream, iterations: int, callbacks: Sequence[Callback]) -> float:
    """Measure the processor time of `fit`, without its evaluations."""
    clock = {"start": 0.0, "spent": 0.0}

    def begin(point: str, _: Learner) -> None:
        if point == "experience.begin":
            clock["start"] = time.process_time()

    def end(point: str, _: Learner) -> None:
        if point == "block.end":
            clock["spent"] += time.process_time() - clock["start"]

    Learner(
        model=mlp(input_shape=stream.input_shape, num_classes=10, hidden=HIDDEN, seed=0),
        strategy=Naive(),
        optimizer=partial(torch.optim.Adam, lr=1e-3),
        iterations=iterations,
        batch_size=BATCH,
        callbacks=[begin, *callbacks, end],
    ).fit(stream)
    return clock["spent"]


def main() -> None:
    """Measure both sides in turn, and print the median of the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--iterations", type=int, default=200, help="number of steps")
    parser.add_argument("--data", type=Path, help="data root")
    parser.add_argument("--random", action="store_true", help="random images, not MNIST")
    parser.add_argument("--json", type=Path, help="store the row in this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = stand_in() if args.random else mnist(args.data)
    stream = joint(data)
    ratios = []
    plain = []
    for turn in range(args.repeats + 1):
        bare = seconds(stream, args.iterations, [])
        watched = seconds(stream, args.iterations, [Monitor()])
        if turn:  # the first turn warms up
            ratios.append(watched / bare)
            plain.append(1e3 * bare / (args.iterations * len(stream)))
    row = {
        "benchmark": "monitor",
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "milliseconds_per_step": statistics.median(plain),
        "iterations": args.iterations,
        "repeats": args.repeats,
        "data": data.name,
    }
    Console().print(row)
    if args.json:
        store_rows(args.json, [row], seed=0)


if __name__ == "__main__":
    main()
