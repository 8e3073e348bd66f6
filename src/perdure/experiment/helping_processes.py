"""Further processes of a configured run, which divide every batch with the process that writes it.

`run` starts them.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from perdure.errors import NonFiniteError, PerdureError, RunawayError
from perdure.experiment.arm import ArmRun, open_stream
from perdure.experiment.config import Arm, Config, read
from perdure.experiment.metrics_log import MetricsLog
from perdure.utils.processes import Message, Processes, connect, with_processes

TRIAL = "trial"
"""Kind of the message with the arm and the seed of the next training."""
PROGRAM = "from perdure.experiment.helping_processes import main; main()"
"""Program of another process; `python -m` would warn, because the package imports this module."""


@contextmanager
def helped(config: Config, path: Path) -> Iterator[Processes | None]:
    """Start the other processes of a run; None if the config asks for one process only.

    Args:
        config: config of the run.
        path: file of the config, for the other processes.
    """
    if config.processes == 1:
        yield None
        return
    command = [sys.executable, "-c", PROGRAM, str(path.resolve())]
    with with_processes(command, config.processes):
        yield Processes(rank=0, count=config.processes)


def announce(processes: Processes, arm: Arm, seed: int) -> None:
    """Tell the other processes which training comes next."""
    processes.tell(TRIAL, Message(facts={"arm": arm.name, "seed": seed}))


def follow(path: Path, rank: int, count: int, meeting: Path) -> None:
    """Take part in every training that process 0 announces, until it ends.

    Args:
        path: file of the config.
        rank: number of this process.
        count: number of processes.
        meeting: file by which the processes meet.
    """
    config = read(path)
    torch.set_num_threads(config.threads)
    processes = connect(rank, count, meeting)
    arms = {arm.name: arm for arm in config.arms}
    while True:
        chosen = processes.hear(TRIAL).facts
        mine = config.of_seed(chosen["seed"])
        stream = open_stream(mine)
        arm = arms[chosen["arm"]]
        name = config.trial(arm, chosen["seed"])
        trial = ArmRun(mine, arm, stream, path.parent, MetricsLog(Path(os.devnull)), name=name)
        # a training that diverges does so in every process, and process 0 reports it
        with suppress(RunawayError, NonFiniteError):
            trial.learner(stream, processes=count).fit(stream)


def main() -> None:
    """Take part as one of the other processes; the arguments are CONFIG RANK COUNT MEETING."""
    try:
        follow(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    except PerdureError as error:
        sys.exit(f"process {sys.argv[2]}: {error}")
