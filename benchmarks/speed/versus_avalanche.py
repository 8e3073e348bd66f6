"""Cost of training: perdure compared with Avalanche's own strategies, in one run, in turn.

Split MNIST, class-incremental, five experiences, an MLP 2 x 400, Adam, batches of 128, as many
steps on both sides. Counted is training only: from opening an experience until it is consolidated
(Fisher information, memory), and beside it the steps alone. Loading the data, building model and
strategy, and evaluation are not counted.

Avalanche is timed without metrics, loggers and worker processes, in two ways: at its best, with
`tensors` in memory that need no transform, and with `images` that become tensors item by item, as
in its own SplitMNIST.

The two do the same but for this: perdure's Fisher information is taken record by record,
Avalanche's from the mean of a batch; perdure masks classes to come. SLDA works on the same features
on both sides: the pixels, or (`slda_body`) what the untrained body makes of them, where its own
forward pass weighs on both. Avalanche updates the covariance record by record and inverts it at
every mini-batch, perdure sums once and inverts once an experience.

    python benchmarks/speed/versus_avalanche.py --repeats 5
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from perdure import Learner, Records, Strategy, Stream
from perdure.data import mnist, split
from perdure.models import Classifier, mlp
from perdure.strategies import EWC, SLDA, Naive, Replay
from perdure.utils import store_rows

BATCH = 128
LEARNING_RATE = 1e-3
HIDDEN = (400, 400)
MEMORY = 1000
STRENGTH = 100.0
SHRINKAGE = 1e-4
KINDS = ("tensors", "images")
STRATEGIES: dict[str, Strategy] = {
    "naive": Naive(),
    "ewc": EWC(strength=STRENGTH, fisher="empirical"),
    "replay": Replay(memory_size=MEMORY, weighting="equal"),
    "slda": SLDA(shrinkage=SHRINKAGE, scaled=False, normalise=False),
    "slda_body": SLDA(shrinkage=SHRINKAGE, scaled=False, normalise=False),
}


@dataclass(kw_only=True)
class Timed:
    """Time of one library's training.

    Args:
        seconds: seconds of training.
        in_steps: seconds of the training spent in steps.
        steps: number of steps.
        records: number of drawn records, including those from memory.
    """

    seconds: float = 0.0
    in_steps: float = 0.0
    steps: int = 0
    records: int = 0


def model_for(stream: Stream, name: str) -> Classifier:
    """Make the same model for both libraries; `slda` uses the flattened inputs as features."""
    hidden = () if name == "slda" else HIDDEN
    return mlp(
        input_shape=stream.input_shape, num_classes=stream.num_classes, hidden=hidden, seed=0
    )


# --------------------------------------------------------------------------- perdure


def ours(stream: Stream, name: str) -> Timed:
    """Train with perdure's learner."""
    spent = Timed()
    clock = {"block": 0.0}

    def listen(point: str, learner: Learner) -> None:
        if point == "block.begin":
            clock["block"] = time.perf_counter()
        elif point == "block.end":
            spent.in_steps += time.perf_counter() - clock["block"]
        elif point == "step.gradient" and learner.curator.diagnostics:
            spent.records += learner.curator.diagnostics.rows

    learner = Learner(
        model=model_for(stream, name),
        strategy=STRATEGIES[name],
        epochs=1,
        batch_size=BATCH,
        callbacks=[listen],
        optimizer=partial(torch.optim.Adam, lr=LEARNING_RATE),
    )
    learner.prepare(stream)
    for index in range(len(stream)):
        start = time.perf_counter()
        learner.begin(index)
        for block in (
            learner.training.remaining_blocks(learner.position.experience, learner.position.step)
            if learner.training.steps(index)
            else ()
        ):
            learner.train(block)
        learner.finish()
        spent.seconds += time.perf_counter() - start
        spent.steps += learner.training.steps(index)
    return spent


# --------------------------------------------------------------------------- Avalanche


class Watch:
    """Avalanche plugin that times a strategy and counts its steps and records."""

    def __init__(self) -> None:
        self.spent = Timed()
        self._start = 0.0

    def before_training_epoch(self, strategy: Any) -> None:
        """Start the clock before an epoch."""
        self._start = time.perf_counter()

    def after_training_iteration(self, strategy: Any) -> None:
        """Count the step and its records."""
        self.spent.steps += 1
        self.spent.records += len(strategy.mb_y)

    def after_training_epoch(self, strategy: Any) -> None:
        """Stop the clock after an epoch."""
        self.spent.in_steps += time.perf_counter() - self._start


class Body(nn.Module):
    """Feature extractor for Avalanche's SLDA, made from a model."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute features (n, feature_size) of inputs (n, ...)."""
        return self.model.features(x)


def theirs(stream: Stream, benchmark: Any, name: str) -> Timed:
    """Train with Avalanche's own strategy."""
    watch = Watch()
    strategy = built(stream, name, watch)
    with warnings.catch_warnings(record=True):  # of Avalanche about itself; it sets the filter back
        for experience in benchmark.train_stream:
            start = time.perf_counter()
            strategy.train(experience)
            watch.spent.seconds += time.perf_counter() - start
    return watch.spent


def built(stream: Stream, name: str, watch: Watch) -> Any:
    """Make Avalanche's strategy of the given name."""
    from avalanche import training
    from avalanche.training.plugins import EvaluationPlugin

    model = model_for(stream, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no loggers
        silent = EvaluationPlugin()
    common: dict[str, Any] = {
        "criterion": nn.CrossEntropyLoss(),
        "train_mb_size": BATCH,
        "train_epochs": 1,
        "plugins": [watch],
        "evaluator": silent,
    }
    if name.startswith("slda"):
        return training.StreamingLDA(
            slda_model=Body(model),
            input_size=model.feature_size,
            num_classes=stream.num_classes,
            shrinkage_param=SHRINKAGE,
            **common,
        )
    kinds: dict[str, Any] = {
        "naive": training.Naive,
        "ewc": partial(training.EWC, ewc_lambda=STRENGTH / 2),
        "replay": partial(training.Replay, mem_size=MEMORY),
    }
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    return kinds[name](model=model, optimizer=optimizer, **common)


def benchmark_of(stream: Stream, kind: str) -> Any:
    """Convert the experiences to an Avalanche benchmark of tensors in memory, or of images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages of its own that are no longer maintained
        from avalanche.benchmarks import nc_benchmark
    from torchvision.transforms import ToTensor

    transform = ToTensor() if kind == "images" else None
    parts = [dataset_of([getattr(e, part) for e in stream], kind) for part in ("train", "test")]
    order = [label for experience in stream for label in experience.classes]
    return nc_benchmark(
        *parts,
        len(stream),
        task_labels=False,
        fixed_class_order=order,
        train_transform=transform,
        eval_transform=transform,
    )


class Images(Dataset[tuple[Image.Image, int]]):
    """Data set of greyscale images as picture objects, like torchvision's MNIST."""

    def __init__(self, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        self._bytes = (255 * inputs[:, 0]).round().to(torch.uint8)
        self._labels = labels.tolist()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._bytes[index].numpy()), self._labels[index]


def dataset_of(parts: Sequence[Records], kind: str) -> Any:
    """Make a data set with the attribute `targets` that Avalanche needs."""
    inputs = torch.cat([part.inputs for part in parts])
    labels = torch.cat([part.labels for part in parts])
    dataset: Any = Images(inputs, labels) if kind == "images" else TensorDataset(inputs, labels)
    dataset.targets = labels.tolist()
    return dataset


# --------------------------------------------------------------------------- side by side


def measure(name: str, kind: str, stream: Stream, repeats: int) -> dict[str, object]:
    """Return the median of the ratios of pairs of runs.

    The two runs of a pair follow each other; the first pair is not counted.
    """
    benchmark = benchmark_of(stream, kind)
    pair: tuple[Callable[[], Timed], Callable[[], Timed]] = (
        lambda: ours(stream, name),
        lambda: theirs(stream, benchmark, name),
    )
    for side in pair:
        side()
    times = [[side() for side in pair] for _ in range(repeats)]
    ratios = [other.seconds / mine.seconds for mine, other in times]
    in_steps = [other.in_steps / mine.in_steps for mine, other in times if mine.in_steps]
    mine, other = times[-1]
    return {
        "benchmark": "versus_avalanche",
        "strategy": name,
        "avalanche_data": kind,
        "times_faster": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "times_faster_in_steps": statistics.median(in_steps) if in_steps else None,
        "seconds": statistics.median(t[0].seconds for t in times),
        "avalanche_seconds": statistics.median(t[1].seconds for t in times),
        "steps": mine.steps,
        "avalanche_steps": other.steps,
        "records": mine.records or records_of(stream),
        "avalanche_records": other.records,
        "repeats": repeats,
    }


def records_of(stream: Stream) -> int:
    """Return the training records of the whole stream."""
    return sum(len(experience.train) for experience in stream)


def first_records(stream: Stream, most: int) -> Stream:
    """Return the stream with at most the given number of training records per experience."""
    parts = [replace(e, train=e.train.take(torch.arange(min(most, len(e.train))))) for e in stream]
    return replace(stream, experiences=tuple(parts))


def show(rows: list[dict[str, object]]) -> None:
    """Print the rows as a table."""
    table = Table(
        title="time of Avalanche's training / time of perdure's (median, lowest, highest)"
    )
    for column in rows[0]:
        table.add_column(column.replace("_", " "))
    for entry in rows:
        table.add_row(
            *[
                f"{value:.2f}" if isinstance(value, float) else str(value)
                for value in entry.values()
            ]
        )
    Console(width=170).print(table)


def main() -> None:
    """Time every strategy with both libraries, in turn, and print the median ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of data given to Avalanche"
    )
    parser.add_argument(
        "--records", type=int, help="at most so many training records an experience (default: all)"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--data", type=Path, help="data root (default: PERDURE_DATA, else the user's cache folder)"
    )
    parser.add_argument("--json", type=Path, help="store the rows in this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    stream = split(mnist(args.data), scenario="class", experiences=5)
    stream = first_records(stream, args.records) if args.records else stream
    rows = [
        measure(name, kind, stream, args.repeats) for name in args.strategies for kind in args.kinds
    ]
    show(rows)
    if args.json:
        store_rows(args.json, rows, seed=0)


if __name__ == "__main__":
    main()
