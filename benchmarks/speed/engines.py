"""Time of a federated round in this process and on Flower's Ray engine, with the same apps.

Rows:

    folder   perdure whole: ten clients with three steps of SGD of an MLP with 190,410 parameters,
             state and checkpoints in the folder of the run
    empty    a client app of Flower that sends the parameters back, under Flower's own FedAvg: the
             cost of the engine alone

Counted are seconds by the clock between two rounds, because Ray works in several processes; the
first round, in which Ray starts them, is left out. The engines take turns, and the median over the
rounds of all turns counts. Needs the extra `simulation`.

    python benchmarks/speed/engines.py --json benchmarks/results/engines.json
"""

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from perdure import Learner, Stream
from perdure.data import digits, iid, split
from perdure.federated import Federation, InProcessGrid, Server, run_federation
from perdure.models import Classifier, mlp
from perdure.strategies import Naive
from perdure.utils import store_rows

CLIENTS = 10
STEPS = 3
"""Number of steps of a client in a round."""
Engine = Literal["inprocess", "ray"]
ENGINES: tuple[Engine, ...] = ("inprocess", "ray")
Seconds = list[float]


def clients() -> list[Stream]:
    """Divide the digits over the clients."""
    whole = split(digits(), scenario="class", experiences=1)
    return iid(whole, clients=CLIENTS, min_size=8, exact=False)


def model() -> Classifier:
    """Make the same model for every client."""
    return mlp(input_shape=(1, 8, 8), num_classes=10, hidden=(400, 400), seed=0)


def make(client: int, rounds: int) -> Learner:
    """Make a client's learner."""
    return Learner(
        model=model(),
        strategy=Naive(),
        optimizer=partial(torch.optim.SGD, lr=0.05),
        iterations=STEPS * rounds,
        batch_size=20,
    )


def whole(engine: Engine, rounds: int) -> Seconds:
    """Return the seconds of every round but the first of a federation with a folder."""
    ends: Seconds = []

    def clock(point: str, server: Server) -> None:
        if point == "checkpoint.end":
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        run_federation(
            partial(make, rounds=rounds),
            clients(),
            Federation(clients=CLIENTS, rounds=rounds),
            folder=folder,
            callbacks=[clock],
            engine=engine,
            show_progress=False,
        )
    return between(ends[:rounds])  # the last exchange is the consolidation


def empty(engine: Engine, rounds: int) -> Seconds:
    """Return the seconds of every round but the first of clients that do nothing."""
    client, server = ClientApp(), ServerApp()
    ends: Seconds = []

    @client.train()
    def train(message: Message, context: Context) -> Message:
        """Send the parameters back."""
        content = {
            "arrays": message.content["arrays"],
            "metrics": MetricRecord({"num-examples": 1}),
        }
        return Message(RecordDict(content), reply_to=message)

    def clock(number: int, arrays: ArrayRecord) -> MetricRecord:
        """Record the end of a round, as a central evaluation does."""
        ends.append(time.perf_counter())
        return MetricRecord({"round": number})

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        """Run Flower's own FedAvg."""
        start = ArrayRecord(model().state_dict())
        strategy = FedAvg(fraction_evaluate=0.0)
        strategy.start(grid, start, num_rounds=rounds, evaluate_fn=clock)

    if engine == "ray":
        run_simulation(server, client, num_supernodes=CLIENTS)
    else:
        with InProcessGrid(client, CLIENTS).running() as grid:
            server(grid, Context(1, 0, {}, RecordDict(), {}))
    return between(ends[1:])  # the first call is before the first round


def between(ends: Seconds) -> Seconds:
    """Return the seconds from each time to the next."""
    return [late - early for early, late in pairwise(ends)]


def row(
    name: str, measure: Callable[[Engine, int], Seconds], repeats: int, rounds: int
) -> dict[str, object]:
    """Measure one row on both engines, in turn."""
    found: dict[Engine, Seconds] = {engine: [] for engine in ENGINES}
    for _ in range(repeats):
        for engine in ENGINES:
            found[engine] += measure(engine, rounds)
    mine, ray = (statistics.median(found[engine]) for engine in ENGINES)
    return {
        "benchmark": "engines",
        "row": name,
        "clients": CLIENTS,
        "repeats": repeats,
        "rounds": rounds,
        "inprocess_ms": 1e3 * mine,
        "ray_ms": 1e3 * ray,
        "times": ray / mine,
    }


def main() -> None:
    """Measure the given rows, print them and store them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rows = {"folder": whole, "empty": empty}
    parser.add_argument("rows", nargs="*", help=f"{', '.join(rows)} (default: all)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path, help="store the rows in this file")
    args = parser.parse_args()
    unknown = set(args.rows) - rows.keys()
    if unknown:
        parser.error(f"no row {', '.join(sorted(unknown))}; allowed: {', '.join(rows)}")
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    found = []
    for name in args.rows or rows:
        found.append(row(name, rows[name], args.repeats, args.rounds))
        print(found[-1], flush=True)
    if args.json:
        store_rows(args.json, found, seed=0)


if __name__ == "__main__":
    main()
