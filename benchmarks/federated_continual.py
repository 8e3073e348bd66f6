"""Continual learning in a federation: ten clients, five experiences, unequal shares of the classes.

Class-incremental MNIST and CIFAR-10, scaled down for two processor cores: `SCALES` says how many
records, rounds and epochs. The classes of every experience are spread over the clients by a
Dirichlet distribution; the smaller alpha, the more unequal. Every strategy runs without and with
record-level privacy at epsilon 8 for the worst record of each client.

The accuracy of a client is on test records with the client's own shares of classes: the accuracy of
the final global model on each class, weighted by the share of the class in the client's training
records. `worst_client` is the smallest of these. `megabytes` is the size of the arrays in all
messages, in both directions. `seconds` is processor time for everything: clients, server and
evaluation.

Trained strategies share one model, and all settings are round numbers: nothing was searched. The
analytic heads are solved on features of random convolutions, which have no trained parameter, and
need one round. Left out are the strategies of pre-trained transformers (`l2p`, `coda_prompt`,
`lora`), and `coral`, which needs a target. Noise is simulated from the seed. A strategy that is
refused has the reason in its row.

    python benchmarks/federated_continual.py --alpha 0.5 --seeds 3 --json FILE
    python benchmarks/federated_continual.py --alpha 0.1 0.05 --json FILE
    python benchmarks/federated_continual.py --dataset cifar10 --json FILE
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Message
from rows import Row, options, origin, show, spread, store, stored
from torch import nn

from perdure import Learner, PerdureError, Privacy, Records, Strategy, Stream
from perdure.data import Dataset, cifar10, dirichlet, mnist, split
from perdure.federated import Federation, Server, run_federation
from perdure.metrics import average_accuracy, forgetting
from perdure.models import RandomConvolutions, frozen, generative, mlp
from perdure.strategies import (
    AGEM,
    DER,
    ERACE,
    EWC,
    GEM,
    L2,
    LUCIR,
    MAS,
    MIR,
    NCM,
    OGD,
    SI,
    SLDA,
    BiC,
    Combine,
    CWRStar,
    FeatureDistillation,
    FedProx,
    GDumb,
    GenerativeReplay,
    ICaRL,
    Joint,
    LwF,
    Naive,
    PackNet,
    RanPAC,
    Replay,
    RWalk,
    Scaffold,
)

CLIENTS = 10
EXPERIENCES = 5
EPSILON = 8.0
DELTA = 1e-4
CLIP_NORM = 0.5
RATE, PRIVATE_RATE = 0.1, 0.5
BATCH = 32
MEMORY = 50
"""Stored records of each client."""
SMALLEST = 4
"""Smallest expected number of records of a client in an experience."""
COLUMNS = (
    "dataset",
    "alpha",
    "strategy",
    "epsilon",
    "seeds",
    "average_accuracy",
    "standard_error",
    "worst_client",
    "forgetting",
    "megabytes",
    "seconds",
    "refused",
)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Size of the runs on a data set.

    Args:
        records: number of training records of each class.
        tests: number of test records of each class.
        rounds: number of rounds per experience.
        epochs: number of passes over the records of an experience, spread over its rounds.
        hidden: widths of the layers of the perceptron.
    """

    records: int
    tests: int
    rounds: int
    epochs: int
    hidden: tuple[int, ...]


SCALES = {
    "mnist": Scale(records=400, tests=100, rounds=5, epochs=10, hidden=(64,)),
    "cifar10": Scale(records=200, tests=50, rounds=5, epochs=10, hidden=(128,)),
}
DATASETS: dict[str, Callable[..., Dataset]] = {"mnist": mnist, "cifar10": cifar10}
REPLAY = Replay(memory_size=MEMORY, weighting="equal")
STRATEGIES: dict[str, Strategy] = {
    "naive": Naive(),
    "fed_prox": FedProx(strength=0.1),
    "scaffold": Scaffold(),
    "replay": REPLAY,
    "fed_prox + replay": Combine(FedProx(strength=0.1), REPLAY),
    "lwf": LwF(),
    "ncm": NCM(),
    "slda": SLDA(),
    "ranpac": RanPAC(ridge=0.1),
    "agem": AGEM(memory_size=MEMORY),
    "bic": BiC(memory_size=MEMORY),
    "cwr_star": CWRStar(),
    "der": DER(memory_size=MEMORY, beta=0.5),
    "er_ace": ERACE(memory_size=MEMORY),
    "ewc": EWC(strength=100.0, fisher="empirical"),
    "feature_distillation": FeatureDistillation(strength=1.0),
    "gdumb": GDumb(memory_size=MEMORY),
    "gem": GEM(memory_size=MEMORY),
    "generative_replay": GenerativeReplay(temperature=2.0),
    "icarl": ICaRL(memory_size=MEMORY),
    "joint": Joint(),
    "l2": L2(strength=0.01),
    "lucir": LUCIR(memory_size=MEMORY),
    "mas": MAS(strength=1.0),
    "mir": MIR(memory_size=MEMORY),
    "ogd": OGD(),
    "packnet": PackNet(),
    "rwalk": RWalk(strength=1.0),
    "si": SI(strength=1.0),
}
SIX = ("naive", "fed_prox", "replay", "fed_prox + replay", "lwf", "ranpac")
"""Strategies for CIFAR-10."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of one seed: percent, bytes and seconds."""

    accuracy: float
    worst_client: float
    forgetting: float
    bytes: int
    seconds: float


def first(records: Records, count: int) -> Records:
    """Return the first `count` records of every class, in their order."""
    labels = records.labels
    places = [
        torch.nonzero(labels == label).flatten()[:count] for label in range(int(labels.max()) + 1)
    ]
    return records.take(torch.cat(places).sort().values)


def stream_of(data: Dataset, scale: Scale, seed: int) -> Stream:
    """Return a class-incremental stream of the first records of every class."""
    train, test = first(data.train, scale.records), first(data.test, scale.tests)
    small = replace(data, train=train, test=test)
    return split(small, scenario="class", experiences=EXPERIENCES, seed=seed or None)


def model_of(strategy: Strategy, stream: Stream, scale: Scale, seed: int) -> nn.Module:
    """Return the model of a strategy, equal for all parties of a run."""
    sizes: dict[str, Any] = {"input_shape": stream.input_shape, "num_classes": stream.num_classes}
    if isinstance(strategy, NCM | SLDA | RanPAC):
        channels = stream.input_shape[0]
        return frozen(RandomConvolutions(channels=channels, filters=16, seed=seed), **sizes)
    if isinstance(strategy, LUCIR):
        return mlp(**sizes, hidden=scale.hidden, seed=seed, activation="tanh", head="cosine")
    model = mlp(**sizes, hidden=scale.hidden, seed=seed)
    if isinstance(strategy, GenerativeReplay):
        return generative(model, input_shape=stream.input_shape, seed=seed)
    return model


def run(
    data: Dataset, scale: Scale, alpha: float, strategy: Strategy, private: bool, seed: int
) -> Outcome:
    """Run one federation, and measure its global model."""
    stream = stream_of(data, scale, seed)
    streams = dirichlet(
        stream, clients=CLIENTS, alpha=alpha, min_size=SMALLEST, seed=seed, exact=False
    )
    analytic = isinstance(strategy, NCM | SLDA | RanPAC)

    def make(client: int) -> Learner:
        return Learner(
            model=model_of(strategy, stream, scale, seed),
            strategy=strategy,
            optimizer=partial(torch.optim.SGD, lr=PRIVATE_RATE if private else RATE),
            epochs=1 if analytic else scale.epochs,
            batch_size=BATCH,
            seed=seed,
            privacy=Privacy(epsilon=EPSILON, delta=DELTA, clip_norm=CLIP_NORM, seed=seed)
            if private
            else None,
        )

    traffic = Traffic()
    start = time.process_time()
    federation = Federation(clients=CLIENTS, rounds=1 if analytic else scale.rounds, seed=seed)
    server = run_federation(make, streams, federation, listen=traffic.add)
    matrix = torch.tensor(server.learner.matrix, dtype=torch.float64)
    return Outcome(
        accuracy=average_accuracy(matrix),
        worst_client=100 * min(client_accuracies(server, streams, first(data.test, scale.tests))),
        forgetting=forgetting(matrix),
        bytes=traffic.bytes,
        seconds=time.process_time() - start,
    )


class Traffic:
    """Size of the arrays in all messages of a federation, in bytes."""

    def __init__(self) -> None:
        self.bytes = 0

    def add(self, message: Message) -> None:
        """Add the arrays of one message."""
        if not message.has_content():
            return
        for record in message.content.values():
            if isinstance(record, ArrayRecord):
                self.bytes += sum(
                    math.prod(array.shape) * np.dtype(array.dtype).itemsize
                    for array in record.values()
                )


def client_accuracies(server: Server, streams: Sequence[Stream], tests: Records) -> list[float]:
    """Return the accuracy of the global model for every client, by its own shares of classes."""
    learner = server.learner
    with torch.no_grad():
        guesses = learner.predictor(0, after=EXPERIENCES - 1)(tests.inputs).argmax(1)
    right = (guesses == tests.labels).double()
    classes = range(learner.stream.num_classes)
    by_class = torch.stack([right[tests.labels == label].mean() for label in classes])
    found = []
    for stream in streams:
        labels = torch.cat([experience.train.labels for experience in stream])
        shares = torch.bincount(labels, minlength=len(classes)).double()
        found.append(float(shares @ by_class / shares.sum()))
    return found


def settings(dataset: str, alpha: float, name: str, private: bool) -> Row:
    """Return all settings of a row except its seeds; a row with other settings is run again."""
    return {
        "dataset": dataset,
        "alpha": alpha,
        "strategy": name,
        "options": repr(STRATEGIES[name]),
        "epsilon": EPSILON if private else None,
        "delta": DELTA if private else None,
        "clients": CLIENTS,
        "scale": repr(SCALES[dataset]),
    }


def row(asked: Row, outcomes: list[Outcome], refused: str | None) -> Row:
    """Build one row to store: means over the seeds, or the reason of a refusal."""
    base = {"benchmark": "federated_continual", **asked, "refused": refused, **origin()}
    base |= {"seeds": len(outcomes), "outcomes": [asdict(outcome) for outcome in outcomes]}
    if not outcomes:
        return base | dict.fromkeys(set(COLUMNS) - set(base))
    mean, error = spread([outcome.accuracy for outcome in outcomes])
    return base | {
        "average_accuracy": mean,
        "standard_error": error,
        "worst_client": statistics.mean(outcome.worst_client for outcome in outcomes),
        "forgetting": statistics.mean(outcome.forgetting for outcome in outcomes),
        "megabytes": statistics.mean(outcome.bytes for outcome in outcomes) / 1e6,
        "seconds": statistics.mean(outcome.seconds for outcome in outcomes),
    }


def measured(data: Dataset, asked: Row, done: list[Outcome], seeds: int) -> Row:
    """Run the seeds of one row that are not done; a refusal of the library ends it."""
    outcomes = list(done)
    scale, strategy = SCALES[asked["dataset"]], STRATEGIES[asked["strategy"]]
    try:
        for seed in range(len(done), seeds):
            private = asked["epsilon"] is not None
            outcomes.append(run(data, scale, asked["alpha"], strategy, private, seed))
            gc.collect()  # learners are in cycles of references
    except PerdureError as error:
        return row(asked, [], str(error).partition(";")[0])
    return row(asked, outcomes, None)


def main() -> None:
    """Run the benchmark with the options of the command line."""
    parser = options(__doc__ or "", seeds=1, resumed=True)
    parser.add_argument("--dataset", choices=list(SCALES), default="mnist")
    parser.add_argument("--alpha", type=float, nargs="+", default=[0.5], help="default 0.5")
    parser.add_argument(
        "--strategy", nargs="+", choices=list(STRATEGIES), help="default: all; six for CIFAR-10"
    )
    parser.add_argument("--private", choices=("yes", "no", "both"), default="both")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = args.strategy or (SIX if args.dataset == "cifar10" else tuple(STRATEGIES))
    private = {"yes": (True,), "no": (False,), "both": (False, True)}[args.private]
    asked = [
        settings(args.dataset, alpha, name, each)
        for alpha in args.alpha
        for name in names
        for each in private
    ]
    rows = stored(args.json)
    data = DATASETS[args.dataset](args.data)
    for entry in asked:
        old = [each for each in rows if cell(each) == cell(entry)]
        same = [each for each in old if all(each[key] == entry[key] for key in entry)]
        if same and (same[0]["refused"] or same[0]["seeds"] >= args.seeds):
            continue
        done = [Outcome(**each) for row in same for each in row["outcomes"]]
        new = measured(data, entry, done, args.seeds)
        at = rows.index(old[0]) if old else len(rows)
        rows[at : at + 1] = [new]
        show("", [new], COLUMNS)
        store(args.json, rows)
    cells = [cell(entry) for entry in asked]
    title = f"{CLIENTS} clients, {EXPERIENCES} experiences, class-incremental; scaled down"
    show(title, [entry for entry in rows if cell(entry) in cells], COLUMNS)


def cell(entry: Row) -> tuple[object, ...]:
    """Return the cell of the table that a row fills."""
    return tuple(entry[key] for key in ("dataset", "alpha", "strategy", "epsilon"))


if __name__ == "__main__":
    main()
