"""Memory and time of 10,000 clients with 100 a round, of which at most `alive` are in memory.

Each mode is a program of its own, whose largest resident memory is measured: `on disk` keeps what
clients remember in the folder of the run, `rebuilt` keeps it in memory without their learners, and
`all alive` keeps every learner that was met. Every client has 6 of 60,000 records of 28 x 28, which
are in memory once, and takes three steps of SGD with momentum of an MLP with 79,510 parameters, so
that what a client remembers is as large as the model.

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
from functools import partial
from pathlib import Path

import torch

from perdure import Learner, Records, Stream
from perdure.data import Experience, iid
from perdure.federated import Federation, run_federation
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


def run(mode: str, clients: int, rounds: int, alive: int) -> dict[str, object]:
    """Run a federation, and return the row to store."""
    began = time.monotonic()
    met: set[int] = set()
    streams = iid(stream(), clients=clients, min_size=1, seed=0)
    federation = Federation(
        clients=clients,
        rounds=rounds,
        local_steps=3,
        fraction=min(1.0, 100 / clients),
        alive=None if mode == "all alive" else alive,
    )
    for number in range(rounds):
        met |= set(federation.cohort(0, number))
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) if mode == "on disk" else None
        run_federation(learner, streams, federation, folder=own, show_progress=False)
    return {
        "benchmark": "scale",
        "mode": mode,
        "clients": clients,
        "met": len(met),
        "alive": federation.alive,
        "rounds": rounds,
        "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "seconds": time.monotonic() - began,
    }


def main() -> None:
    """Run the modes, each in a program of its own, print and store the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mode", choices=MODES, help="one mode, in this program")
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--alive", type=int, default=100)
    parser.add_argument("--json", type=Path, help="store the rows in this file")
    args = parser.parse_args()
    if args.mode:
        torch.set_num_threads(1)
        print(json.dumps(run(args.mode, args.clients, args.rounds, args.alive)))
        return
    rows = []
    for mode in MODES:
        options = [f"--{n}={getattr(args, n)}" for n in ("clients", "rounds", "alive")]
        command = [sys.executable, __file__, f"--mode={mode}", *options]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print({name: rows[-1][name] for name in SHOWN}, flush=True)
    if args.json:
        store_rows(args.json, rows, seed=0)


if __name__ == "__main__":
    main()
