"""Cost of watching a training: progress and loggers, on the MLP of the loop benchmark.

Each row compares watched blocks of steps with silent ones, turn by turn in one process, in
processor time of this process. A logger watches every second block of one training, and writes
its values when it would in any training, at most twice a minute; its own share is the processor
time inside its calls, relative to the other time of the watched blocks. Weights & Biases writes in
a process of its own, whose time is not counted, and no row has the time to load a package.

    python benchmarks/speed/watching.py --repeats 7
    python benchmarks/speed/watching.py tensorboard --repeats 7
"""

import argparse
import io
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path

import torch

from perdure import Experience, Learner, Records, Stream
from perdure.loggers import Logger, find, names
from perdure.models import mlp
from perdure.strategies import Naive
from perdure.utils import store_rows

Row = dict[str, object]

BATCH = 128
HIDDEN = (400, 400)
CLASSES = 10
RECORDS = 6000
TESTS = 100
BAR = "progress bar"


def stream_of() -> Stream:
    """Make a stream of one experience, of random records in the shape of MNIST."""
    draws = torch.Generator().manual_seed(0)
    parts = []
    for first, count in ((0, RECORDS), (RECORDS, TESTS)):
        ids = torch.arange(first, first + count)
        inputs = torch.rand(count, 784, generator=draws)
        parts.append(
            Records(inputs=inputs, labels=ids % CLASSES, ids=ids, partition=f"from {first}")
        )
    train, test = parts
    only = Experience(index=0, train=train, test=test, classes=tuple(range(CLASSES)), stage=0)
    return Stream(
        name="random",
        scenario="domain",
        num_classes=CLASSES,
        input_shape=(784,),
        experiences=(only,),
        assigned_by_record=True,
    )


class Turns:
    """Callback that lets a logger watch every second block, and measures the time of each block.

    The first block of a pair is watched in one pair, and the second in the next. The first pair is
    not counted, because the logger loads its package and opens its files in it.

    Args:
        logger: the logger; None to measure the blocks only.
    """

    def __init__(self, logger: Logger | None) -> None:
        self.logger = logger
        self.times: list[float] = []
        self.own: list[float] = []
        self._number = 0
        self._start = 0.0

    @property
    def watched(self) -> bool:
        """True if the present block is watched."""
        return self._number % 4 in (0, 3)

    def __call__(self, point: str, learner: Learner) -> None:
        """Pass a point on to the logger if the block is watched."""
        if point == "block.begin":
            self._start = time.process_time()
            self.own.append(0.0)
        if self.logger is not None and self.watched:
            start = time.process_time()
            self.logger(point, learner)
            if self.own:
                self.own[-1] += time.process_time() - start
        if point == "block.end":
            self.times.append(time.process_time() - self._start)
            self._number += 1

    def close(self) -> None:
        """Close the logger."""
        if self.logger is not None:
            self.logger.close()

    @property
    def own_share(self) -> float:
        """Time inside the logger, relative to the other time of all watched blocks but one."""
        watched = [(own, whole) for own, whole in zip(self.own, self.times, strict=True) if own]
        own = sum(each for each, _ in watched[1:])
        return own / (sum(whole for _, whole in watched[1:]) - own)

    def pairs(self) -> list[tuple[float, float]]:
        """Return the times of the watched and of the silent block of each pair but the first."""
        found = zip(self.times[2::2], self.times[3::2], strict=True)
        return [(one, two) if turn % 2 else (two, one) for turn, (one, two) in enumerate(found)]


def train(stream: Stream, steps: int, turns: Turns, *, blocks: int = 1, show: bool = False) -> None:
    """Train the MLP for a number of blocks.

    Args:
        stream: stream of one experience.
        steps: number of steps in a block.
        turns: callback that measures the blocks.
        blocks: number of blocks.
        show: show a progress bar.
    """
    learner = Learner(
        model=mlp(input_shape=(784,), num_classes=CLASSES, hidden=HIDDEN, seed=0),
        strategy=Naive(),
        optimizer=partial(torch.optim.Adam, lr=1e-3),
        iterations=steps * blocks,
        blocks=blocks,
        batch_size=BATCH,
        callbacks=[turns],
        show_progress=show,
    )
    learner.fit(stream)


@contextmanager
def terminal() -> Iterator[None]:
    """Context manager in which standard error is taken for a terminal."""

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    with redirect_stderr(Screen()):
        yield


def bar_pairs(stream: Stream, steps: int, repeats: int) -> list[tuple[float, float]]:
    """Return the times of blocks with a progress bar and without, in trainings of one block."""

    def block(show: bool) -> float:
        turns = Turns(None)
        with terminal():
            train(stream, steps, turns, show=show)
        return turns.times[0]

    found = []
    for turn in range(repeats + 1):
        first = bool(turn % 2)
        times = {first: block(first), not first: block(not first)}
        found.append((times[True], times[False]))
    return found[1:]


def logger_pairs(
    name: str, stream: Stream, steps: int, repeats: int
) -> tuple[list[tuple[float, float]], float]:
    """Return the times of blocks with a logger and without, and the share of its calls."""
    with tempfile.TemporaryDirectory() as folder:
        turns = Turns(find(name)(folder=folder))
        train(stream, steps, turns, blocks=2 * (repeats + 1))
    return turns.pairs(), turns.own_share


def measure(name: str, stream: Stream, args: argparse.Namespace) -> Row:
    """Return the median of the ratios of pairs that are run one after the other."""
    share: float | None = None
    if name == BAR:
        pairs = bar_pairs(stream, args.steps, args.repeats)
    else:
        pairs, share = logger_pairs(name, stream, args.steps, args.repeats)
    ratios = [mine / theirs for mine, theirs in pairs]
    return {
        "benchmark": "watching",
        "watched": name,
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "milliseconds_per_step": 1e3 * statistics.median(t for _, t in pairs) / args.steps,
        "own_percent": None if share is None else 100 * share,
        "steps": args.steps,
        "repeats": args.repeats,
    }


def main() -> None:
    """Measure the requested rows, print them, and store them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", help=f"{BAR!r}, or names of loggers; default all")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=250, help="steps of a block")
    parser.add_argument("--json", type=Path, help="store the rows in this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the packages about each other
    stream = stream_of()
    found: list[Row] = []
    for name in args.rows or (BAR, *names()):
        found.append(measure(name, stream, args))
        print(", ".join(f"{key} {shown(value)}" for key, value in found[-1].items()), flush=True)
        if args.json:
            store_rows(args.json, found, seed=0)


def shown(value: object) -> str:
    """Format a number with four digits; return other values as text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
