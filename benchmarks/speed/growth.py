"""Growth of the cost of training with experiences, classes, parameters and records.

Steps: with a model of 28 million parameters, each strategy is compared with Naive, and with a bare
PyTorch loop that does the same arithmetic in place, without hooks and without a library.

Growth: the processor time of one unit of work (a step, or an experience) at growing numbers of
experiences, classes, parameters, stored records and records. `exponent` is the slope between the
last two sizes on logarithmic scales: 0 is constant, 1 is proportional, more is superlinear. Not
measured: evaluation, which passes T^2 times over test records for T stages, and GEM, which computes
a reference gradient per step for every earlier experience.

Pieces: a stream of 5 experiences is compared with the same steps in 5,000 pieces
(`perdure.data.online`), including evaluation on the test records of 5 stages.

    python benchmarks/speed/growth.py --repeats 5
    python benchmarks/speed/growth.py --rows ewc si memory
"""

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure import Combine, Experience, Learner, Privacy, Records, Strategy, Stream
from perdure.data import online
from perdure.models import mlp
from perdure.strategies import EWC, GEM, L2, MAS, SI, Naive, Replay, RWalk
from perdure.utils import flushed, store_rows

Row = dict[str, object]
Clock = Callable[[], float]
"""Function that runs a block and returns its processor time in seconds for one unit."""

BATCH = 128
INPUTS = 784
LARGE = (4920, 4920)
"""Widths of the hidden layers of a model with 28 million parameters."""
RATE = 1e-4
STRENGTH = 1.0
STEPS = 4
"""Number of steps in a block of the large model."""
FIRST = 16
"""Records of the first experience of the large model; few, because its end is not timed."""

STEP_ROWS: dict[str, tuple[Strategy, float]] = {
    "naive": (Naive(), 1.0),
    "ewc": (EWC(strength=STRENGTH, fisher="empirical"), 1.3),
    "si": (SI(strength=STRENGTH), 1.5),
    "mas": (MAS(strength=STRENGTH), 1.3),
    "l2": (L2(strength=STRENGTH), 1.3),
    "rwalk": (RWalk(strength=STRENGTH), 2.0),
}
"""Strategies, and the largest ratio of their step time to Naive's that is aimed at."""
WITH_BARE = ("naive", "ewc", "si")


def stream_of(
    sizes: list[int], *, classes: int = 10, width: int = INPUTS, domain: bool = True
) -> Stream:
    """Make a stream of random records, with classes in turn; speed does not depend on values."""
    place = torch.Generator().manual_seed(0)
    experiences = []
    first = 0
    share = classes // len(sizes)
    for index, size in enumerate(sizes):
        own = range(classes) if domain else range(index * share, (index + 1) * share)
        labels = torch.tensor(own)[torch.arange(size) % len(own)]
        records = Records(
            inputs=torch.rand(size, width, generator=place),
            labels=labels,
            ids=torch.arange(size) + first,
            partition=f"growth {index}",
        )
        first += size
        test = records.take(torch.arange(1))
        experiences.append(Experience(index=index, train=records, test=test, classes=tuple(own)))
    return Stream(
        name="growth",
        scenario="domain" if domain else "class",
        experiences=tuple(experiences),
        num_classes=classes,
        input_shape=(width,),
        assigned_by_record=True,
    )


def model_for(stream: Stream, hidden: tuple[int, ...]) -> nn.Module:
    """Make the same model for both methods."""
    return mlp(
        input_shape=stream.input_shape, num_classes=stream.num_classes, hidden=hidden, seed=0
    )


def learner_of(
    stream: Stream,
    strategy: Strategy,
    hidden: tuple[int, ...],
    iterations: int,
    privacy: Privacy | None = None,
) -> Learner:
    """Make a learner at the start of the stream."""
    learner = Learner(
        model=model_for(stream, hidden),
        strategy=strategy,
        optimizer=partial(torch.optim.SGD, lr=RATE),
        iterations=iterations,
        batch_size=BATCH,
        privacy=privacy,
    )
    learner.prepare(stream)
    return learner


def seconds(block: Callable[[], object]) -> float:
    """Measure the processor time of a block; elapsed time would depend on other programs."""
    start = time.process_time()
    block()
    return time.process_time() - start


def blocks(learner: Learner, steps: int) -> Clock:
    """Prepare the timing of blocks of steps in the open experience."""
    starts = itertools.count(0, steps)

    def block() -> float:
        start = next(starts)
        return seconds(lambda: learner.train(range(start, start + steps))) / steps

    return block


def in_second(strategy: Strategy, hidden: tuple[int, ...], steps: int) -> Clock:
    """Prepare the timing of steps in the second experience, in which a penalty has an effect."""
    stream = stream_of([FIRST, 4 * BATCH])
    learner = learner_of(stream, strategy, hidden, iterations=1_000_000)
    learner.begin(0)
    learner.train(range(1))
    learner.finish()
    learner.begin(1)
    return blocks(learner, steps)


# ------------------------------------------------------------------------------- the bare loops


def bare(name: str, hidden: tuple[int, ...], steps: int) -> Clock:
    """Prepare the same steps in a bare loop, with all sums in place and in reused tensors."""
    stream = stream_of([FIRST, 4 * BATCH])
    model = model_for(stream, hidden)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    params: list[Tensor] = list(model.parameters())
    weights = [torch.full_like(p, 1e-6) for p in params]
    anchors, room, before, path = ([p.detach().clone() for p in params] for _ in range(4))
    train = stream[1].train

    def pull() -> None:
        torch._foreach_copy_(room, params)
        torch._foreach_sub_(room, anchors)
        torch._foreach_mul_(room, weights)
        for param, each in zip(params, room, strict=True):
            grad = param.grad
            assert grad is not None
            grad.add_(each, alpha=STRENGTH)

    def follow(gradients: list[Tensor]) -> None:
        torch._foreach_sub_(before, params)
        torch._foreach_mul_(before, gradients)
        torch._foreach_add_(path, before)

    @flushed()
    def run() -> None:
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            if len(order) == 0:
                order = torch.randperm(len(train))
            index = order[:BATCH]
            order = order[BATCH:]
            optimizer.zero_grad()
            loss = F.cross_entropy(model(train.inputs[index]), train.labels[index])
            torch.autograd.backward(loss)
            with torch.no_grad():
                if name == "si":
                    released = [p.grad for p in params if p.grad is not None]
                    torch._foreach_copy_(before, params)
                    torch._foreach_copy_(kept, released)
                if name != "naive":
                    pull()
                optimizer.step()
                if name == "si":
                    follow(kept)

    kept = [torch.empty_like(p) for p in params] if name == "si" else []
    return lambda: seconds(run) / steps


def step_row(name: str, repeats: int) -> Row:
    """Time the steps of a strategy, of Naive and of the bare loop, in turn."""
    strategy, target = STEP_ROWS[name]
    sides = {"ours": in_second(strategy, LARGE, STEPS)}
    sides["naive"] = in_second(Naive(), LARGE, STEPS)
    if name in WITH_BARE:
        sides["bare"] = bare(name, LARGE, STEPS)
    found = alternated(sides, repeats)
    row: Row = {
        "benchmark": "growth",
        "row": name,
        "parameters": sum(p.numel() for p in model_for(stream_of([FIRST]), LARGE).parameters()),
        "milliseconds_per_step": 1e3 * statistics.median(found["ours"]),
        "naive_ratio": ratio(found["ours"], found["naive"]),
        "naive_target": target,
    }
    if "bare" in found:
        row |= {
            "bare_milliseconds_per_step": 1e3 * statistics.median(found["bare"]),
            "bare_ratio": ratio(found["ours"], found["bare"]),
        }
    return row | {"repeats": repeats}


def alternated(sides: dict[str, Clock], repeats: int) -> dict[str, list[float]]:
    """Time all methods in turn, after one turn that is not counted."""
    turns = [{name: side() for name, side in sides.items()} for _ in range(repeats + 1)][1:]
    return {name: [turn[name] for turn in turns] for name in sides}


def ratio(mine: list[float], others: list[float]) -> float:
    """Return the median of the ratios of pairs."""
    return statistics.median(m / o for m, o in zip(mine, others, strict=True))


# ------------------------------------------------------------------------------- growth


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Cost that may grow with a size, and its largest allowed exponent.

    Args:
        unit: unit of work of the time.
        sizes: sizes at which the time is measured.
        clock: function from a size to a function that measures the processor time of one unit.
        most: largest allowed exponent, by mathematics: 0 is constant, 1 is proportional.
    """

    unit: str
    sizes: tuple[int, ...]
    clock: Callable[[int], Clock]
    most: float = 0.0


SMALL = 64
"""Inputs of a record, and units of the hidden layer, if another size grows."""


def steps_in_second(strategy: Strategy, records: int, steps: int = 50) -> Clock:
    """Prepare the timing of steps in the second of two experiences, with a small model."""
    stream = stream_of([records, records], width=SMALL)
    learner = learner_of(stream, strategy, (SMALL,), iterations=1_000_000)
    learner.begin(0)
    learner.train(range(-(-records // BATCH)))
    learner.finish()
    learner.begin(1)
    return blocks(learner, steps)


def experiences(count: int, strategy: Strategy, privacy: Privacy | None = None) -> Clock:
    """Prepare the timing of whole experiences, from the preparation of the learner on."""
    stream = stream_of([BATCH] * count, width=SMALL)

    def run() -> None:
        learner = learner_of(stream, strategy, (SMALL,), iterations=4, privacy=privacy)
        for index in range(count):
            learner.begin(index)
            learner.train(range(4))
            learner.finish()

    return lambda: seconds(run) / count


def opened_and_closed(records: int) -> Clock:
    """Prepare the timing of opening and ending an experience while a memory exists."""
    stream = stream_of([records], width=SMALL)

    def block() -> float:
        learner = learner_of(stream, Replay(memory_size=200), (SMALL,), iterations=1)

        def whole() -> None:
            learner.begin(0)
            learner.train(range(1))
            learner.finish()

        return seconds(whole)

    return block


def classes(count: int) -> Clock:
    """Prepare the timing of steps in the second half of a class-incremental stream."""
    stream = stream_of([2000, 2000], classes=count, width=SMALL, domain=False)
    learner = learner_of(stream, Replay(memory_size=2000), (SMALL,), iterations=1_000_000)
    learner.begin(0)
    learner.train(range(1))
    learner.finish()
    learner.begin(1)
    return blocks(learner, 50)


GROWTHS: dict[str, Growth] = {
    "experiences": Growth(
        unit="experience",
        sizes=(10, 40, 160),
        clock=partial(
            experiences,
            strategy=Combine(EWC(strength=STRENGTH, fisher="empirical"), Replay(memory_size=100)),
        ),
    ),
    "private experiences": Growth(
        unit="experience",
        sizes=(10, 40, 160),
        clock=partial(
            experiences,
            strategy=EWC(strength=STRENGTH, fisher="empirical"),
            privacy=Privacy(noise_multiplier=1.0, seed=0),
        ),
    ),
    "classes": Growth(unit="step", sizes=(10, 100, 1000), clock=classes, most=1.0),
    "parameters, ewc": Growth(
        unit="step",
        sizes=(300, 1500, 4920),
        clock=lambda width: in_second(STEP_ROWS["ewc"][0], (width, width), STEPS),
        most=2.0,
    ),
    "parameters, si": Growth(
        unit="step",
        sizes=(300, 1500, 4920),
        clock=lambda width: in_second(STEP_ROWS["si"][0], (width, width), STEPS),
        most=2.0,
    ),
    "memory": Growth(
        unit="step",
        sizes=(1_000, 10_000, 100_000),
        clock=lambda size: steps_in_second(Replay(memory_size=size), size),
    ),
    "memory, every step": Growth(
        unit="step",
        sizes=(1_000, 10_000, 100_000),
        clock=lambda size: steps_in_second(
            Replay(memory_size=size, selection="reservoir", weighting="equal", update="step"), size
        ),
    ),
    "memory, references": Growth(
        unit="step",
        sizes=(1_000, 10_000, 100_000),
        clock=lambda size: steps_in_second(GEM(memory_size=size), size),
    ),
    "records": Growth(
        unit="step",
        sizes=(1_000, 10_000, 100_000),
        clock=lambda size: steps_in_second(Naive(), size),
    ),
    "records, ends": Growth(
        unit="experience", sizes=(1_000, 10_000, 100_000), clock=opened_and_closed, most=1.0
    ),
}


def growth_row(name: str, repeats: int) -> Row:
    """Measure the time of one unit at every size in turn, and compute the exponent."""
    growth = GROWTHS[name]
    sides = {str(size): growth.clock(size) for size in growth.sizes}
    times = [statistics.median(each) for each in alternated(sides, repeats).values()]
    last = math.log(times[-1] / times[-2]) / math.log(growth.sizes[-1] / growth.sizes[-2])
    return {
        "benchmark": "growth",
        "row": name,
        "unit": growth.unit,
        "sizes": list(growth.sizes),
        "milliseconds": [1e3 * each for each in times],
        "exponent": last,
        "most": growth.most,
        "repeats": repeats,
    }


# ------------------------------------------------------------------------------- pieces

PARENTS = 5
PIECES = 5_000
PIECE = 10
"""Number of records in a piece, and in a step, so that every record is used once."""
TESTED = 1_000
"""Number of test records of an experience that is cut into pieces."""
PIECE_ROWS: dict[str, Strategy] = {
    "pieces": Naive(),
    "pieces, replay": Replay(memory_size=500, selection="reservoir", update="step"),
    "pieces, replay by quotas": Replay(memory_size=500),
}
MOST_FOR_PIECES = 1.5


def parents_of(count: int) -> Stream:
    """Make class-incremental experiences, of two classes each, to be cut into `count` pieces."""
    size = count * PIECE // PARENTS
    stream = stream_of([size] * PARENTS, domain=False)
    tested = (replace(each, test=tests_of(each.train)) for each in stream)
    return replace(stream, experiences=tuple(tested))


def tests_of(train: Records) -> Records:
    """Test records like these, under ids of their own."""
    test = train.take(torch.arange(min(TESTED, len(train))))
    return replace(test, ids=-1 - test.ids)


def whole_run(stream: Stream, strategy: Strategy, cut: bool) -> Clock:
    """Prepare a run in one pass on a stream, or on its pieces, with steps as large as a piece."""

    def run() -> None:
        met = online(stream, chunk=PIECE) if cut else stream
        learner = Learner(
            model=model_for(stream, (400, 400)),
            strategy=strategy,
            optimizer=partial(torch.optim.SGD, lr=RATE),
            epochs=1,
            batch_size=PIECE,
        )
        learner.fit(met)

    return lambda: seconds(run)


def piece_row(name: str, repeats: int, pieces: int = PIECES) -> Row:
    """Compare the processor time of a run in pieces with the same steps in whole experiences."""
    stream = parents_of(pieces)
    strategy = PIECE_ROWS[name]
    sides = {
        "pieces": whole_run(stream, strategy, cut=True),
        "experiences": whole_run(stream, strategy, cut=False),
    }
    found = alternated(sides, repeats)
    return {
        "benchmark": "growth",
        "row": name,
        "pieces": pieces,
        "steps": pieces,
        "seconds": statistics.median(found["pieces"]),
        "seconds_in_experiences": statistics.median(found["experiences"]),
        "ratio": ratio(found["pieces"], found["experiences"]),
        "ratio_target": MOST_FOR_PIECES,
        "repeats": repeats,
    }


def main() -> None:
    """Measure the given rows, or all, and print them."""
    known = [*STEP_ROWS, *GROWTHS, *PIECE_ROWS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", nargs="*", default=known, choices=known, metavar="ROW")
    parser.add_argument("--json", type=Path, help="store the rows in this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    makers = {
        **dict.fromkeys(STEP_ROWS, step_row),
        **dict.fromkeys(GROWTHS, growth_row),
        **dict.fromkeys(PIECE_ROWS, piece_row),
    }
    for name in args.rows:
        rows.append(makers[name](name, args.repeats))
        print(shown(rows[-1]), flush=True)
    if args.json:
        store_rows(args.json, rows, seed=0)


def shown(row: Row) -> str:
    """Format a row as one line."""
    cells = []
    for key, value in row.items():
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        if isinstance(value, list):
            text = ", ".join(f"{each:.3g}" for each in value)
        cells.append(f"{key.replace('_', ' ')} {text}")
    return "; ".join(cells)


if __name__ == "__main__":
    main()
