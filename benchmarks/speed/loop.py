"""Cost of the training loop.

It compares perdure with a bare PyTorch loop that does the same arithmetic, in one run, in turn.

The bare loop is written by hand for each strategy: tensors in memory, selection by indices, no
hooks, no library. With one thread perdure treats denormal numbers as 0 while it trains; the bare
loop then does so, too, so that both do the same arithmetic.

    python benchmarks/speed/loop.py --repeats 5
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from perdure import Learner, Strategy, Stream
from perdure.data import mnist, split
from perdure.models import mlp
from perdure.strategies import EWC, Naive, Replay
from perdure.utils import flushed, store_rows

BATCH = 128
LEARNING_RATE = 1e-3
HIDDEN = (400, 400)
PER_CLASS = 100
STRENGTH = 1e9


def model_for(stream: Stream) -> nn.Module:
    """Return the same model for both sides."""
    return mlp(
        input_shape=stream.input_shape, num_classes=stream.num_classes, hidden=HIDDEN, seed=0
    )


@flushed()
def bare(stream: Stream, strategy: str, iterations: int) -> float:
    """Measure the seconds that the bare loop spends in training steps."""
    model = model_for(stream)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    stored_x: list[Tensor] = []
    stored_y: list[Tensor] = []
    fisher = anchor = None
    spent = 0.0
    for experience in stream:
        x = experience.train.inputs
        y = experience.train.labels
        seen = 2 * (experience.index + 1)
        memory_x, memory_y = (
            (torch.cat(stored_x), torch.cat(stored_y)) if stored_x else (None, None)
        )
        start = time.perf_counter()
        order = memory_order = torch.empty(0, dtype=torch.int64)
        for _ in range(iterations):
            if len(order) == 0:
                order = torch.randperm(len(x))
            index = order[:BATCH]
            order = order[BATCH:]
            inputs = x[index]
            labels = y[index]
            if strategy == "replay" and memory_x is not None and memory_y is not None:
                if len(memory_order) == 0:
                    memory_order = torch.randperm(len(memory_x))
                index = memory_order[:BATCH]
                memory_order = memory_order[BATCH:]
                share = 1 / (experience.index + 1)
                logits = model(torch.cat([inputs, memory_x[index]]))[:, :seen]
                new = F.cross_entropy(logits[: len(labels)], labels)
                loss = share * new + (1 - share) * F.cross_entropy(
                    logits[len(labels) :], memory_y[index]
                )
            else:
                loss = F.cross_entropy(model(inputs)[:, :seen], labels)
            if fisher is not None and anchor is not None:
                pairs = zip(model.parameters(), fisher, anchor, strict=True)
                loss = loss + 0.5 * STRENGTH * sum(
                    (f * (p - a).square()).sum() for p, f, a in pairs
                )
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        spent += time.perf_counter() - start
        for label in experience.classes:
            rows = torch.nonzero(y == label).flatten()[:PER_CLASS]
            stored_x.append(x[rows])
            stored_y.append(y[rows])
        if strategy == "ewc":
            fisher = [torch.full_like(p, 1e-6) for p in model.parameters()]
            anchor = [p.detach().clone() for p in model.parameters()]
    return spent


def ours(stream: Stream, strategy: Strategy, iterations: int) -> float:
    """Measure the seconds that the learner spends in training steps, from opening a block on."""
    clock: dict[str, float] = {"start": 0.0, "spent": 0.0}

    def listen(point: str, _: Learner) -> None:
        if point == "block.begin":
            clock["start"] = time.perf_counter()
        elif point == "block.end":
            clock["spent"] += time.perf_counter() - clock["start"]

    learner = Learner(
        model=model_for(stream),
        strategy=strategy,
        optimizer=partial(torch.optim.Adam, lr=LEARNING_RATE),
        iterations=iterations,
        batch_size=BATCH,
        callbacks=[listen],
    )
    learner.fit(stream)
    return clock["spent"]


def main() -> None:
    """Time every strategy with both loops, in turn, and print the median ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--iterations", type=int, default=200, help="per experience (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--data", type=Path, help="data root (default: PERDURE_DATA, else the user's cache folder)"
    )
    parser.add_argument("--json", type=Path, help="store the rows in this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    stream = split(mnist(args.data), scenario="class", experiences=5)
    sides: dict[str, Strategy] = {
        "naive": Naive(),
        "ewc": EWC(strength=STRENGTH, fisher="empirical"),
        "replay": Replay(memory_size=1000, per_class=PER_CLASS),
    }
    rows = [
        measure(stream, name, strategy, args.repeats, args.iterations)
        for name, strategy in sides.items()
    ]
    show(rows)
    if args.json:
        store_rows(args.json, rows, seed=0)


def measure(
    stream: Stream, name: str, strategy: Strategy, repeats: int, iterations: int
) -> dict[str, object]:
    """Return the median of the ratios of pairs that are run one after the other."""
    pair: tuple[Callable[[], float], Callable[[], float]] = (
        lambda: ours(stream, strategy, iterations),
        lambda: bare(stream, name, iterations),
    )
    for side in pair:
        side()
    times = [[side() for side in pair] for _ in range(repeats)]
    ratios = [mine / theirs for mine, theirs in times]
    steps = iterations * len(stream)
    return {
        "benchmark": "loop",
        "strategy": name,
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "milliseconds_per_step": 1e3 * statistics.median(t[0] for t in times) / steps,
        "bare_milliseconds_per_step": 1e3 * statistics.median(t[1] for t in times) / steps,
        "repeats": repeats,
    }


def show(rows: list[dict[str, object]]) -> None:
    """Print the rows as a table."""
    table = Table(
        title="time of perdure's loop / time of a bare PyTorch loop (median, lowest, highest)"
    )
    for column in rows[0]:
        table.add_column(column.replace("_", " "))
    for entry in rows:
        table.add_row(
            *[
                f"{value:.3f}" if isinstance(value, float) else str(value)
                for value in entry.values()
            ]
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
