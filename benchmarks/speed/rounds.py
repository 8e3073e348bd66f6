"""Time of a federated round: perdure, a bare PyTorch loop and pfl-research, in turn.

Ten clients a round, each with 60 records of 28 x 28 and three steps of SGD on batches of 20, then
averaged by the sizes of the clients. perdure runs whole: Flower's messages, FedAvg (its arithmetic,
without serialising arrays in this process), and one learner and model a client, whose optimiser
lives from round to round. The bare loop is written by hand: one model, parameters copied in, a
fresh optimiser, index selection, a weighted sum. pfl-research runs `FederatedAveraging` on
`SimulatedBackend`, one model as well, without evaluation, and is left out where it is not installed
(`pip install pfl`). All three take the same number of steps of the same size on the same records,
on the same model, and take denormal numbers as 0. perdure and the bare loop shuffle a client's
records and gather each batch; pfl-research slices them in their order, which is cheaper, and the
figures are not corrected for it.

Counted is processor time of a round, from its draw of clients to the new global model, with one
thread. Every side has a thread, and the threads take turns, one round each, so that load of the
machine meets all sides alike: the ratio of a round is that of rounds which ran next to each other,
and the median over the later half of the rounds counts. On a busy machine it still moves by a
tenth.

Not counted: building streams, the setup before the first round, consolidation and evaluation after
the last, and the first half of the rounds. So most first visits of a client are left out, for which
the user's own function and perdure build a learner and a model, about as long as a visit: with 100
clients, ten a round, about one in 24 visits at round 30, one in 500 at round 60. The bare loop and
pfl-research have one model and build none. The rows `clients` count first visits in, almost all of
theirs are.

Only clients that trained in an experience consolidate it. Their number is a column, because it is
67 with 100 clients and 99 with 10,000.

Rows: `mlp`, `cnn` (a round of 100 clients, side by side), `mlp_long` (thirty steps in place of
three, so that a client works 20 ms or more a round), `clients` (rounds and consolidation of
perdure among 100, 1,000 and 10,000 clients) and `idle` (what a client keeps between its rounds, in
copies of its model).

    python benchmarks/speed/rounds.py --repeats 5
    python benchmarks/speed/rounds.py mlp --repeats 1
"""

import argparse
import asyncio
import gc
import importlib.util
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from perdure import Learner, Records, Stream
from perdure.data import Experience
from perdure.federated import Federation, InProcessGrid, Server, client_app
from perdure.models import Classifier, cnn, mlp
from perdure.strategies import Naive
from perdure.utils import flushed, store_rows

Row = dict[str, object]
Pause = Callable[[], None]
"""Function that a side calls between two rounds, so that the other sides take a round."""
Side = Callable[[Pause], list[float]]

INPUT_SHAPE = (1, 28, 28)
CLASSES = 10
COHORT = 10
RECORDS = 60
BATCH = 20
STEPS = {"mlp": 3, "cnn": 3, "mlp_long": 30}
"""Number of steps of a client in a round, by row."""
LEARNING_RATE = 0.05
POPULATIONS = (100, 1_000, 10_000)
FEW_ROUNDS = 10
"""Number of rounds for the rows `clients`."""
DISTINCT = 100
"""Number of clients with records of their own; client 100 has the records of client 0 again."""


def model_for(kind: str) -> Classifier:
    """Make the same model for every method and client."""
    if kind == "cnn":
        return cnn(input_shape=INPUT_SHAPE, num_classes=CLASSES, width=16, seed=0)
    return mlp(input_shape=INPUT_SHAPE, num_classes=CLASSES, hidden=(200, 200), seed=0)


def stream_of(client: int) -> Stream:
    """Make one experience of random images with labels that can be learnt."""
    rng = torch.Generator().manual_seed(client)
    labels = torch.randint(CLASSES, (RECORDS,), generator=rng)
    inputs = torch.rand(RECORDS, *INPUT_SHAPE, generator=rng)
    inputs[torch.arange(RECORDS), 0, labels] += 1.0
    records = Records(inputs=inputs, labels=labels)
    test = records.take(torch.arange(10))
    experience = Experience(index=0, train=records, test=test, classes=tuple(range(CLASSES)))
    return Stream(
        name="random",
        scenario="domain",
        experiences=(experience,),
        num_classes=CLASSES,
        input_shape=INPUT_SHAPE,
    )


STREAMS = [stream_of(client) for client in range(DISTINCT)]


def cohorts(clients: int, rounds: int) -> list[list[int]]:
    """Return the clients of every round, as perdure draws them."""
    federation = Federation(clients=clients, rounds=rounds, fraction=COHORT / clients)
    return [federation.cohort(0, number) for number in range(rounds)]


def trained_in(clients: int, rounds: int) -> int:
    """Count the clients that train in some round, all of which consolidate."""
    return len({client for cohort in cohorts(clients, rounds) for client in cohort})


# --------------------------------------------------------------------------- perdure


@dataclass
class Clock:
    """Callback of the server that measures the seconds of every round and of the consolidation."""

    pause: Pause
    rounds: list[float] = field(default_factory=list)
    consolidation: float = 0.0
    _start: float = 0.0

    def __call__(self, point: str, server: Server) -> None:
        """Record the time of a point of the server's loop."""
        now = time.thread_time()
        if point == "round.begin":
            self._start = now
        elif point == "round.end":
            self.rounds.append(now - self._start)
            self.pause()
            self._start = time.thread_time()
        elif point == "experience.combined":
            # it began when the last round ended
            self.consolidation = now - self._start


def no_pause() -> None:
    """Go on at once, with the next round of the same side."""


def ours(
    kind: str,
    clients: int,
    rounds: int,
    learners: list[Learner] | None = None,
    pause: Pause = no_pause,
) -> Clock:
    """Run a federation of one experience in this process; add its learners to `learners`."""

    def make(client: int) -> Learner:
        learner = Learner(
            model=model_for(kind),
            strategy=Naive(),
            optimizer=partial(torch.optim.SGD, lr=LEARNING_RATE),
            iterations=STEPS[kind] * rounds,
            batch_size=BATCH,
        )
        if learners is not None:
            learners.append(learner)
        return learner

    clock = Clock(pause)
    server = Server(
        learner=make(0),
        stream=STREAMS[0],
        federation=Federation(clients=clients, rounds=rounds, fraction=COHORT / clients),
        callbacks=[clock],
        # declared, because a client that is asked builds its learner to answer
        sizes=[[RECORDS]] * clients,
    )
    app = client_app(lambda client: (make(client), STREAMS[client % DISTINCT]))
    with InProcessGrid(app, clients).running() as grid:
        server.serve(grid)
    return clock


# --------------------------------------------------------------------------- the two others


@flushed()
def bare(kind: str, clients: int, rounds: int, pause: Pause = no_pause) -> list[float]:
    """Return the seconds of each round of a bare loop with one model."""
    model = model_for(kind)
    params = list(model.parameters())
    spent = []
    for cohort in cohorts(clients, rounds):
        start = time.thread_time()
        before = [param.detach().clone() for param in params]
        total = [torch.zeros_like(param) for param in params]
        for client in cohort:
            with torch.no_grad():
                for param, value in zip(params, before, strict=True):
                    param.copy_(value)
            train_by_hand(model, STREAMS[client % DISTINCT][0].train, STEPS[kind])
            with torch.no_grad():
                for value, param in zip(total, params, strict=True):
                    value.add_(param, alpha=RECORDS / (RECORDS * len(cohort)))
        with torch.no_grad():
            for param, value in zip(params, total, strict=True):
                param.copy_(value)
        spent.append(time.thread_time() - start)
        pause()
    return spent


def train_by_hand(model: nn.Module, records: Records, steps: int) -> None:
    """Take the steps of one client in the bare loop, in a new random order for every pass."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    slices = RECORDS // BATCH
    for step in range(steps):
        place = step % slices
        if place == 0:
            order = torch.randperm(len(records))
        index = order[place * BATCH : (place + 1) * BATCH]
        loss = F.cross_entropy(model(records.inputs[index]), records.labels[index])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()


@flushed()
def pfl(kind: str, clients: int, rounds: int, pause: Pause = no_pause) -> list[float]:
    """Return the seconds of each round of pfl-research's federated averaging."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    model: Any = model_for(kind)
    model.loss = lambda inputs, labels: F.cross_entropy(model(inputs), labels)
    model.metrics = lambda inputs, labels: {}
    trained = PyTorchModel(
        model=model,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
    )
    held = [PyTorchTensorDataset(tensors=[s[0].train.inputs, s[0].train.labels]) for s in STREAMS]
    drawn = iter([client for cohort in cohorts(clients, rounds) for client in cohort])
    data = FederatedDataset(
        make_dataset_fn=lambda client: held[client % DISTINCT], user_sampler=lambda: next(drawn)
    )
    starts: list[float] = []
    ends: list[float] = []

    class Ends(TrainingProcessCallback):  # type: ignore[misc, unused-ignore]
        """Callback that records the time after every round."""

        def after_central_iteration(self, *_: object, **__: object) -> tuple[bool, Metrics]:
            ends.append(time.thread_time())
            pause()
            starts.append(time.thread_time())
            return False, Metrics()

    asyncio.set_event_loop(asyncio.new_event_loop())  # pfl-research uses the thread's own
    starts.append(time.thread_time())
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds + 1,
            train_cohort_size=COHORT,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(
            training_data=data, val_data=data, postprocessors=[WeightByDatapoints()]
        ),
        model=trained,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=STEPS[kind] * BATCH // RECORDS,
            local_learning_rate=LEARNING_RATE,
            local_batch_size=BATCH,
        ),
        callbacks=[Ends()],
        send_metrics_to_platform=False,
    )
    return [end - begin for begin, end in zip(starts, ends, strict=False)]


# --------------------------------------------------------------------------- rows


class Turns:
    """Threads that run one at a time, each until its next pause.

    Args:
        sides: a function of every thread, which gets the function that it calls to pause.
    """

    def __init__(self, sides: dict[str, Side]) -> None:
        self._sides = sides
        self._waiting = {name: threading.Semaphore(0) for name in sides}
        self._alive = list(sides)

    def run(self) -> dict[str, list[float]]:
        """Run all threads to their ends, and return their results by name."""
        with ThreadPoolExecutor(len(self._sides)) as threads:
            found = {name: threads.submit(self._run, name) for name in self._sides}
            self._waiting[self._alive[0]].release()
            return {name: each.result() for name, each in found.items()}

    def _run(self, name: str) -> list[float]:
        torch.set_num_threads(1)
        self._waiting[name].acquire()
        try:
            return self._sides[name](partial(self._pause, name))
        finally:
            after = self._next(name)
            self._alive.remove(name)
            self._waiting[after].release()

    def _pause(self, name: str) -> None:
        self._waiting[self._next(name)].release()
        self._waiting[name].acquire()

    def _next(self, name: str) -> str:
        return self._alive[(self._alive.index(name) + 1) % len(self._alive)]


def side_by_side(kind: str, repeats: int, rounds: int) -> list[Row]:
    """Time a round with all methods, round by round in turn."""
    clients = POPULATIONS[0]
    sides: dict[str, Side] = {
        "perdure": lambda pause: ours(kind, clients, rounds, pause=pause).rounds,
        "bare": lambda pause: bare(kind, clients, rounds, pause),
    }
    if importlib.util.find_spec("pfl"):
        sides["pfl"] = lambda pause: pfl(kind, clients, rounds, pause)
    late: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, times in Turns(sides).run().items():
            late[name] += times[rounds // 2 : rounds]
    ratios = {
        f"times_{name}": statistics.median(
            mine / other for mine, other in zip(late["perdure"], late[name], strict=True)
        )
        for name in sides
        if name != "perdure"
    }
    return [
        {"benchmark": "rounds", "row": kind, "clients": clients, "repeats": repeats}
        | {f"{name}_ms": 1e3 * statistics.median(times) for name, times in late.items()}
        | ratios
    ]


def population(repeats: int) -> list[Row]:
    """Time rounds and consolidation with growing numbers of clients, in turn."""
    turns: dict[int, list[Clock]] = {clients: [] for clients in POPULATIONS}
    ours("mlp", POPULATIONS[0], FEW_ROUNDS)
    for _ in range(repeats):
        for clients, clocks in turns.items():
            clocks.append(ours("mlp", clients, FEW_ROUNDS))
    return [
        {
            "benchmark": "rounds",
            "row": "clients",
            "clients": clients,
            "repeats": repeats,
            "perdure_ms": 1e3 * statistics.median(statistics.mean(c.rounds) for c in clocks),
            "met_a_round": trained_in(clients, FEW_ROUNDS) / FEW_ROUNDS,
            "consolidation_ms": 1e3 * statistics.median(c.consolidation for c in clocks),
            "consolidated": trained_in(clients, FEW_ROUNDS),
        }
        for clients, clocks in turns.items()
    ]


def idle() -> list[Row]:
    """Compute the memory that a client keeps between its rounds, in copies of its model.

    It is the growth of memory from a federation of 20 clients to one of 40, so the server's own
    copies do not count. Memory that clients share is counted once.
    """
    held = []
    for clients in (2 * COHORT, 4 * COHORT):
        learners: list[Learner] = []
        before = bytes_of_tensors()
        ours("mlp", clients, 2 * clients, learners)
        # the first learner is the server's
        held.append((len(learners) - 1, bytes_of_tensors() - before))
        own = sum(value.nbytes for value in learners[0].model.state_dict().values())
    (few, bytes_of_few), (many, bytes_of_many) = held
    copies = (bytes_of_many - bytes_of_few) / own / (many - few)
    return [{"benchmark": "rounds", "row": "idle", "clients": many, "copies": copies}]


def bytes_of_tensors() -> int:
    """Count the bytes of all tensors in memory, each storage once."""
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        if type(each) in (Tensor, nn.Parameter):  # not the tensors of tracers, without memory
            for tensor in (each, each.grad if each.is_leaf else None):
                if tensor is not None:
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
    return sum(storage.nbytes() for storage in storages.values())


def show(rows: Sequence[Row]) -> None:
    """Print the rows as a table."""
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "benchmark"))
    table = Table(title="federated rounds (milliseconds of processor time; ratios of perdure's)")
    for column in columns:
        table.add_column(column.replace("_", " "))
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        table.add_row(*[f"{c:.2f}" if isinstance(c, float) else str(c) for c in cells])
    Console(width=140).print(table)


def main() -> None:
    """Measure the given rows, print them and store them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", help="mlp, cnn, mlp_long, clients, idle (default: all)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--rounds", type=int, default=60, help="of mlp, cnn and mlp_long (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="store the rows in this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    measures: dict[str, Callable[[], list[Row]]] = {
        "mlp": lambda: side_by_side("mlp", args.repeats, args.rounds),
        "cnn": lambda: side_by_side("cnn", args.repeats, args.rounds),
        "mlp_long": lambda: side_by_side("mlp_long", args.repeats, args.rounds),
        "clients": lambda: population(args.repeats),
        "idle": idle,
    }
    unknown = set(args.rows) - measures.keys()
    if unknown:
        parser.error(f"no row {', '.join(sorted(unknown))}; allowed: {', '.join(measures)}")
    rows = []
    for name in args.rows or measures:
        rows += measures[name]()
        print(rows[-1], flush=True)
    show(rows)
    if args.json:
        store_rows(args.json, rows, seed=0)


if __name__ == "__main__":
    main()
