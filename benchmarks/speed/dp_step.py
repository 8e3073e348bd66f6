"""Cost of a private step.

It compares plain SGD, perdure, Opacus ghost clipping and Opacus hooks in one run, in turn.

perdure is timed with everything: ledger, Poisson sampler, checks of the guard at the start,
clipping and secret noise. Opacus is timed on a ready batch, without its sampler: forward, backward,
clipping, noise, step.

`wall_ratio` is the ratio of elapsed times, and the aims are for it: perdure draws the noise of the
next step on a thread of its own, beside the thread of torch. `time_ratio` is the ratio of processor
times, added up over both threads. The noise of Opacus is in float32, that of perdure exact
integers.

Every contestant warms up first. perdure's batches differ in size, and torch compiles a convolution
for every size that it meets (2 to 5 ms each, once in a process), so perdure warms up for longer;
the others meet one size. Peak memory is that of the steps alone, in processes of their own, the
median of three; the compiled loops that draw noise (about 130 MiB with their compiler, once in a
process) are loaded before. A turn of Opacus hooks, which is far slower, has two steps.

    python benchmarks/speed/dp_step.py --repeats 7
"""

import argparse
import copy
import ctypes
import gc
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
from perdure.privacy import Grid
from perdure.privacy.noise import NoiseKey
from perdure.strategies import Naive
from perdure.utils import store_rows

METHODS = ("plain", "perdure", "opacus_ghost", "opacus_hooks")
POOL = 12_000
CLASSES = 10
PIXELS = 784
CLIP_NORM = 1.0
NOISE = 1.1
RATE = 0.1
WARM_BLOCKS = {"perdure": 12}
FEW_STEPS = {"opacus_hooks": 2}
TIME_TARGETS = {256: 1.5, 1024: 1.25}
MEMORY_TARGET = 1.5
GHOST_TARGET = 1.5
"""Smallest speed relative to Opacus ghost clipping that is aimed at.

`MEMORY_TARGET` is the largest peak memory relative to plain SGD that is aimed at.
"""

Seconds = tuple[float, float]
"""Processor time and elapsed time of a step, in seconds."""


def mlp() -> nn.Module:
    """Make a perceptron of widths 784, 256, 256 and 10."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(PIXELS, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, CLASSES),
    )


def cnn() -> nn.Module:
    """Make the CNN of Opacus's MNIST example."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, padding=3),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.ReLU(),
        nn.Linear(32, CLASSES),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "cnn": cnn}


def records() -> tuple[Tensor, Tensor]:
    """Make random records with the shape of digits; speed does not depend on values."""
    place = torch.Generator().manual_seed(0)
    inputs = torch.rand(POOL, 1, 28, 28, generator=place)
    return inputs, torch.randint(0, CLASSES, (POOL,), generator=place)


def timed(block: Callable[[], None], steps: int) -> Seconds:
    """Measure the seconds per step in a block of steps."""
    used = time.process_time()
    start = time.perf_counter()
    block()
    return (time.process_time() - used) / steps, (time.perf_counter() - start) / steps


def repeated(step: Callable[[], None], steps: int) -> Callable[[], None]:
    """Return a function that takes one step a number of times."""

    def block() -> None:
        for _ in range(steps):
            step()

    return block


def plain(model: nn.Module, batch: int, steps: int) -> Callable[[], Seconds]:
    """Prepare plain SGD on shuffled batches, with all tensors in memory."""
    inputs, labels = records()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def step() -> None:
        index = torch.randperm(POOL)[:batch]
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(inputs[index]), labels[index]))
        optimizer.step()

    return lambda: timed(repeated(step, steps), steps)


def perdure(model: nn.Module, batch: int, steps: int) -> Callable[[], Seconds]:
    """Prepare perdure's learner under privacy.

    The measured time is that of blocks of its loop, including the ledger entry.
    """
    inputs, labels = records()
    own = Records(inputs=inputs, labels=labels)
    classes = tuple(range(CLASSES))
    experience = Experience(index=0, train=own, test=own.take(torch.arange(1)), classes=classes)
    stream = Stream(
        name="speed",
        scenario="domain",
        experiences=(experience,),
        num_classes=CLASSES,
        input_shape=(1, 28, 28),
        assigned_by_record=True,
    )
    learner = Learner(
        model=model,
        strategy=Naive(),
        optimizer=partial(torch.optim.SGD, lr=RATE),
        iterations=10**6,
        batch_size=batch,
        privacy=Privacy(noise_multiplier=NOISE, clip_norm=CLIP_NORM, seed=0),
    )
    learner.prepare(stream)
    learner.begin(0)

    def block() -> None:
        first = learner.position.step
        learner.train(range(first, first + steps))

    return lambda: timed(block, steps)


def opacus(model: nn.Module, batch: int, steps: int, mode: str) -> Callable[[], Seconds]:
    """Prepare Opacus's private step on ready batches."""
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    inputs, labels = records()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=batch)
    made = PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        criterion=nn.CrossEntropyLoss(),
        noise_multiplier=NOISE,
        max_grad_norm=CLIP_NORM,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    wrapped = made[0]
    private = made[1]
    criterion = made[2] if mode == "ghost" else nn.CrossEntropyLoss()

    def step() -> None:
        index = torch.randperm(POOL)[:batch]
        private.zero_grad()
        criterion(wrapped(inputs[index]), labels[index]).backward()
        private.step()

    return lambda: timed(repeated(step, steps), steps)


def side(method: str, model: str, batch: int, steps: int) -> Callable[[], Seconds]:
    """Prepare one method, so that it can be timed repeatedly."""
    torch.manual_seed(0)
    made = copy.deepcopy(MODELS[model]())
    if method == "plain":
        return plain(made, batch, steps)
    if method == "perdure":
        return perdure(made, batch, steps)
    return opacus(made, batch, steps, method.removeprefix("opacus_"))


def peak_memory(method: str, model: str, batch: int) -> float:
    """Measure the peak memory of the steps in MiB, in new processes.

    It is the peak during the steps, minus the memory in use before.
    """
    script = Path(__file__)
    order = [sys.executable, str(script), "--peak", method, model, str(batch)]
    runs = [
        subprocess.run(order, capture_output=True, text=True, check=True).stdout for _ in range(3)
    ]
    return statistics.median(float(run.split()[-1]) for run in runs)


def print_peak(method: str, model: str, batch: int) -> None:
    """In the new process: run a few steps, and print the growth of the peak."""
    torch.set_num_threads(1)
    if method == "perdure":
        perdure(nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 32), nn.Linear(32, CLASSES)), 8, 1)()
    run = side(method, model, batch, 2)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the small model left would serve the large one
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident
    before = _status("VmRSS")
    run()
    print(max(0.0, _status("VmHWM") - before))


def _status(field: str) -> float:
    """Read one value of the process's status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure(model: str, batch: int, repeats: int, steps: int) -> list[dict[str, object]]:
    """Time the methods in turn.

    Every ratio is the median over rounds of method / plain in the same round.
    """
    sides = {method: side(method, model, batch, FEW_STEPS.get(method, steps)) for method in METHODS}
    for method, run in sides.items():
        for _ in range(WARM_BLOCKS.get(method, 1)):
            run()
    rounds = [{method: run() for method, run in sides.items()} for _ in range(repeats)]
    memory = {method: peak_memory(method, model, batch) for method in METHODS}
    used, clock = (
        {
            method: statistics.median(r[method][i] / r["plain"][i] for r in rounds)
            for method in METHODS
        }
        for i in (0, 1)
    )
    rows: list[dict[str, object]] = [
        {
            "benchmark": "dp_step",
            "model": model,
            "batch": batch,
            "method": method,
            "time_ratio": used[method],
            "wall_ratio": clock[method],
            "memory_ratio": memory[method] / memory["plain"],
            "peak_mib": memory[method],
            "milliseconds": 1e3 * statistics.median(r[method][0] for r in rounds),
            "repeats": repeats,
        }
        for method in METHODS
    ]
    judged = judgement(model, batch, clock, memory)
    return [row | judged if row["method"] == "perdure" else row for row in rows]


def judgement(
    model: str, batch: int, clock: dict[str, float], memory: dict[str, float]
) -> dict[str, object]:
    """Compare aims with measurements; if an aim was missed, describe where the time was spent."""
    aims = {
        "wall_ratio": (clock["perdure"], TIME_TARGETS[batch]),
        "memory_ratio": (memory["perdure"] / memory["plain"], MEMORY_TARGET),
        "perdure_over_ghost": (clock["perdure"] / clock["opacus_ghost"], 1 / GHOST_TARGET),
    }
    missed = [
        f"{name} {value:.2f}, aim {aim:.2f}" for name, (value, aim) in aims.items() if value > aim
    ]
    noise = noise_seconds(model)
    why = f"drawing the noise alone takes {1e3 * noise:.2f} ms of processor time a step"
    reached = {
        "target": {name: aim for name, (_, aim) in aims.items()},
        "met": not missed,
        "noise_nanoseconds_a_number": 1e9 * noise / numbers(model),
    }
    return reached | ({"missed": missed, "why": why} if missed else {})


def numbers(model: str) -> int:
    """Count the numbers in all parameters of a model."""
    return sum(value.numel() for value in MODELS[model]().parameters())


def noise_seconds(model: str) -> float:
    """Measure the processor time of drawing the noise of one step, as the median of 20.

    It is measured between steps of plain SGD, as in a real run.
    """
    key = NoiseKey.from_seed(0)
    between = side("plain", model, 256, 1)
    total = torch.zeros(numbers(model), dtype=torch.int64)
    scale = NOISE * Grid.of(len(total), NOISE).steps

    def draw(step: int) -> None:
        key.add_noise(total, scale, purpose="gradient", entry="", step=step)

    times = []
    for step in range(20):
        between()
        times.append(timed(partial(draw, step), 1)[0])
    return statistics.median(times)


def show(rows: Iterable[dict[str, object]]) -> None:
    """Print the rows as a table."""
    table = Table(title="cost of a step relative to plain SGD, one thread")
    listed = list(rows)
    columns = list(listed[0])
    for column in columns:
        table.add_column(column.replace("_", " "))
    for entry in listed:
        cells = [entry[column] for column in columns]
        table.add_row(
            *[f"{value:.2f}" if isinstance(value, float) else str(value) for value in cells]
        )
    Console(width=120).print(table)


def main() -> None:
    """Measure both models at both batch sizes."""
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--steps", type=int, default=12, help="steps in a turn (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="store the rows in this file")
    parser.add_argument(
        "--peak", nargs=3, metavar=("METHOD", "MODEL", "BATCH"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.peak:
        print_peak(args.peak[0], args.peak[1], int(args.peak[2]))
        return
    torch.set_num_threads(1)
    rows = [
        row
        for model in MODELS
        for batch in (256, 1024)
        for row in measure(model, batch, args.repeats, args.steps)
    ]
    show(rows)
    if args.json:
        store_rows(args.json, rows, seed=0)


if __name__ == "__main__":
    main()
