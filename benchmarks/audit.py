"""The audit at a true epsilon of 4.

It shows how much of it a bound recovers, and whether half the noise is caught.

A perceptron learns scikit-learn's digits by DP-SGD with Poisson sampling at rate 0.1 over 1,000
steps, its noise calibrated by PLD to epsilon 4 at delta 1e-5; 10,000 canaries pass through the same
loop, each in the data with probability 1/2. Canaries are scored by their log likelihood ratio and
bounded as two Gaussian samples. `half_noise` is the same learner with a key that draws normals of
standard deviation 1/2: its ledger goes on claiming 4.

With sampling the Gaussian bound cannot quite reach 4, because Gaussian DP is only the limit of many
steps (it lies below the PLD, which is why it errs on the safe side); at rate 1 the mechanism is
exactly Gaussian and the bound tight. At 99.9 % confidence a correct mechanism is flagged once in
1,000 audits at most.

    python benchmarks/audit.py --json benchmarks/results/audit.json
    python benchmarks/audit.py --sampling-rate 1 --steps 20
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from perdure import Learner, Privacy, Stream
from perdure.auditing import Method, audit
from perdure.data import digits, split
from perdure.models import mlp
from perdure.privacy import PrivateSum
from perdure.privacy.noise import NoiseKey
from perdure.strategies import Naive
from perdure.utils import store_rows

EPSILON = 4.0
DELTA = 1e-5
HIDDEN = (32,)
LEARNING_RATE = 0.5


class HalfKey(NoiseKey):
    """Broken key, whose noise has half the standard deviation."""

    def add_noise(
        self, total: Tensor, scale: float, *, purpose: str, entry: str, step: int, nonce: str = ""
    ) -> None:
        """Add noise of half the standard deviation."""
        super().add_noise(total, scale / 2, purpose=purpose, entry=entry, step=step, nonce=nonce)


class HalfNoise(Learner):
    """Learner that claims the epsilon of a correct learner, but draws half of the noise."""

    def prepare(self, stream: Stream) -> None:
        """Replace the key of the mechanism by the broken key."""
        super().prepare(stream)
        honest = self.private_sum
        assert honest is not None
        self.session.held.private_sum = PrivateSum(
            privacy=honest.privacy,
            schedule=honest.schedule,
            ledger=honest.ledger,
            key=HalfKey.from_seed(honest.privacy.seed, "client", self.client),
        )


MECHANISMS: dict[str, type[Learner]] = {"correct": Learner, "half_noise": HalfNoise}


def learner(kind: type[Learner], stream: Stream, seed: int, rate: float, steps: int) -> Learner:
    """Return the learner under audit, untrained."""
    return kind(
        model=mlp(
            input_shape=stream.input_shape, num_classes=stream.num_classes, hidden=HIDDEN, seed=seed
        ),
        strategy=Naive(),
        optimizer=partial(torch.optim.SGD, lr=LEARNING_RATE),
        iterations=steps,
        seed=seed,
        privacy=Privacy(epsilon=EPSILON, delta=DELTA, sampling_rate=rate, seed=seed),
    )


def show(rows: list[dict[str, object]], method: str, seconds: float) -> None:
    """Print mean, spread and verdicts of each mechanism."""
    table = Table(
        title=f"Audit at true epsilon {EPSILON:g}, delta {DELTA:g}, {method} bound; {seconds:.1f} "
        "s an audit"
    )
    for column in (
        "mechanism",
        "audits",
        "mean lower bound",
        "standard deviation",
        "lowest",
        "highest",
        "flagged",
    ):
        table.add_column(column)
    for name in MECHANISMS:
        mine = [row for row in rows if row["mechanism"] == name]
        bounds = torch.tensor([row["lower_bound"] for row in mine], dtype=torch.float64)
        figures = (
            bounds.mean(),
            bounds.std() if len(mine) > 1 else torch.nan,
            bounds.min(),
            bounds.max(),
        )
        flagged = f"{sum(bool(row['flagged']) for row in mine)} of {len(mine)}"
        table.add_row(
            name, str(len(mine)), *[f"{float(figure):.2f}" for figure in figures], flagged
        )
    Console(width=120).print(table)


def main() -> None:
    """Run the benchmark with the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=int, default=20, help="number of seeds, from 0 (default %(default)s)"
    )
    parser.add_argument(
        "--canaries", type=int, default=10_000, help="in the data and out (default %(default)s)"
    )
    parser.add_argument(
        "--confidence", type=float, default=0.999, help="of the bound (default %(default)s)"
    )
    parser.add_argument(
        "--sampling-rate", type=float, default=0.1, help="1 for full batches (default %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=1000, help="of training (default %(default)s)")
    parser.add_argument(
        "--method", choices=get_args(Method), default="gaussian", help="(default %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="store the rows in this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    stream = split(digits(), scenario="class", experiences=1)
    rows: list[dict[str, object]] = []
    start = time.perf_counter()
    with Progress() as progress:
        task = progress.add_task("audits", total=args.seeds * len(MECHANISMS))
        for name, kind in MECHANISMS.items():
            for seed in range(args.seeds):
                found = audit(
                    learner(kind, stream, seed, args.sampling_rate, args.steps),
                    stream,
                    canaries=args.canaries,
                    confidence=args.confidence,
                    method=args.method,
                )
                rows.append(
                    {
                        "true_epsilon": EPSILON,
                        "mechanism": name,
                        "seed": seed,
                        "lower_bound": found.lower_bound,
                        "confidence": found.confidence,
                        "flagged": found.flagged,
                    }
                )
                progress.advance(task)
    show(rows, args.method, (time.perf_counter() - start) / len(rows))
    if args.json:
        store_rows(args.json, rows, seed=0)


if __name__ == "__main__":
    main()
