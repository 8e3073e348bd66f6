"""Growth of the cost of a ledger with its length.

One ledger in a file grows to 16,000 entries over ten partitions, with three noise multipliers. At
1,000, 4,000 and 16,000 entries it is measured, in processor time: one charge (the mean of the last
200 ones), a repeated `epsilon()`, an `epsilon()` after one more charge, a statement, and opening
the file again, which verifies every line. An epsilon after a charge composes the loss distribution
of one partition again, whose length grows with the number of compositions.

`exponent` is the slope between the last two lengths on logarithmic scales: 0 is constant, 1 is
proportional, more is superlinear. `most` is the exponent that is aimed at. A slope is about 0.1 off
on a busy machine, more for costs of a few microseconds. Every charge waits for the disk, which is
not counted; set TMPDIR to a folder in memory to save these minutes.

    python benchmarks/speed/ledger.py --repeats 3
"""

import argparse
import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from perdure.privacy import Entry, Ledger
from perdure.privacy.accounting import pld_epsilon
from perdure.privacy.noise import NoiseKey
from perdure.utils import store_rows

Row = dict[str, object]

LENGTHS = (1_000, 4_000, 16_000)
PARTITIONS = 10
LAST = 200
"""Number of charges up to a length whose mean time is that of one charge."""
AGAIN = 1_000
"""Number of repeated epsilons whose mean time is that of one."""
FEW = 5
"""Number of statements and openings whose mean time is that of one."""
DELTA = 1e-5
KEY = NoiseKey.from_seed(0)
ROWS = {
    "charge": 0,
    "epsilon again": 0,
    "epsilon after one charge": 1,
    "statement": 0,
    "open": 1,
}
"""Operations, and the largest exponent of the length that is aimed at."""


def opened(path: Path) -> Ledger:
    """Open the ledger of a file, or make it."""
    return Ledger.open(path, key=KEY)


def entry(number: int) -> Entry:
    """Make the entry for one step of one partition."""
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


def spent(work: Callable[[], object], times: int = 1) -> float:
    """Measure the processor time of one call in milliseconds, the mean of `times` calls."""
    start = time.process_time()
    for _ in range(times):
        work()
    return 1e3 * (time.process_time() - start) / times


def grown(path: Path) -> dict[str, list[float]]:
    """Grow one ledger, and return the milliseconds of each operation at every length."""
    pld_epsilon.cache_clear()
    ledger = opened(path)
    for number in range(PARTITIONS):
        ledger.declare(f"partition {number}", 1000)
    entries = iter([entry(number) for number in range(max(LENGTHS) + len(LENGTHS))])
    found: dict[str, list[float]] = defaultdict(list)
    for length in LENGTHS:
        while len(ledger.entries) < length - LAST:
            ledger.charge(next(entries))
        found["charge"].append(spent(lambda: ledger.charge(next(entries)), LAST))
        ledger.epsilon(delta=DELTA)
        found["epsilon again"].append(spent(lambda: ledger.epsilon(delta=DELTA), AGAIN))
        found["statement"].append(spent(lambda: ledger.statement(DELTA), FEW))
        ledger.charge(next(entries))
        found["epsilon after one charge"].append(spent(lambda: ledger.epsilon(delta=DELTA)))
        found["open"].append(spent(lambda: opened(path), FEW))
    return found


def rows(repeats: int) -> list[Row]:
    """Grow ledgers in turn, and return a row for each operation."""
    runs = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(grown(Path(folder) / "ledger.jsonl"))
    found: list[Row] = []
    for name, most in ROWS.items():
        times = [statistics.median(each) for each in zip(*(run[name] for run in runs), strict=True)]
        slope = math.log(times[-1] / times[-2]) / math.log(LENGTHS[-1] / LENGTHS[-2])
        found.append(
            {
                "benchmark": "ledger",
                "row": name,
                "sizes": list(LENGTHS),
                "milliseconds": times,
                "exponent": slope,
                "most": most,
                "repeats": repeats,
            }
        )
    return found


def main() -> None:
    """Measure all rows, print them, and store them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="store the rows in this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = rows(args.repeats)
    for row in found:
        print(row)
    if args.json:
        store_rows(args.json, found, seed=0)


if __name__ == "__main__":
    main()
