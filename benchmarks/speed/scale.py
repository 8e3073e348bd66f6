"""Memory and time of 10,000 clients with 100 a round, of which at most `alive` are in memory.

Each mode is a program of its own, whose largest resident memory is measured: `on disk` keeps what
clients remember in the folder of the run, `rebuilt` keeps it in a temporary file without their
learners, and `all alive` keeps every learner that was met. `--after` measures the same run after
several numbers of rounds, to see if memory grows with the clients that were met.

Every client has 6 of 60,000 records of 28 x 28, which are in memory once, and takes three steps of
SGD with momentum of an MLP with 79,510 parameters, so that what a client remembers is as large as
the model.

Seconds are by the clock, with everything before the first round: the streams, and the check of all
clients' settings, for which every learner is built once.

    python benchmarks/speed/scale.py --json benchmarks/results/scale.json
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from perdure import Learner, Records, Stream
from perdure.data import Experience, iid
from perdure.federated import Federation, Server, run_federation
from perdure.models import mlp
from perdure.strategies import Naive
from perdure.utils import store_rows

RECORDS = 60_000
MODES = ("on disk", "rebuilt", "all alive")
SHOWN = ("mode", "clients", "met", "alive", "rounds", "gigabytes", "seconds")


def stream() -> Stream:
    """Make one experience of random images in memory."""
    draws = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (RECORDS,), generator=draws)
    parts = [
        Records(
            inputs=torch.rand(count, 1, 28, 28, generator=draws),
            labels=labels[:count],
            ids=torch.arange(count) + first,
            partition="scale",
        )
        for count, first in ((RECORDS, 0), (100, RECORDS))
    ]
    classes = tuple(range(10))
    experience = Experience(index=0, train=parts[0], test=parts[1], classes=classes)
    return Stream(
        name="random",
        scenario="class",
        experiences=(experience,),
        num_classes=10,
        input_shape=(1, 28, 28),
    )


def learner(number: int) -> Learner:
    """Make the learner of a client."""
    return Learner(
        model=mlp(input_shape=(1, 28, 28), num_classes=10, hidden=(100,), seed=0),
        strategy=Naive(),
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        epochs=1,  # replaced by the local steps of the federation
        batch_size=2,
        seed=0,
        show_progress=False,
    )


def run(mode: str, clients: int, after: Sequence[int], alive: int) -> None:
    """Run a federation, and print the rows to store: one for each number of rounds in `after`."""
    began = time.monotonic()
    rounds = max(after)
    done = 0
    met: set[int] = set()
    streams = iid(stream(), clients=clients, min_size=1, seed=0)
    federation = Federation(
        clients=clients,
        rounds=rounds,
        local_steps=3,
        fraction=min(1.0, 100 / clients),
        alive=None if mode == "all alive" else alive,
    )

    def measure(point: str, server: Server) -> None:
        """Measure after each of the chosen numbers of rounds."""
        nonlocal done
        if point != "round.end":
            return
        met.update(federation.cohort(0, done))
        done += 1
        if done in after and done < rounds:  # the last row is of the whole run
            show()

    def show() -> None:
        """Print the row of the rounds so far."""
        row = {
            "benchmark": "scale",
            "mode": mode,
            "clients": clients,
            "met": len(met),
            "alive": federation.alive,
            "rounds": done,
            "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
            "seconds": time.monotonic() - began,
        }
        print(json.dumps(row), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) if mode == "on disk" else None
        run_federation(
            learner, streams, federation, folder=own, callbacks=[measure], show_progress=False
        )
    show()


def main() -> None:
    """Run the modes, each in a program of its own, print and store the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mode", choices=MODES, help="one mode, in this program")
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument(
        "--after", type=int, nargs="+", default=[20], help="numbers of rounds (default 20)"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--alive", type=int, default=100)
    parser.add_argument("--json", type=Path, help="store the rows in this file")
    args = parser.parse_args()
    if args.mode:
        torch.set_num_threads(1)
        run(args.mode, args.clients, args.after, args.alive)
        return
    rows = []
    for mode in args.modes:
        options = [f"--{n}={getattr(args, n)}" for n in ("clients", "alive")]
        options += ["--after", *map(str, args.after)]
        command = [sys.executable, __file__, f"--mode={mode}", *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
            assert program.stdout is not None
            for line in program.stdout:
                rows.append(json.loads(line))
                print({name: rows[-1][name] for name in SHOWN}, flush=True)
        if program.returncode:
            raise SystemExit(program.returncode)
    if args.json:
        store_rows(args.json, rows, seed=0)


if __name__ == "__main__":
    main()
