"""MNIST under record-level differential privacy, from scratch.

Scattering features and a linear model.

Wavelets that are not learned, group normalisation of every record by itself, then logistic
regression by private SGD.

Accounted: all that looks at more than one record, which is every step of the
gradient (PLD, add/remove, Poisson sampling); the ledger holds nothing else. Features and
normalisation are functions of one record. Declared public: the number of training records, the ten
classes, the range of pixels, and the test set.

Where the settings come from: from another data set. They are those published for Fashion-MNIST (27
groups, batch 8,192, learning rate 16, momentum 0.9, clip norm 0.1, 40 epochs, a constant rate, the
last iterate), used as they are at both values of epsilon. No setting was changed for MNIST: a trial
on 50,000 training records, measured on the other 10,000, compared the last iterate with the average
of the second half, and one on CIFAR-10 in grey also a falling rate; the recipe stayed as published.
Noise is simulated from the seed, so that the numbers can be had again.

Published value: 98.7 at epsilon 3, with settings chosen on MNIST. Tramer and Boneh 2021,
"Differentially private learning needs better features (or much more data)".

    python benchmarks/dp_mnist.py --seeds 3 --json benchmarks/results/dp_mnist.json
"""

import time
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from rich.progress import Progress
from rows import options, show, spread, store
from torch import Tensor

from perdure import Experience, Learner, Privacy, Records, Stream
from perdure.data import Dataset, mnist
from perdure.models import Scattering, mlp
from perdure.strategies import Naive

DELTA = 1e-5
COLUMNS = (
    "epsilon",
    "spent",
    "seeds",
    "accuracy",
    "standard_error",
    "published",
    "noise_multiplier",
    "seconds",
    "processor_seconds",
)
GROUPS = 27
BATCH = 8192
LEARNING_RATE = 16.0
MOMENTUM = 0.9
CLIP_NORM = 0.1
EPOCHS = 40
PUBLISHED = {3.0: 98.7}
"""Published accuracy in percent, by epsilon."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of one seed: test accuracy in percent, noise multiplier, epsilon, and seconds."""

    accuracy: float
    noise_multiplier: float
    spent: float
    times: Tensor


def clocks() -> Tensor:
    """Return the seconds (2,) by the wall clock, and of processor time over all threads."""
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


def scattered(data: Dataset) -> Stream:
    """Make a stream of one experience with all classes, of scattering features (81, 7, 7).

    Each image is normalised by itself.
    """
    train, test = (features(records) for records in (data.train, data.test))
    whole = Experience(index=0, train=train, test=test, classes=tuple(range(data.num_classes)))
    return Stream(
        name="mnist-scattered",
        scenario="class",
        experiences=(whole,),
        num_classes=data.num_classes,
        input_shape=tuple(train.inputs.shape[1:]),
        assigned_by_record=True,
    )


def features(records: Records) -> Records:
    """Return the same records with scattering features instead of images."""
    seen: Tensor = F.group_norm(Scattering()(records.inputs), GROUPS)
    return Records(inputs=seen, labels=records.labels, ids=records.ids, partition=records.partition)


def run(stream: Stream, epsilon: float, seed: int) -> Outcome:
    """Train one private linear model."""
    start = clocks()
    learner = Learner(
        model=mlp(
            input_shape=stream.input_shape, num_classes=stream.num_classes, hidden=(), seed=seed
        ),
        strategy=Naive(),
        optimizer=partial(torch.optim.SGD, lr=LEARNING_RATE, momentum=MOMENTUM),
        epochs=EPOCHS,
        batch_size=BATCH,
        seed=seed,
        privacy=Privacy(epsilon=epsilon, delta=DELTA, clip_norm=CLIP_NORM, seed=seed),
    )
    accuracy = float(learner.fit(stream)[-1, -1])
    assert learner.private_sum is not None
    mechanism = learner.private_sum
    times = clocks() - start
    _, spent = mechanism.ledger.worst(DELTA)
    return Outcome(
        accuracy=accuracy, noise_multiplier=mechanism.noise_multiplier, spent=spent, times=times
    )


def row(epsilon: float, outcomes: list[Outcome], preparing: Tensor) -> dict[str, object]:
    """Build one row to store; the seconds of a seed include those of the features."""
    accuracies = [outcome.accuracy for outcome in outcomes]
    seconds, processor = (
        preparing + sum(outcome.times for outcome in outcomes) / len(outcomes)
    ).tolist()
    mean, error = spread(accuracies)
    return {
        "benchmark": "dp_mnist",
        "epsilon": epsilon,
        "delta": DELTA,
        "seeds": len(outcomes),
        "accuracy": mean,
        "standard_error": error,
        "accuracies": accuracies,
        "noise_multiplier": outcomes[0].noise_multiplier,
        "spent": max(outcome.spent for outcome in outcomes),
        "seconds": seconds,
        "processor_seconds": processor,
        "seconds_for_features": preparing[0].item(),
        "published": PUBLISHED.get(epsilon),
    }


def main() -> None:
    """Run the benchmark with the options of the command line."""
    parser = options(__doc__ or "", seeds=3)
    parser.add_argument(
        "--epsilon", type=float, nargs="+", default=[3.0, 1.0], help="targets (default 3 and 1)"
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="torch threads (default %(default)s)"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    start = clocks()
    stream = scattered(mnist(args.data))
    preparing = clocks() - start
    with Progress() as progress:
        task = progress.add_task("seeds", total=len(args.epsilon) * args.seeds)
        for epsilon in args.epsilon:
            outcomes = []
            for seed in range(args.seeds):
                progress.update(task, description=f"epsilon {epsilon:g}, seed {seed}")
                outcomes.append(run(stream, epsilon, seed))
                progress.advance(task)
            rows.append(row(epsilon, outcomes, preparing))
    title = f"MNIST, delta {DELTA:g}, record level, add/remove, PLD; simulated noise"
    show(title, rows, COLUMNS, digits=3)
    store(args.json, rows)


if __name__ == "__main__":
    main()
