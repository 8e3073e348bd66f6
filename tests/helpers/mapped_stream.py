"""A stream over a file that is mapped into memory, cut, trained on and evaluated; and the memory
that this takes.

As a program it prints one line of JSON. Its arguments are a file to make, the file's size in MB,
the name of a strategy, and "plain" or "private".
"""

import json
import os
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perdure import Learner, Privacy, Records
from perdure.data import Dataset, InputDomain, Stream, split
from perdure.models import mlp
from perdure.strategies import find

COLUMNS = 1024  # 4 kB a record
CLASSES = 4


def anonymous() -> int:
    """Return the anonymous memory of this process in kB; pages of a mapped file do not count."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0])


class Peak:
    """Measure the largest anonymous memory while the block runs, every few milliseconds."""

    def __enter__(self) -> "Peak":
        self.kilobytes = anonymous()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self.kilobytes = max(self.kilobytes, anonymous())


def drop_from_cache(path: str) -> None:
    """Drop the file's pages from the cache, so that they are read again."""
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def records(inputs: torch.Tensor, first_id: int) -> Records:
    n = len(inputs)
    domain = InputDomain(shape=(COLUMNS,), range=(0.0, 1.0))
    ids = torch.arange(n) + first_id
    return Records(inputs=inputs, labels=torch.arange(n) % CLASSES, ids=ids, domain=domain)


def cut_in_two(inputs: torch.Tensor) -> Stream:
    train = 9 * len(inputs) // 10
    data = Dataset(
        name="mapped",
        train=records(inputs[:train], 0),
        test=records(inputs[train:], train),
        num_classes=CLASSES,
        input_shape=(COLUMNS,),
    )
    return split(data, scenario="class", experiences=2)


def train(stream: Stream, name: str, mode: str) -> list[float]:
    learner = Learner(
        model=mlp(input_shape=(COLUMNS,), num_classes=CLASSES, hidden=(16,), seed=0),
        strategy=find(name).example(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        iterations=20,
        batch_size=32,
        privacy=Privacy(noise_multiplier=1.0, delta=1e-8, seed=0) if mode == "private" else None,
    )
    learner.fit(stream)
    return learner.evaluate(stream)


def measured(path: str, megabytes: int, name: str, mode: str) -> dict[str, Any]:
    """Return anonymous memory in kB before the work, its peaks while the stream is split and
    trained on, and the accuracies.
    """
    n = megabytes * 1000 // 4
    table = np.memmap(path, dtype=np.float32, mode="w+", shape=(n, COLUMNS))  # holes: no disk used
    table[: n // 10, 0] = np.arange(n // 10) % CLASSES == 0
    table.flush()
    drop_from_cache(path)
    inputs = torch.from_numpy(np.memmap(path, dtype=np.float32, mode="r+", shape=(n, COLUMNS)))
    train(cut_in_two(inputs[:100]), name, mode)  # what is imported on the way counts as before
    before = anonymous()
    with Peak() as cut:
        stream = cut_in_two(inputs)
    drop_from_cache(path)
    with Peak() as trained:
        accuracies = train(stream, name, mode)
    return {
        "before": before,
        "cut": cut.kilobytes,
        "trained": trained.kilobytes,
        "accuracies": accuracies,
    }


if __name__ == "__main__":
    file, size, *how = sys.argv[1:]
    print(json.dumps(measured(file, int(size), *how)))
