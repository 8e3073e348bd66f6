"""Cost of importances at the end of an experience, for EWC (Fisher information) and MAS.

Every row is a ratio of processor time, both sides in one process, turn by turn; the median over
the repeats. No privacy: the sums are exact.

    exact, sampled, empirical, mas   ResNet-18 of width 8, 300 records of 3 x 32 x 32, 10 classes,
                                     over one plain forward and backward pass of the same records
    classes                          EWC as it is by default, 1,000 classes over 10 (MLP)
    classes_exact                    EWC(fisher="exact"), 1,000 classes over 10 (MLP); it takes
                                     minutes, so only where it is named
    linear                           MLP 2 x 400, by layers over row by row (empirical)

Peak memory is that of the importance alone, less what was there before, in a process of its own,
the median of three.

    python benchmarks/speed/importance.py exact classes --repeats 5
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from perdure import Experience, Learner, Records, Strategy, Stream
from perdure.contract import Forward
from perdure.data import Batch
from perdure.models import mlp, resnet18
from perdure.queries import SquaredGradient
from perdure.strategies import EWC, MAS
from perdure.utils import store_rows

RECORDS = 300
IMAGE = (3, 32, 32)
NUMBERS = (64,)
HIDDEN = (256,)
WIDE = (400, 400)
STRENGTH = 1.0
ON_RESNET: dict[str, Strategy] = {
    "exact": EWC(strength=STRENGTH, fisher="exact"),
    "sampled": EWC(strength=STRENGTH, fisher="sampled"),
    "empirical": EWC(strength=STRENGTH, fisher="empirical"),
    "mas": MAS(strength=STRENGTH),
}
TARGETS = {"exact": 11.0, "classes": 10.0}
"""Largest ratio that is aimed at, by row."""
PEAK_TARGETS = {"exact": 300.0}
"""Largest growth of the peak memory in MiB that is aimed at, by row."""

Job = Callable[[], object]


def stream_of(shape: tuple[int, ...], classes: int) -> Stream:
    """Make one experience of random records; speed does not depend on values."""
    place = torch.Generator().manual_seed(0)
    inputs = torch.rand(RECORDS, *shape, generator=place)
    records = Records(inputs=inputs, labels=torch.randint(0, classes, (RECORDS,), generator=place))
    experience = Experience(index=0, train=records, test=records, classes=tuple(range(classes)))
    return Stream(
        name="importance",
        scenario="domain",
        experiences=(experience,),
        num_classes=classes,
        input_shape=shape,
        assigned_by_record=True,
    )


def importance(model: nn.Module, stream: Stream, strategy: Strategy) -> Job:
    """Prepare the end of an experience, so that it can be repeated."""
    learner = Learner(
        model=model,
        strategy=strategy,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        iterations=1,
        batch_size=32,
    )
    learner.prepare(stream)
    learner.begin(0)
    model.eval()
    return lambda: strategy.after_experience(learner.curator, learner.params, learner.state)


def one_pass(model: nn.Module, stream: Stream) -> Job:
    """Prepare a plain forward and backward pass over all records."""
    records = stream[0].train

    def step() -> None:
        model.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(records.inputs), records.labels))

    return step


def on_resnet(strategy: Strategy) -> tuple[Job, Job]:
    """Prepare importances of ResNet-18, and one forward and backward pass."""
    stream = stream_of(IMAGE, 10)
    model = resnet18(input_shape=IMAGE, num_classes=10, width=8, seed=0)
    return importance(model, stream, strategy), one_pass(model, stream)


def by_classes(strategy: Strategy) -> tuple[Job, Job]:
    """Prepare importances with 1,000 classes, and with 10."""
    many, few = (
        importance(
            mlp(input_shape=NUMBERS, num_classes=classes, hidden=HIDDEN, seed=0),
            stream_of(NUMBERS, classes),
            strategy,
        )
        for classes in (1000, 10)
    )
    return many, few


def linear() -> tuple[Job, Job]:
    """Prepare importances of linear layers, by layers and from rows of 50 records at a time."""
    stream = stream_of((784,), 10)
    model = mlp(input_shape=(784,), num_classes=10, hidden=WIDE, seed=0)

    def terms(forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        losses = F.cross_entropy(forward(batch.inputs), batch.labels, reduction="none")[:, None]
        return losses, torch.ones_like(losses)

    query = SquaredGradient(terms)
    batch = Batch.current(stream[0].train, 0)

    @torch.no_grad()
    def by_rows() -> None:
        for start in range(0, RECORDS, 50):
            rows = query(Forward(model), batch.take(slice(start, start + 50)))
            for value in rows.values():
                value.sum(0)

    return importance(model, stream, EWC(strength=STRENGTH, fisher="empirical")), by_rows


ROWS: dict[str, Callable[[], tuple[Job, Job]]] = {
    **{name: partial(on_resnet, strategy) for name, strategy in ON_RESNET.items()},
    "classes": partial(by_classes, EWC(strength=STRENGTH)),
    "classes_exact": partial(by_classes, EWC(strength=STRENGTH, fisher="exact")),
    "linear": linear,
}

SLOW = "classes_exact"


def seconds(job: Job) -> float:
    """Measure the processor time of a function."""
    start = time.process_time()
    job()
    return time.process_time() - start


def measure(name: str, repeats: int) -> dict[str, object]:
    """Return the median of the ratios over all repeats, after one that is not counted."""
    pair = ROWS[name]()
    for job in pair:
        job()
    times = [tuple(seconds(job) for job in pair) for _ in range(repeats)]
    ratios = [mine / other for mine, other in times]
    ratio = statistics.median(ratios)
    peak = peak_memory(name)
    aims = ((ratio, TARGETS.get(name)), (peak, PEAK_TARGETS.get(name)))
    return {
        "benchmark": "importance",
        "row": name,
        "ratio": ratio,
        "lowest": min(ratios),
        "highest": max(ratios),
        "seconds": statistics.median(mine for mine, _ in times),
        "other_seconds": statistics.median(other for _, other in times),
        "peak_mib": peak,
        "target": TARGETS.get(name),
        "peak_target": PEAK_TARGETS.get(name),
        "met": all(aim is None or value <= aim for value, aim in aims),
        "repeats": repeats,
    }


def peak_memory(name: str) -> float:
    """Return the growth of the peak in MiB, as the median of three new processes."""
    order = [sys.executable, str(Path(__file__)), "--peak", name]
    runs = [
        subprocess.run(order, capture_output=True, text=True, check=True).stdout for _ in range(3)
    ]
    return statistics.median(float(run.split()[-1]) for run in runs)


def print_peak(name: str) -> None:
    """In the new process: compute the importances once, and print the growth of the peak."""
    job, _ = ROWS[name]()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident
    before = _status("VmRSS")
    job()
    print(max(0.0, _status("VmHWM") - before))


def _status(field: str) -> float:
    """Read one value of the process's status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def show(rows: list[dict[str, object]]) -> None:
    """Print the rows as a table."""
    table = Table(title="processor time of importances, over what the module's text says")
    for column in rows[0]:
        table.add_column(column.replace("_", " "))
    for entry in rows:
        cells = [f"{c:.3f}" if isinstance(c, float) else str(c) for c in entry.values()]
        table.add_row(*cells)
    Console(width=160).print(table)


def main() -> None:
    """Measure the given rows, or all but the slow one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(ROWS)}; all but {SLOW} by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="store the rows in this file")
    parser.add_argument("--peak", metavar="ROW", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        print_peak(args.peak)
        return
    unknown = set(args.rows) - set(ROWS)
    if unknown:
        parser.error(f"no row {', '.join(sorted(unknown))}; allowed: {', '.join(ROWS)}")
    names = args.rows or [name for name in ROWS if name != SLOW]
    rows = [measure(name, args.repeats) for name in names]
    show(rows)
    if args.json:
        store_rows(args.json, rows, seed=0)


if __name__ == "__main__":
    main()
