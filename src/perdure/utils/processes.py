"""Group of processes that train one model: messages of the first one, and sums over all.

Messages are JSON and safetensors; pickle is never used. They may contain private values, such as
exact sums, and are not encrypted.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from perdure.errors import ConfigError, RunError

TIMEOUT = timedelta(minutes=30)
"""Longest time that a process waits for the others; the end of a process is seen at once."""
ERROR = "error"
"""Kind of a message with the error that ended the first process."""
START = "start every process with `torchrun --nproc-per-node {count} SCRIPT`"


@dataclass(frozen=True, kw_only=True)
class Message:
    """Message of the first process to all others.

    Args:
        tensors: name to tensor.
        facts: JSON values.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


class Processes:
    """The group of `torch.distributed` in which this process trains.

    Every process calls the same methods in the same order; a call waits for the others.

    Args:
        rank: number of this process, from 0.
        count: number of processes.
    """

    def __init__(self, *, rank: int, count: int) -> None:
        self.rank = rank
        self.count = count

    @classmethod
    def join(cls, count: int) -> "Processes":
        """Return the group of this process; start it from the environment of `torchrun` if needed.

        The rendezvous of `torchrun` is the user's: it listens on all interfaces, without a secret.

        Args:
            count: expected number of processes.

        Raises:
            ConfigError: if there is no group, or it has another size or cannot send CPU tensors.
        """
        from torch import distributed

        start = START.format(count=count)
        if not distributed.is_available():
            raise ConfigError.of("processes", count, "1, because torch has no distributed package")
        if not distributed.is_initialized():
            if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
                raise ConfigError.of("processes", count, f"1 in a single process; {start}")
            with lost_processes():
                distributed.init_process_group("gloo", timeout=TIMEOUT)
        if distributed.get_world_size() != count:
            allowed = f"{distributed.get_world_size()}, the size of this group; {start}"
            raise ConfigError.of("processes", count, allowed)
        if "cpu:" not in str(distributed.get_backend_config()):
            allowed = "1 in a group without CPU tensors; use init_process_group('gloo')"
            raise ConfigError.of("processes", count, allowed)
        return cls(rank=distributed.get_rank(), count=count)

    @property
    def first(self) -> bool:
        """Return True in process 0, which draws the noise and writes all files."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """Return this process's part of `rows` rows; the parts differ by one row at most."""
        return slice(self.rank * rows // self.count, (self.rank + 1) * rows // self.count)

    def add(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Add tensors over all processes; every process gets the same sums.

        Args:
            values: tensors of one dtype.
        """
        from torch import distributed

        flat = torch.cat([value.detach().reshape(-1) for value in values]).cpu()
        with lost_processes():
            distributed.all_reduce(flat)
        parts = torch.split(flat.to(values[0].device), [value.numel() for value in values])
        return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]

    def agree(self, digest: bytes) -> bool:
        """Return True if all processes give the same digest of 32 bytes."""
        own = torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(torch.int32)
        table = torch.zeros(self.count, len(own), dtype=torch.int32)
        table[self.rank] = own
        (every,) = self.add([table])
        return bool((every == every[0]).all())

    def from_first(self, kind: str, answer: Callable[[], Message]) -> Message:
        """Compute an answer in process 0, and return it in every process.

        Args:
            kind: name of the message; a process that waits for another one raises an error.
            answer: function that is called in process 0 only.

        Raises:
            RunError: in the other processes, if `answer` fails in process 0.
        """
        if not self.first:
            return self.hear(kind)
        try:
            message = answer()
        except BaseException as error:
            text = str(error).partition("\n")[0]
            self.tell(ERROR, Message(facts={"text": text or type(error).__name__}))
            raise
        self.tell(kind, message)
        return message

    def tell(self, kind: str, message: Message) -> None:
        """Send a message from process 0 to all others."""
        from safetensors.torch import save
        from torch import distributed

        head = json.dumps({"kind": kind, "facts": dict(message.facts)}).encode()
        own = {n: t.detach().cpu().contiguous().clone() for n, t in message.tensors.items()}
        data = bytearray(head + (save(own) if own else b""))
        with lost_processes():
            distributed.broadcast(torch.tensor([len(head), len(data)]), 0)
            distributed.broadcast(torch.frombuffer(data, dtype=torch.uint8), 0)

    def hear(self, kind: str) -> Message:
        """Receive a message of process 0.

        Raises:
            RunError: if process 0 sends another message, or was ended by an error.
        """
        from safetensors.torch import load
        from torch import distributed

        sizes = torch.zeros(2, dtype=torch.int64)
        with lost_processes():
            distributed.broadcast(sizes, 0)
            received = torch.zeros(int(sizes[1]), dtype=torch.uint8)
            distributed.broadcast(received, 0)
        data = received.numpy().tobytes()
        head = json.loads(data[: int(sizes[0])])
        if head["kind"] == ERROR:
            raise RunError(f"process 0 ended with an error: {head['facts']['text']}")
        if head["kind"] != kind:
            raise RunError(
                f"process {self.rank} waits for {kind!r}, but process 0 sent {head['kind']!r}; "
                "run the same script in every process, with the same seeds"
            )
        rest = data[int(sizes[0]) :]
        return Message(tensors=load(rest) if rest else {}, facts=head["facts"])


@contextmanager
def lost_processes() -> Iterator[None]:
    """Context manager that turns a lost connection between processes into a RunError."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise RunError(
            f"another process of this training ended or does not answer ({reason}); look at its "
            "error, and start all processes again: a run with a folder continues"
        ) from error


# --------------------------------------------------------------------------- on one machine

PAUSE = 0.05
"""Seconds between two looks at processes that begin."""
INTERFACE = "GLOO_SOCKET_IFNAME"
"""Environment variable with the network interface on which gloo listens."""


@contextmanager
def rendezvous() -> Iterator[Path]:
    """Context manager of a new file by which processes of one user on this machine meet.

    Its folder is open to this user alone, and is removed at the end. A `TCPStore` would listen on
    every interface, and give the place of a process to whoever asks first.
    """
    with TemporaryDirectory(prefix="perdure-processes-") as folder:
        yield Path(folder, "rendezvous")


@contextmanager
def with_processes(command: Sequence[str], count: int) -> Iterator[None]:
    """Start processes 1 to `count` - 1 on this machine, and be process 0 of their group.

    At the end they are stopped.

    Args:
        command: command of the others; their number, `count` and the path of the rendezvous are
            appended. They call `connect` with these values.
        count: number of processes with this one.

    Raises:
        RunError: if a process ends before it has joined.
    """
    from torch import distributed

    with rendezvous() as meeting:
        others = [
            # a list of arguments, so no shell reads it
            subprocess.Popen([*command, str(rank), str(count), str(meeting)])  # noqa: S603
            for rank in range(1, count)
        ]
        try:
            store = distributed.FileStore(str(meeting))  # type: ignore[attr-defined]
            ready = [_ready(rank) for rank in range(1, count)]
            while not store.check(ready):
                if any(each.poll() is not None for each in others):
                    raise RunError(
                        f"one of the {count} processes ended before the training began; look at "
                        "its error above"
                    )
                time.sleep(PAUSE)
            connect(0, count, meeting)
            try:
                yield
            finally:
                distributed.destroy_process_group()
        finally:
            for each in others:
                each.terminate()
            for each in others:
                each.wait()


def connect(rank: int, count: int, meeting: Path, *, timeout: timedelta = TIMEOUT) -> Processes:
    """Join the group of a rendezvous on this machine; its processes listen on the loopback only.

    Args:
        rank: number of this process.
        count: number of processes.
        meeting: file of `rendezvous`.
        timeout: longest time that this process waits for the others.

    Raises:
        RunError: if the others do not join.
    """
    from torch import distributed

    if rank:
        # Ctrl-C reaches every process of a terminal; process 0 stops the others
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    with lost_processes(), _loopback_only():
        store = distributed.FileStore(str(meeting))  # type: ignore[attr-defined]
        store.set(_ready(rank), "")
        distributed.init_process_group(
            "gloo", store=store, rank=rank, world_size=count, timeout=timeout
        )
    return Processes(rank=rank, count=count)


@contextmanager
def _loopback_only() -> Iterator[None]:
    """Context manager in which a new group of gloo listens on the loopback interface only."""
    before = os.environ.get(INTERFACE)
    os.environ[INTERFACE] = "lo" if sys.platform == "linux" else "lo0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[INTERFACE]
        else:
            os.environ[INTERFACE] = before


def _ready(rank: int) -> str:
    return f"ready {rank}"
