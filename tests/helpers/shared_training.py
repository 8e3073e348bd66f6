"""One training for one process and for several; run as a module, it is one of the others.

python -m helpers.shared_training CASES RANK COUNT MEETING trains every case; a case is a strategy,
with " private" behind it under privacy.
"""

import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import distributed

from perdure import Learner, Privacy
from perdure.data import Dataset, Records, Stream, split
from perdure.models import mlp
from perdure.strategies import AGEM, DER, EWC, Naive
from perdure.utils.processes import connect, rendezvous

CASES = {
    "Naive": Naive(),
    "EWC": EWC(strength=10.0),
    "DER++": DER(memory_size=12, beta=0.5),
    "A-GEM": AGEM(memory_size=12),
}
T = TypeVar("T")
LONGEST = 120
"""Seconds after which a process that waits for the other is ended."""
PRIVACY = Privacy(noise_multiplier=1.0, delta=1e-3, seed=3)


def toy_records(first_id: int, rows: int, partition: str) -> Records:
    rng = torch.Generator().manual_seed(first_id)
    labels = torch.arange(rows) % 4
    inputs = torch.randn(rows, 6, generator=rng, dtype=torch.float64)
    return Records(
        inputs=inputs + 2 * torch.eye(4, 6, dtype=torch.float64)[labels],
        labels=labels,
        ids=torch.arange(rows) + first_id,
        partition=partition,
    )


def toy_stream() -> Stream:
    """Return two experiences of 30 records in float64."""
    data = Dataset(
        name="shared toy",
        train=toy_records(0, 60, "toy"),
        test=toy_records(1000, 20, "toy-test"),
        num_classes=4,
        input_shape=(6,),
    )
    return split(data, experiences=2, scenario="class")


def learner_of(case: str, *, seed: int = 0, **given: object) -> Learner:
    """Return a learner of a case, with a model in float64."""
    strategy, _, private = case.partition(" ")
    options = {
        "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        "epochs": 2,
        "batch_size": 7,
        "privacy": PRIVACY if private else None,
    }
    model = mlp(input_shape=(6,), num_classes=4, hidden=(8,), seed=seed).double()
    return Learner(model=model, strategy=CASES[strategy], **options | given)


def in_two_processes(work: Callable[[], T]) -> tuple[T, str]:
    """Call `work` in this process and in a forked one, which are processes 0 and 1 of a group.

    Returns:
        The answer of process 0, and the error message of process 1, or "".
    """
    with rendezvous() as meeting:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            signal.alarm(LONGEST)
            try:
                connect(1, 2, meeting)
                work()
            except BaseException as error:
                os.write(writing, f"{type(error).__name__}: {error}".encode())
            finally:
                os._exit(0)
        os.close(writing)
        try:
            connect(0, 2, meeting, timeout=timedelta(seconds=LONGEST))
            answer = work()
        finally:
            distributed.destroy_process_group()
            with os.fdopen(reading) as file:
                told = file.read()
            os.waitpid(child, 0)
    return answer, told


def follow(cases: str, rank: str, count: str, meeting: str) -> None:
    """Train every case as one of several processes, with a model of other initial values."""
    torch.set_num_threads(1)
    connect(int(rank), int(count), Path(meeting))
    for case in cases.split(","):
        learner_of(case, processes=int(count), seed=int(rank)).fit(toy_stream())


if __name__ == "__main__":
    follow(*sys.argv[1:])
