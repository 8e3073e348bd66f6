"""Tests of claims.

Arms trained on the same streams, seed by seed, and the differences between them.

A seed sets the stream (the order of the classes, the permutations), the initial model and the order
of records, for all arms alike, so that differences are taken within a seed. Hyper-parameters that
are searched are searched once, on held-out training records of the first experiences of seed 0
(`perdure.experiment.tune`), each arm with as many trials. Arms that a paper does not compare its
method with may stand beside, and do not decide whether its claim is shown.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rows import Row, origin, spread, store, stored
from rows import options as command_line
from torch import Tensor, nn

from perdure import Learner, Strategy, Stream
from perdure.experiment import Space, Tuned, Values, tune
from perdure.metrics import area_under_accuracy, average_accuracy, forgetting, learning_accuracy
from perdure.models import mlp

PAPER = "paper"
FIXED = "fixed, one value tried"
NOTHING = "nothing to choose"
RULE = (
    "shown: the mean over seeds of the difference in favour, within a seed, is above two "
    "standard errors of it"
)
SEARCH_SEED = 3
"""Chosen for its first eight samples, which lie all over a range; those of 0 leave out its lower
two fifths.
"""
RATE = "learning_rate"
"""Name of the searched value that the optimiser gets; the strategy gets all other values."""


def old_and_new_apart(matrix: Tensor) -> float:
    """Compute the final accuracy on the last experience minus the mean over earlier ones.

    A bias towards new or towards old classes shows in it.
    """
    last = matrix[-1]
    return float((last[-1] - last[:-1].mean()).abs())


MEASURES: dict[str, Callable[[Tensor], float]] = {
    "average_accuracy": average_accuracy,
    "forgetting": forgetting,
    "learning_accuracy": learning_accuracy,
    "anytime_accuracy": area_under_accuracy,
    "old_and_new_apart": old_and_new_apart,
}
LOWER = ("forgetting", "old_and_new_apart")
"""Measures for which lower values are better."""


def small(stream: Stream, seed: int) -> nn.Module:
    """Make a perceptron with two hidden layers of 100 units."""
    return mlp(
        input_shape=stream.input_shape, num_classes=stream.num_classes, hidden=(100, 100), seed=seed
    )


ADAM = partial(torch.optim.Adam, lr=1e-3, fused=True)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to learn the stream: a strategy with its model, optimiser and options.

    Args:
        name: name in the table.
        strategy: function that makes the strategy from the values of `search`.
        search: lowest and highest value of each hyper-parameter that is tuned.
        chosen: source of the other hyper-parameters.
        model: function that makes the model from stream and seed.
        optimizer: function that makes the optimiser from parameters.
        training: options of the learner; empty for the claim's options.
        beside: True if the arm is compared and stored, but does not decide the claim.
    """

    name: str
    strategy: Callable[..., Strategy]
    search: Space = field(default_factory=dict)
    chosen: str = FIXED
    model: Callable[[Stream, int], nn.Module] = small
    optimizer: Callable[..., torch.optim.Optimizer] = ADAM
    training: Mapping[str, Any] = field(default_factory=dict)
    beside: bool = False


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Claim of a paper about its method, with a comparison that can show it.

    Args:
        name: name of the strategy's file.
        sentence: the claim.
        paper: author, venue, year, and section of the paper.
        stream: function that makes the stream from a seed.
        training: options of the learner that all arms share.
        arms: the method first, then the arms that it is compared with.
        note: facts about the setting that a reader of the row must know.
        measures: names of `MEASURES` in which the method must be better than every other arm.
        exactly: value of the method's first measure that is required in every seed, or None.
        tuned_on: number of first experiences that a search may use.
        trials: number of trials of each search.
    """

    name: str
    sentence: str
    paper: str
    stream: Callable[[int], Stream]
    training: Mapping[str, Any]
    arms: tuple[Arm, ...]
    note: str = ""
    measures: tuple[str, ...] = ("average_accuracy",)
    exactly: float | None = None
    tuned_on: int = 3
    trials: int = 8


# --------------------------------------------------------------------------- one run


def learner(claim: Claim, arm: Arm, values: Values, stream: Stream, seed: int) -> Learner:
    """Make an untrained learner of the arm."""
    own = {name: value for name, value in values.items() if name != RATE}
    optimizer = partial(arm.optimizer, lr=values[RATE]) if RATE in values else arm.optimizer
    return Learner(
        model=arm.model(stream, seed),
        strategy=arm.strategy(**own),
        optimizer=optimizer,
        seed=seed,
        **(arm.training or claim.training),
    )


def search(claim: Claim, arm: Arm) -> Tuned:
    """Tune the arm on the first experiences of the stream of seed 0."""
    torch.set_num_threads(1)
    stream = claim.stream(0)

    def make(values: Values) -> Learner:
        return learner(claim, arm, values, stream, 0)

    return tune(
        make, arm.search, stream, experiences=claim.tuned_on, trials=claim.trials, seed=SEARCH_SEED
    )


def run(claim: Claim, arm: Arm, values: Values, seed: int) -> dict[str, float]:
    """Run one seed in a process of its own; return every measure in percent, and the seconds."""
    torch.set_num_threads(1)
    stream = claim.stream(seed)
    start = time.perf_counter()
    matrix = learner(claim, arm, values, stream, seed).fit(stream)
    return {name: measure(matrix) for name, measure in MEASURES.items()} | {
        "seconds": time.perf_counter() - start
    }


# --------------------------------------------------------------------------- what is stored


def arm_row(
    arm: Arm, tuned: Tuned | None, results: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """Build the part of a row that describes one arm."""
    values = tuned.values if tuned else {}
    own = {name: value for name, value in values.items() if name != RATE}
    mean, error = spread([result["average_accuracy"] for result in results])
    return {
        "strategy": repr(arm.strategy(**own)),
        "values": values,
        "chosen": chosen(arm, tuned),
        "search": tuned.row() if tuned else None,
        "average_accuracy": mean,
        "standard_error": error,
        **{name: statistics.mean(result[name] for result in results) for name in MEASURES},
        "by_seed": {name: [result[name] for result in results] for name in MEASURES},
        "seconds": statistics.mean(result["seconds"] for result in results),
    }


def chosen(arm: Arm, tuned: Tuned | None) -> str:
    """Describe the source of the hyper-parameters."""
    if not tuned:
        return arm.chosen
    return f"{', '.join(tuned.values)}: tuned on {tuned.row()['tuned_on']}; the rest: {arm.chosen}"


def compared(
    measure: str, other: Arm, arms: Mapping[str, dict[str, Any]], method: str
) -> dict[str, Any]:
    """Compare the method with another arm by one measure.

    A positive difference means that the method is better.
    """
    sign = -1 if measure in LOWER else 1
    pairs = zip(arms[method]["by_seed"][measure], arms[other.name]["by_seed"][measure], strict=True)
    differences = [sign * (own - its) for own, its in pairs]
    mean, error = spread(differences)
    return {
        "measure": measure,
        "method": method,
        "against": other.name,
        "beside": other.beside,
        "difference": mean,
        "standard_error": error,
        "differences": differences,
        "shown": error is not None and mean > 2 * error,
    }


def row(
    claim: Claim, tuned: Mapping[str, Tuned], results: Mapping[str, Sequence[Mapping[str, float]]]
) -> dict[str, Any]:
    """Build the row to store for a claim."""
    arms = {arm.name: arm_row(arm, tuned.get(arm.name), results[arm.name]) for arm in claim.arms}
    method = claim.arms[0].name
    found = [
        compared(measure, other, arms, method)
        for measure in claim.measures
        for other in claim.arms[1:]
    ]
    own = arms[method]["by_seed"][claim.measures[0]]
    exact = claim.exactly is None or all(value == claim.exactly for value in own)
    shown = exact and all(comparison["shown"] for comparison in found if not comparison["beside"])
    return {
        "benchmark": "claims",
        "claim": claim.name,
        **words(claim),
        "options": options(claim),
        "seeds": len(own),
        "arms": arms,
        "compared": found,
        "exactly": claim.exactly,
        "rule": RULE,
        "shown": shown,
        **origin(),
    }


def words(claim: Claim) -> dict[str, str]:
    """Return the texts of a claim, which may be reworded without a new run."""
    return {"sentence": claim.sentence, "paper": claim.paper, "note": claim.note}


def options(claim: Claim) -> dict[str, Any]:
    """Describe everything that a row depends on; if it differs, the claim is run again."""
    arms = {
        arm.name: {
            "strategy": described(arm.strategy),
            "search": {
                name: list(bounds) if isinstance(bounds, tuple | list) else described(bounds)
                for name, bounds in arm.search.items()
            },
            "model": described(arm.model),
            "optimizer": described(arm.optimizer),
            "training": dict(arm.training or claim.training),
            "beside": arm.beside,
        }
        for arm in claim.arms
    }
    return {
        "stream": described(claim.stream),
        "arms": arms,
        "measures": list(claim.measures),
        "exactly": claim.exactly,
        "tuned_on": claim.tuned_on,
        "trials": claim.trials,
        "search_seed": SEARCH_SEED,
    }


def described(thing: object) -> str:
    """Describe a function, or an argument that is bound to it, by text without addresses."""
    if not isinstance(thing, partial):
        return str(getattr(thing, "__qualname__", repr(thing)))
    named = [f"{name}={described(value)}" for name, value in thing.keywords.items()]
    return f"{described(thing.func)}({', '.join([*map(described, thing.args), *named])})"


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one line per comparison."""
    table = Table(
        title="Claims of papers, in percent; a positive difference speaks for the method",
        caption=RULE,
    )
    for column in ("claim", "measure", "method", "", "against", "", "difference", "error", "shown"):
        table.add_column(
            column, justify="right" if column in ("", "difference", "error") else "left"
        )
    for entry in rows:
        arms = entry["arms"]
        for found in entry["compared"]:
            ours, theirs = (arms[found[side]][found["measure"]] for side in ("method", "against"))
            shown = ("yes" if found["shown"] else "no") + (" (beside)" if found["beside"] else "")
            table.add_row(
                entry["claim"],
                found["measure"],
                found["method"],
                f"{ours:.1f}",
                found["against"],
                f"{theirs:.1f}",
                f"{found['difference']:.1f}",
                f"{found['standard_error']:.1f}",
                shown,
            )
        table.add_section()
    Console(width=150).print(table)


# --------------------------------------------------------------------------- all of it


def tested(claim: Claim, seeds: int, submit: Callable[..., Future[Any]]) -> dict[str, Any]:
    """Run all searches and all seeds of all arms, and build the row of the claim."""
    searches: dict[str, Future[Tuned]] = {
        arm.name: submit(search, claim, arm) for arm in claim.arms if arm.search
    }
    tuned = {name: future.result() for name, future in searches.items()}
    values = {arm.name: tuned[arm.name].values if arm.search else {} for arm in claim.arms}
    runs: dict[str, list[Future[dict[str, float]]]] = {
        arm.name: [submit(run, claim, arm, values[arm.name], seed) for seed in range(seeds)]
        for arm in claim.arms
    }
    return row(
        claim,
        tuned,
        {name: [future.result() for future in column] for name, column in runs.items()},
    )


def same(entry: dict[str, Any], claim: Claim, seeds: int) -> bool:
    """Return True if the stored row is this claim with these settings and seeds."""
    return (entry["claim"], entry["options"], entry["seeds"]) == (claim.name, options(claim), seeds)


def said_now(rows: Sequence[Row], claims: Sequence[Claim]) -> list[Row]:
    """Return the stored rows with the present texts of their claims."""
    said = {claim.name: words(claim) for claim in claims}
    return [{**entry, **said.get(entry["claim"], {})} for entry in rows]


def main(claims: Sequence[Claim], text: str) -> None:
    """Run the claims with the options of the command line; `text` explains the claims."""
    names = [claim.name for claim in claims]
    parser = command_line(text, seeds=5, resumed=True)
    parser.add_argument(
        "--claim", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names)
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, one thread each (default %(default)s)"
    )
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(
            f"--seeds {args.seeds}: allowed: 2 or more, as a difference of one seed has no error"
        )
    if args.data:
        os.environ["PERDURE_DATA"] = str(args.data)  # for the processes that train
    torch.set_num_threads(1)
    asked = [claim for claim in claims if claim.name in args.claim]
    rows = stored(args.json)
    waiting = [
        claim for claim in asked if not any(same(entry, claim, args.seeds) for entry in rows)
    ]
    with (
        Progress() as progress,
        ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool,
    ):
        total = sum(args.seeds + bool(arm.search) for claim in waiting for arm in claim.arms)
        task = progress.add_task("searches and runs", total=total)

        def submit(*work: Any) -> Future[Any]:
            future = pool.submit(*work)
            future.add_done_callback(lambda _: progress.advance(task))
            return future

        for claim in waiting:
            progress.update(task, description=claim.name)
            new = tested(claim, args.seeds, submit)
            rows = [entry for entry in rows if entry["claim"] != claim.name] + [new]
            store(args.json, said_now(rows, claims))
    store(args.json, said_now(rows, claims))
    show([entry for entry in rows if any(same(entry, claim, args.seeds) for claim in asked)])
