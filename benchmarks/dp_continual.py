"""Split MNIST, class-incremental, under record-level differential privacy.

Strategies at three budgets.

Five experiences of two digits. Scattering features of every image, normalised by itself (see
dp_mnist.py), then a linear model trained by private SGD; the noise is calibrated so that the worst
record of the stream spends epsilon, releases and replayed steps included. The table says what was
left of the accuracy, and what that record paid for.

No setting was searched: batch, rate and clip norm follow dp_mnist.py, scaled to an experience of
12,000 records; the strategies' own settings are round numbers. Noise is simulated from the seed, so
that the numbers can be had again.

    python benchmarks/dp_continual.py --seeds 3 --json benchmarks/results/dp_continual.json
"""

import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from rows import Row, options, show, spread, store

from perdure import Learner, Privacy, Records, Strategy, Stream
from perdure import strategies as catalogue
from perdure.data import Dataset, mnist, split
from perdure.experiment import spending
from perdure.metrics import average_accuracy, forgetting
from perdure.models import Scattering, mlp

DELTA = 1e-5
EPSILONS = (1.0, 3.0, 8.0)
COLUMNS = (
    "strategy",
    "epsilon",
    "spent",
    "seeds",
    "average_accuracy",
    "standard_error",
    "forgetting",
    "noise_multiplier",
    "paid_for",
    "seconds",
)
GROUPS = 27
BATCH = 2048
EPOCHS = 10
LEARNING_RATE = 4.0
MOMENTUM = 0.9
CLIP_NORM = 0.1
SETTINGS: dict[str, dict[str, Any]] = {
    "agem": {"memory_size": 6000},
    "bic": {"memory_size": 6000},
    "der": {"memory_size": 6000},
    "er_ace": {"memory_size": 6000},
    "ewc": {"strength": 1.0},
    "feature_distillation": {"strength": 1.0},
    "gdumb": {"memory_size": 6000},
    "gem": {"memory_size": 6000},
    "icarl": {"memory_size": 6000},
    "l2": {"strength": 0.01},
    "lwf": {"strength": 1.0},
    "mas": {"strength": 1.0},
    "ranpac": {"projection": 500},
    "replay": {"memory_size": 6000, "weighting": "equal"},
    "rwalk": {"strength": 1.0},
    "si": {"strength": 1.0},
}
"""Settings of the strategies that need settings, by file."""


def fitting() -> list[str]:
    """Return the strategies that run on any model and are allowed under privacy."""
    return [name for name in catalogue.names() if fits(catalogue.find(name).example())]


def fits(strategy: Strategy) -> bool:
    """Return True if a strategy has a loss per row and needs no special model."""
    return (
        not strategy.couples_records
        and strategy.small_model(input_shape=(8,), num_classes=2) is None
    )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of one seed: accuracy, forgetting, epsilon of the worst record, and its charges."""

    accuracy: float
    forgetting: float
    spent: float
    noise_multiplier: float
    paid: Sequence[Mapping[str, Any]]
    seconds: float


def scattered(data: Dataset) -> Dataset:
    """Replace every image by its scattering features (81, 7, 7), normalised by itself."""
    train, test = (features(records) for records in (data.train, data.test))
    return replace(
        data,
        name="mnist-scattered",
        train=train,
        test=test,
        input_shape=tuple(train.inputs.shape[1:]),
    )


def features(records: Records) -> Records:
    """Return the same records with scattering features instead of images."""
    rows = F.group_norm(Scattering()(records.inputs), GROUPS)
    return replace(records, inputs=rows, domain=None)


def run(stream: Stream, strategy: Strategy, epsilon: float, seed: int) -> Outcome:
    """Train one private model on the stream."""
    start = time.perf_counter()
    learner = Learner(
        model=mlp(
            input_shape=stream.input_shape, num_classes=stream.num_classes, hidden=(), seed=seed
        ),
        strategy=strategy,
        optimizer=partial(torch.optim.SGD, lr=LEARNING_RATE, momentum=MOMENTUM),
        epochs=EPOCHS,
        batch_size=BATCH,
        seed=seed,
        reset_optimizer=True,
        privacy=Privacy(epsilon=epsilon, delta=DELTA, clip_norm=CLIP_NORM, seed=seed),
    )
    matrix = learner.fit(stream)
    assert learner.private_sum is not None
    ledger = learner.private_sum.ledger
    return Outcome(
        accuracy=average_accuracy(matrix),
        forgetting=forgetting(matrix),
        spent=ledger.worst(DELTA)[1],
        noise_multiplier=learner.private_sum.noise_multiplier,
        paid=spending(ledger, DELTA),
        seconds=time.perf_counter() - start,
    )


def row(name: str, strategy: Strategy, epsilon: float, outcomes: list[Outcome]) -> Row:
    """Build one row to store: means over the seeds, with the standard error of the accuracy."""
    accuracies = [outcome.accuracy for outcome in outcomes]
    mean, error = spread(accuracies)
    return {
        "benchmark": "dp_continual",
        "strategy": name,
        "options": repr(strategy),
        "epsilon": epsilon,
        "delta": DELTA,
        "spent": max(outcome.spent for outcome in outcomes),
        "seeds": len(outcomes),
        "average_accuracy": mean,
        "standard_error": error,
        "forgetting": statistics.mean(outcome.forgetting for outcome in outcomes),
        "noise_multiplier": outcomes[0].noise_multiplier,
        "paid_by_the_worst_record": outcomes[0].paid,
        "seconds": statistics.mean(outcome.seconds for outcome in outcomes),
    }


def paid(spent: Sequence[Mapping[str, Any]]) -> str:
    """Describe the charges of the worst record in few words."""
    counts: dict[str, int] = {}
    for charge in spent:
        counts[charge["purpose"]] = counts.get(charge["purpose"], 0) + charge["steps"]
    return ", ".join(f"{count} {purpose}" for purpose, count in counts.items())


def main() -> None:
    """Run the benchmark with the options of the command line."""
    parser = options(__doc__ or "", seeds=3)
    parser.add_argument(
        "--epsilon", type=float, nargs="+", default=list(EPSILONS), help="targets (default 1, 3, 8)"
    )
    parser.add_argument("--strategy", nargs="+", choices=fitting(), default=fitting())
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads (default %(default)s)"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = scattered(mnist(args.data))
    with Progress() as progress:
        chosen = {name: catalogue.find(name)(**SETTINGS.get(name, {})) for name in args.strategy}
        arms = {
            (name, epsilon): strategy
            for name, strategy in chosen.items()
            for epsilon in args.epsilon
        }
        outcomes: dict[tuple[str, float], list[Outcome]] = {arm: [] for arm in arms}
        task = progress.add_task("", total=len(arms) * args.seeds)
        for seed in range(args.seeds):
            stream = split(data, scenario="class", experiences=5, seed=seed or None)
            for (name, epsilon), strategy in arms.items():
                progress.update(task, description=f"seed {seed}, {name}, epsilon {epsilon:g}")
                outcomes[name, epsilon].append(run(stream, strategy, epsilon, seed))
                gc.collect()  # the last learner holds a pool of records, in a cycle of references
                progress.advance(task)
        rows = [
            row(name, strategy, epsilon, outcomes[name, epsilon])
            for (name, epsilon), strategy in arms.items()
        ]
    title = (
        f"Split MNIST, class-incremental, delta {DELTA:g}, record level, add/remove, PLD; "
        "simulated noise"
    )
    show(
        title,
        [entry | {"paid_for": paid(entry["paid_by_the_worst_record"])} for entry in rows],
        COLUMNS,
    )
    store(args.json, rows)


if __name__ == "__main__":
    main()
