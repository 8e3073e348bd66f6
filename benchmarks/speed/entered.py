"""Number of files and functions of perdure that run in one private step and in one round.

A reader who follows a private step, or a federated round, has to look into each of them. The step
is one of Replay with an MLP under privacy (flat clipping), in the middle of a block of the second
experience. The round is the only one of the second experience, in a private federation of two
clients in this process (EWC), with consolidation, evaluation and checkpoints at its end.

`functions` are code objects: Python up to 3.11 makes one for every comprehension, too, so compare
only rows of one version of Python. `named` counts the code objects written with `def`.

    python benchmarks/speed/entered.py --json benchmarks/results/entered.json --label before
"""

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import CodeType, FrameType

import torch
from rich.console import Console
from rich.table import Table

import perdure
import perdure.strategies
from perdure import Learner, Privacy, Strategy, Stream
from perdure.data import digits, iid, split
from perdure.federated import Federation, Server, fit_federated
from perdure.models import mlp
from perdure.strategies import EWC, Replay
from perdure.utils import command, machine, store_rows, versions

PACKAGE = Path(perdure.__file__).resolve().parent
STRATEGIES = Path(perdure.strategies.__file__).resolve().parent
STEP = 4
"""Number of the recorded step in the second experience; its block has twice as many steps."""
TARGETS = {"private step": (18, 100), "federated round": (25, 300)}
"""Largest number of files and of functions that each should run."""


@dataclass
class Entered:
    """Code objects that ran between `start` and `stop`, by file.

    Args:
        functions: file to its code objects.
        known: every code object so far to its file; None if the file is not one of perdure's.
    """

    functions: dict[str, set[CodeType]] = field(default_factory=dict)
    known: dict[CodeType, str | None] = field(default_factory=dict)

    def start(self) -> None:
        """Record every call of this thread, and of threads that start from now on."""
        threading.setprofile(self._called)
        sys.setprofile(self._called)

    def stop(self) -> None:
        """Stop recording calls."""
        sys.setprofile(None)
        threading.setprofile(None)  # typeshed does not know that None is allowed

    def _called(self, frame: FrameType, event: str, _: object) -> None:
        if event != "call":
            return
        code = frame.f_code
        if code not in self.known:
            self.known[code] = place(code)
        found = self.known[code]
        if found:
            self.functions.setdefault(found, set()).add(code)


def place(code: CodeType) -> str | None:
    """Return the file of a function of perdure below `src/perdure` or `strategies`, else None."""
    path = Path(code.co_filename).resolve()
    if path.is_relative_to(STRATEGIES):
        return f"strategies/{path.relative_to(STRATEGIES)}"
    return str(path.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) else None


def names(codes: set[CodeType]) -> list[str]:
    """Return the qualified names of the functions written with `def`."""
    return sorted(code.co_qualname for code in codes if not code.co_name.startswith("<"))


def learner_of(stream: Stream, strategy: Strategy, number: int = 0) -> Learner:
    """Return a private learner with an MLP; `number` is the client's."""
    return Learner(
        model=mlp(input_shape=stream.input_shape, num_classes=10, hidden=(32,), seed=0),
        strategy=strategy,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        iterations=2 * STEP,
        batch_size=32,
        privacy=Privacy(noise_multiplier=1.0, seed=0),
        client=number,
    )


def private_step() -> Entered:
    """Record one step of Replay, from the end of the step before to its own end."""
    stream = split(digits(), scenario="class", experiences=5)
    entered = Entered()

    def listen(point: str, learner: Learner) -> None:
        if point != "step.done" or learner.position.experience != 1:
            return
        if learner.position.step == STEP:
            entered.start()
        else:
            entered.stop()

    learner = learner_of(stream, Replay(memory_size=50))
    learner.callbacks = [listen]
    learner.prepare(stream)
    for index in range(2):
        learner.begin(index)
        for block in learner.training.remaining_blocks(index, learner.position.step):
            learner.train(block)
        learner.finish()
    return entered


def federated_round() -> Entered:
    """Record the only round of the second experience of a federation, up to its last checkpoint."""
    streams = iid(split(digits(), scenario="class", experiences=2), clients=2, exact=False)
    entered = Entered()

    def listen(point: str, server: Server) -> None:
        if point == "round.begin" and server.experience == 1:
            entered.start()
        elif point == "checkpoint.end" and server.exchange == server.exchanges:
            entered.stop()

    with TemporaryDirectory() as folder:
        fit_federated(
            lambda number: learner_of(streams[number], EWC(strength=10.0), number),
            streams,
            Federation(clients=2, rounds=1),
            folder=Path(folder),
            callbacks=[listen],
        )
    return entered


WATCHED: dict[str, Callable[[], Entered]] = {
    "private step": private_step,
    "federated round": federated_round,
}


def measure(name: str, label: str) -> dict[str, object]:
    """Build the row for one entry of `WATCHED`, with its functions by file."""
    functions = WATCHED[name]().functions
    most_files, most_functions = TARGETS[name]
    return {
        "benchmark": "entered",
        "label": label,
        "entered_by": name,
        "files": len(functions),
        "functions": sum(map(len, functions.values())),
        "named": sum(len(names(codes)) for codes in functions.values()),
        "files_target": most_files,
        "functions_target": most_functions,
        "by_file": {path: names(codes) for path, codes in sorted(functions.items())},
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "command": command(),
    }


def commit() -> str | None:
    """Return the git commit of the code that runs; None outside of a checkout."""
    words = ["git", "-C", str(PACKAGE), "rev-parse", "HEAD"]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def show(rows: list[dict[str, object]], *, listed: bool) -> None:
    """Print the counts and, if `listed` is True, every function."""
    columns = (
        "label",
        "entered_by",
        "files",
        "files_target",
        "functions",
        "functions_target",
        "named",
    )
    table = Table(title="code of perdure that is entered")
    for column in columns:
        table.add_column(column.replace("_", " "))
    for entry in rows:
        table.add_row(*[str(entry[column]) for column in columns])
    console = Console(width=100)
    console.print(table)
    for entry in rows if listed else ():
        print(f"\n{entry['entered_by']}, {entry['label']}")
        by_file = entry["by_file"]
        assert isinstance(by_file, dict)
        for path, found in by_file.items():
            print(f"{path} ({len(found)}): {', '.join(found)}")


def main() -> None:
    """Count both, print the counts, and store them beside the rows of other labels."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--label", default="now", help="name of the state of the code")
    parser.add_argument("--list", action="store_true", help="print every function, by file")
    parser.add_argument("--json", type=Path, help="store the rows here; those of other labels stay")
    args = parser.parse_args()
    rows = [measure(name, args.label) for name in WATCHED]
    show(rows, listed=args.list)
    if args.json:
        stored = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
        others = [entry for entry in stored if entry["label"] != args.label]
        store_rows(args.json, [*others, *rows], seed=0)


if __name__ == "__main__":
    main()
