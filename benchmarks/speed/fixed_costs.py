"""Costs that do not grow with the steps: guard, calibration, blocks, ledger, opening, start.

Each row has the cost of an operation the first time and when repeated: medians of alternating runs,
in processor time, or as a count of what is used.

    python benchmarks/speed/fixed_costs.py --repeats 5
    python benchmarks/speed/fixed_costs.py guard calibration --repeats 3
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from perdure import Experience, Learner, Privacy, Records, Strategy, Stream
from perdure.models import mlp
from perdure.privacy import Account, Entry
from perdure.privacy.accounting import pld_epsilon
from perdure.strategies import EWC, Naive, Replay
from perdure.utils import store_rows

Row = dict[str, object]

SIMULATED = Privacy(noise_multiplier=1.0, delta=1e-7, seed=0)
CLASSES = 2
PARTITIONS = 100
ENTRIES = 10_000
STEPS = 2_000
BLOCKS = 200
MILLION = 1_000_000
TARGETS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 3.0, 10.0, 50.0)
LENGTHS = (1, 5, 20)


def stream_of(records: int, experiences: int = 1, features: int = 4) -> Stream:
    """Make a stream of random records of two classes; no record is in two experiences."""
    draws = torch.Generator().manual_seed(0)
    found = []
    for index in range(experiences):
        ids = torch.arange(records) + index * records
        own = Records(
            inputs=torch.rand(records, features, generator=draws),
            labels=ids % CLASSES,
            ids=ids,
            partition=f"experience {index}",
            declared_size=records,
        )
        found.append(Experience(index=index, train=own, test=own, classes=(0, 1), stage=index))
    return Stream(
        name="random",
        scenario="domain",
        num_classes=CLASSES,
        input_shape=(features,),
        experiences=tuple(found),
        assigned_by_record=True,
    )


def learner_of(stream: Stream, strategy: Strategy, hidden: int = 16, **options: object) -> Learner:
    """Make a learner with a small model for a stream."""
    model = mlp(input_shape=stream.input_shape, num_classes=CLASSES, hidden=(hidden,), seed=0)
    given = {"privacy": SIMULATED, "iterations": 4, "batch_size": 64} | options
    optimizer = partial(torch.optim.SGD, lr=0.1)
    return Learner(model=model, strategy=strategy, optimizer=optimizer, **given)  # type: ignore[arg-type]


def spent(work: Callable[[], object]) -> float:
    """Measure the processor time of a function in milliseconds."""
    start = time.process_time()
    work()
    return 1e3 * (time.process_time() - start)


def pair(first: list[float], again: list[float]) -> Row:
    """Return the medians of first and repeated times, and of their ratios."""
    ratios = [late / early for early, late in zip(first, again, strict=True)]
    return {
        "first_milliseconds": statistics.median(first),
        "again_milliseconds": statistics.median(again),
        "ratio": statistics.median(ratios),
        "repeats": len(first),
    }


def guard(repeats: int) -> Iterator[Row]:
    """Time the preparation of the first client of a model structure, and of a second client."""
    for hidden in (256, 4096):
        stream = stream_of(640, features=784)
        learner_of(stream, EWC(strength=1.0), hidden, seed=repeats).prepare(stream)
        first: list[float] = []
        again: list[float] = []
        for seed in range(repeats):
            for times in (first, again):
                learner = learner_of(stream, EWC(strength=1.0), hidden, seed=seed)
                times.append(spent(partial(learner.prepare, stream)))
        yield {"what": f"private learner prepared, {hidden} units", **pair(first, again)}


def schedules(repeats: int) -> Iterator[Row]:
    """Time 2,000 private steps in 200 blocks, without and with a learning-rate schedule."""
    stream = stream_of(640)

    def scheduler(optimizer: Optimizer, steps: int) -> CosineAnnealingLR:
        return CosineAnnealingLR(optimizer, T_max=steps)

    def run(scheduler: object = None) -> float:
        options = {"iterations": STEPS, "blocks": BLOCKS, "scheduler": scheduler}
        learner = learner_of(stream, Naive(), 16, **options)
        learner.prepare(stream)
        learner.begin(0)
        blocks = learner.training.remaining_blocks(0, 0)
        return spent(lambda: [learner.train(block) for block in blocks])

    run()
    times = [(run(), run(scheduler)) for _ in range(repeats)]
    found = pair([plain for plain, _ in times], [with_one for _, with_one in times])
    yield {
        "what": f"{STEPS} steps in {BLOCKS} blocks, with a schedule over without",
        "without_milliseconds": found["first_milliseconds"],
        "with_milliseconds": found["again_milliseconds"],
        "ratio": found["ratio"],
        "repeats": repeats,
    }


def ledger(repeats: int) -> Iterator[Row]:
    """Time the epsilon of a long ledger: first, again, and after one more entry."""
    first: list[float] = []
    again: list[float] = []
    grown: list[float] = []
    for _ in range(repeats):
        account = Account()
        account.sizes |= {f"partition {i}": 1000 for i in range(PARTITIONS)}
        account.entries += [entry(number) for number in range(ENTRIES)]
        work = partial(account.epsilon, delta=1e-5)
        pld_epsilon.cache_clear()
        first.append(spent(work))
        again.append(spent(work))
        account.entries.append(entry(ENTRIES))
        grown.append(spent(work))
    yield {
        "what": f"epsilon of {PARTITIONS} partitions and {ENTRIES} entries",
        **pair(first, again),
        "one_entry_more_milliseconds": statistics.median(grown),
    }


def entry(number: int) -> Entry:
    """Make a ledger entry for one step of one partition."""
    return Entry(
        purpose="gradient",
        mechanism="gaussian",
        noise_multiplier=1.0 + 0.1 * (number % 3),
        clip_norm=1.0,
        first_step=number,
        steps=1,
        sampling="poisson",
        scope={f"partition {number % PARTITIONS}": 0.01},
        data="",
        start="",
        simulated=True,
    )


def begin(repeats: int) -> Iterator[Row]:
    """Time the opening of an experience of a million records, and opening it again."""
    stream = stream_of(MILLION)
    first: list[float] = []
    again: list[float] = []
    for _ in range(repeats):
        learner = learner_of(stream, Naive())
        learner.prepare(stream)
        first.append(spent(partial(learner.begin, 0)))
        again.append(spent(partial(learner.begin, 0)))
    yield {"what": f"experience of {MILLION} records opened", **pair(first, again)}


def calibration(repeats: int) -> Iterator[Row]:
    """Count the loss distributions of a calibration: first, and again in the same folder."""
    for experiences in LENGTHS:
        stream = stream_of(1000, experiences)
        for target in TARGETS:
            privacy = Privacy(epsilon=target, delta=1e-5, seed=0)
            with tempfile.TemporaryDirectory() as folder:
                counts = []
                times = []
                for _ in range(2):
                    pld_epsilon.cache_clear()  # as in another process
                    learner = learner_of(
                        stream, Replay(memory_size=100), privacy=privacy, folder=Path(folder)
                    )
                    times.append(spent(partial(learner.prepare, stream)))
                    learner.close()
                    counts.append(pld_epsilon.cache_info().misses)
            yield {
                "what": f"calibration to epsilon {target:g} over {experiences} experiences",
                "loss_distributions": counts[0],
                "loss_distributions_again": counts[1],
                "first_milliseconds": times[0],
                "again_milliseconds": times[1],
            }


def start(repeats: int) -> Iterator[Row]:
    """Measure the processor time of the command line's help, and of importing torch alone."""
    commands = {
        "perdure --help": "from perdure.cli.main import main; main()",
        "perdure ledger show --help": "from perdure.cli.main import main; main()",
        "import torch": "import torch",
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, program in commands.items():
            words = name.split()[1:] if "--help" in name else []
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(
                [sys.executable, "-c", program, *words], check=True, stdout=subprocess.DEVNULL
            )
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            user = after.ru_utime - before.ru_utime
            times[name].append(1e3 * (user + after.ru_stime - before.ru_stime))
    for name, each in times.items():
        yield {"what": name, "milliseconds": statistics.median(each), "repeats": repeats}


ROWS: dict[str, Callable[[int], Iterator[Row]]] = {
    "guard": guard,
    "schedules": schedules,
    "ledger": ledger,
    "begin": begin,
    "calibration": calibration,
    "start": start,
}


def main() -> None:
    """Measure the requested rows, print them, and store them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", help=f"some of {', '.join(ROWS)}; default all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="store the rows in this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: list[Row] = []
    for name in args.rows or ROWS:
        for row in ROWS[name](args.repeats):
            found.append({"benchmark": "fixed_costs", "row": name, **row})
            print(", ".join(f"{key} {shown(value)}" for key, value in found[-1].items()))
    if args.json:
        store_rows(args.json, found, seed=0)


def shown(value: object) -> str:
    """Format a number with four digits; return other values as text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
