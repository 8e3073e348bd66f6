"""What a private step costs: plain SGD, perdure, Opacus ghost clipping and Opacus hooks, in one run, turn by turn.

perdure is timed whole: ledger, Poisson sampler, guard's checks at the start, clipping and secret-grade noise.
Opacus is timed on a ready batch: forward, backward, clipping, noise, step; its sampler is not counted.

    python benchmarks/speed/dp_step.py --repeats 7
"""

import argparse
import copy
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from perdure import Experience, Learner, Privacy, Records, Stream
from perdure.environment import store_rows
from perdure.strategies.naive import Naive

METHODS = ("plain", "perdure", "opacus_ghost", "opacus_hooks")
POOL, CLASSES, CLIP_NORM, NOISE, RATE = 12_000, 10, 1.0, 1.1, 0.1


def mlp() -> nn.Module:
    """784-256-256-10."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, CLASSES)
    )


def cnn() -> nn.Module:
    """The CNN of Opacus's MNIST example."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, CLASSES),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "cnn": cnn}


def records() -> tuple[Tensor, Tensor]:
    """Synthetic digits: speed does not depend on what they show."""
    place = torch.Generator().manual_seed(0)
    inputs = torch.rand(POOL, 1, 28, 28, generator=place)
    return inputs, torch.randint(0, CLASSES, (POOL,), generator=place)


def timed(step: Callable[[], None], steps: int) -> float:
    """Seconds a step."""
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


def plain(model: nn.Module, batch: int, steps: int) -> Callable[[], float]:
    """Plain SGD on shuffled batches of resident tensors."""
    inputs, labels = records()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def step() -> None:
        index = torch.randperm(POOL)[:batch]
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(inputs[index]), labels[index]))
        optimizer.step()

    return lambda: timed(step, steps)


def perdure(model: nn.Module, batch: int, steps: int) -> Callable[[], float]:
    """perdure's learner under privacy; the time is that of blocks of its loop, ledger entry included."""
    inputs, labels = records()
    own = Records(inputs=inputs, labels=labels)
    classes = tuple(range(CLASSES))
    experience = Experience(index=0, train=own, test=own.take(torch.arange(1)), classes=classes)
    stream = Stream(
        name="speed", scenario="domain", experiences=(experience,), num_classes=CLASSES, input_shape=(1, 28, 28)
    )
    learner = Learner(
        model=model, strategy=Naive(), optimizer=partial(torch.optim.SGD, lr=RATE), iterations=10**6,
        batch_size=batch, privacy=Privacy(noise_multiplier=NOISE, clip_norm=CLIP_NORM, seed=0),
    )  # fmt: skip
    learner.prepare(stream)
    learner.begin(0)

    def block() -> float:
        first = learner.position.step
        start = time.perf_counter()
        learner.train(range(first, first + steps))
        return (time.perf_counter() - start) / steps

    return block


def opacus(model: nn.Module, batch: int, steps: int, mode: str) -> Callable[[], float]:
    """Opacus's private step on ready batches."""
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    inputs, labels = records()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=batch)
    made = PrivacyEngine(accountant="rdp").make_private(
        module=model, optimizer=optimizer, data_loader=loader, criterion=nn.CrossEntropyLoss(),
        noise_multiplier=NOISE, max_grad_norm=CLIP_NORM, poisson_sampling=False, grad_sample_mode=mode,
    )  # fmt: skip
    wrapped, private = made[0], made[1]
    criterion = made[2] if mode == "ghost" else nn.CrossEntropyLoss()

    def step() -> None:
        index = torch.randperm(POOL)[:batch]
        private.zero_grad()
        criterion(wrapped(inputs[index]), labels[index]).backward()
        private.step()

    return lambda: timed(step, steps)


def side(method: str, model: str, batch: int, steps: int) -> Callable[[], float]:
    """One contestant, ready to be timed again and again."""
    torch.manual_seed(0)
    made = copy.deepcopy(MODELS[model]())
    if method == "plain":
        return plain(made, batch, steps)
    if method == "perdure":
        return perdure(made, batch, steps)
    return opacus(made, batch, steps, method.removeprefix("opacus_"))


def peak_memory(method: str, model: str, batch: int) -> float:
    """Peak memory in MiB of the steps alone, in a fresh process: the peak during them, less what was there before."""
    script = Path(__file__)
    order = [sys.executable, str(script), "--peak", method, model, str(batch)]
    return float(subprocess.run(order, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_peak(method: str, model: str, batch: int) -> None:
    """In the fresh process: run a few steps and print the growth of the peak."""
    torch.set_num_threads(1)
    run = side(method, model, batch, 2)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident
    before = _status("VmRSS")
    run()
    print(max(0.0, _status("VmHWM") - before))


def _status(field: str) -> float:
    """One line of the process's status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure(model: str, batch: int, repeats: int, steps: int) -> list[dict[str, object]]:
    """Alternate the methods; every ratio is the median over rounds of method / plain in the same round."""
    sides = {method: side(method, model, batch, steps) for method in METHODS}
    for run in sides.values():
        run()
    rounds = [{method: run() for method, run in sides.items()} for _ in range(repeats)]
    memory = {method: peak_memory(method, model, batch) for method in METHODS}
    return [
        {
            "benchmark": "dp_step", "model": model, "batch": batch, "method": method,
            "time_ratio": statistics.median(r[method] / r["plain"] for r in rounds),
            "memory_ratio": memory[method] / memory["plain"], "peak_mib": memory[method],
            "milliseconds": 1e3 * statistics.median(r[method] for r in rounds), "repeats": repeats,
        }
        for method in METHODS
    ]  # fmt: skip


def show(rows: Iterable[dict[str, object]]) -> None:
    """Print the rows as a table."""
    table = Table(title="cost of a step relative to plain SGD, one thread")
    listed = list(rows)
    for column in listed[0]:
        table.add_column(column.replace("_", " "))
    for entry in listed:
        table.add_row(*[f"{value:.2f}" if isinstance(value, float) else str(value) for value in entry.values()])
    Console(width=120).print(table)


def main() -> None:
    """Measure both models at both batch sizes."""
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=12, help="steps in a turn (default %(default)s)")
    parser.add_argument("--json", type=Path, help="store the rows in this file")
    parser.add_argument("--peak", nargs=3, metavar=("METHOD", "MODEL", "BATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print_peak(args.peak[0], args.peak[1], int(args.peak[2]))
        return
    torch.set_num_threads(1)
    rows = [row for model in MODELS for batch in (256, 1024) for row in measure(model, batch, args.repeats, args.steps)]
    show(rows)
    if args.json:
        store_rows(args.json, rows, seed=0)


if __name__ == "__main__":
    main()
