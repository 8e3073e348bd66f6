"""Robust aggregators with and without hostile clients, in a federation of digits.

15 clients hold the digits at a Dirichlet concentration of 0.5 or 1.0; 3 of them are hostile:

- sign flip: the update is sent with the opposite sign, ten times as long;
- model replacement: the client trains on labels y + 1, and sends 15 times its update, so that
  FedAvg would take its model (Bagdasaryan et al. 2020, section 4.2);
- label flip: the client trains on labels 9 - y, and is honest otherwise.

`cost` is the loss of accuracy against the same aggregator without hostile clients. A federation
that diverges, or in which too few clients are left, counts as chance, 10 %.

    python benchmarks/federated_robust.py --seeds 3 --json benchmarks/results/federated_robust.json
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from flwr.serverapp.strategy import (
    Bulyan,
    FedAvg,
    FedMedian,
    FedTrimmedAvg,
    Krum,
    MultiKrum,
    Strategy,
)
from rows import Row, options, origin, show, spread, store, stored

from perdure import Learner, Records, Stream
from perdure.data import digits, dirichlet, split
from perdure.errors import FederationError, RunawayError
from perdure.federated import (
    ClipUpdates,
    Federation,
    NearestNeighbours,
    PreAggregator,
    fit_federated,
)
from perdure.models import mlp
from perdure.strategies import Naive

CLIENTS = 15
HOSTILE = 3
ROUNDS = 60
ALPHAS = (0.5, 1.0)
NEAR = NearestNeighbours(hostile=HOSTILE)


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Behaviour of the hostile clients.

    Args:
        relabel: function from labels to the labels that they train on; None for their own.
        scale: factor of the update that they send.
    """

    relabel: Callable[[torch.Tensor], torch.Tensor] | None = None
    scale: float = 1.0


ATTACKS = {
    "none": Attack(),
    "sign flip": Attack(scale=-10.0),
    "model replacement": Attack(relabel=lambda labels: (labels + 1) % 10, scale=float(CLIENTS)),
    "label flip": Attack(relabel=lambda labels: 9 - labels),
}
AGGREGATORS: dict[str, tuple[Callable[[], Strategy], tuple[PreAggregator, ...]]] = {
    "FedAvg": (FedAvg, ()),
    "FedAvg, clipped updates": (FedAvg, (ClipUpdates(),)),
    "FedMedian, neighbours": (FedMedian, (NEAR,)),
    "FedTrimmedAvg, neighbours": (partial(FedTrimmedAvg, beta=HOSTILE / CLIENTS), (NEAR,)),
    "Krum, neighbours": (partial(Krum, num_malicious_nodes=HOSTILE), (NEAR,)),
    "MultiKrum, neighbours": (
        partial(MultiKrum, num_malicious_nodes=HOSTILE, num_nodes_to_select=CLIENTS - HOSTILE),
        (NEAR,),
    ),
    "Bulyan, neighbours": (partial(Bulyan, num_malicious_nodes=HOSTILE), (NEAR,)),
}
COLUMNS = ("aggregator", "alpha", "attack", "accuracy", "standard_error", "cost", "seeds")


def attacked(stream: Stream, attack: Attack) -> Stream:
    """Return the stream of a hostile client."""
    relabel = attack.relabel
    if relabel is None:
        return stream

    def changed(records: Records) -> Records:
        return replace(records, labels=relabel(records.labels))

    return replace(
        stream,
        experiences=tuple(replace(each, train=changed(each.train)) for each in stream.experiences),
    )


class Scaled:
    """Callback of a hostile client: at the end of a round its update is multiplied by a factor.

    Args:
        scale: the factor.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.start: list[torch.Tensor] = []

    def __call__(self, point: str, learner: Learner) -> None:
        """Keep the parameters at the begin of a block, and change the update at its end."""
        own = list(learner.model.parameters())
        if point == "block.begin":
            self.start = [value.detach().clone() for value in own]
        if point == "block.end":
            with torch.no_grad():
                for value, start in zip(own, self.start, strict=True):
                    value.copy_(start + self.scale * (value - start))


def accuracy(name: str, alpha: float, attack: Attack, seed: int) -> float:
    """Train a federation, and return the accuracy on the test records in percent."""
    aggregator, before = AGGREGATORS[name]
    stream = split(digits(), scenario="domain", experiences=1)
    streams = dirichlet(stream, clients=CLIENTS, alpha=alpha, min_size=10, seed=seed)
    hostile = range(CLIENTS - HOSTILE, CLIENTS)

    def make_learner(client: int) -> Learner:
        model = mlp(input_shape=stream.input_shape, num_classes=10, hidden=(64,), seed=seed)
        wrong = client in hostile and attack.scale != 1.0
        return Learner(
            model=model,
            strategy=Naive(),
            optimizer=partial(torch.optim.SGD, lr=0.1),
            epochs=ROUNDS,
            batch_size=16,
            seed=seed,
            callbacks=[Scaled(attack.scale)] if wrong else [],
        )

    given = [attacked(own, attack) if n in hostile else own for n, own in enumerate(streams)]
    federation = Federation(
        clients=CLIENTS, rounds=ROUNDS, aggregator=aggregator(), pre_aggregators=before, seed=seed
    )
    try:
        return float(fit_federated(make_learner, given, federation)[0, 0])
    except (FederationError, RunawayError):
        return 100 / stream.num_classes


def row_of(name: str, alpha: float, attack: str, seeds: int, clean: list[float] | None) -> Row:
    """Run one cell of the table with every seed."""
    each = [accuracy(name, alpha, ATTACKS[attack], seed) for seed in range(seeds)]
    mean, error = spread(each)
    before = statistics.mean(clean) if clean else mean
    return {
        "aggregator": name,
        "alpha": alpha,
        "attack": attack,
        "accuracy": mean,
        "standard_error": error,
        "cost": before - mean,
        "each": each,
        "seeds": seeds,
        "clients": CLIENTS,
        "hostile": HOSTILE,
        "rounds": ROUNDS,
        **origin(),
    }


def main() -> None:
    """Run the cells that are not stored yet, and print the table."""
    parser = options(__doc__ or "", seeds=3, resumed=True)
    parser.add_argument("--aggregators", nargs="+", default=list(AGGREGATORS), help="rows to run")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = stored(given.json)
    cells: dict[tuple[Any, ...], Row] = {
        (row["aggregator"], row["alpha"], row["attack"]): row for row in rows
    }
    for name in given.aggregators:
        for alpha in ALPHAS:
            for attack in ATTACKS:
                if (name, alpha, attack) not in cells:
                    clean = cells[name, alpha, "none"]["each"] if attack != "none" else None
                    row = row_of(name, alpha, attack, given.seeds, clean)
                    cells[name, alpha, attack] = row
                    rows.append(row)
                    store(given.json, rows)
                    print(
                        name,
                        alpha,
                        attack,
                        f"{row['accuracy']:.1f} ({row['cost']:.1f})",
                        flush=True,
                    )
    show("robust aggregators, accuracy in %", rows, COLUMNS)


if __name__ == "__main__":
    main()
