"""Memory of clients without a folder, in a temporary file without a name."""

import json
import os
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import pytest
import torch

from helpers.federations import hard, maker
from perdure.errors import StorageError
from perdure.federated import Federation, run_federation
from perdure.federated.client_store import ClientSnapshot
from perdure.federated.parked_clients import ParkedClients
from perdure.learner.checkpoint import Snapshot
from perdure.strategies import Replay


def snapshot(seed, size=1000, exchange=3):
    """Make the snapshot of a client with every kind of value."""
    draws = torch.Generator().manual_seed(seed)
    tensors = {
        "optimizer.momentum": torch.randn(size, generator=draws),
        "state.count": torch.tensor(seed),
        "state.half": torch.randn(4, 6, generator=draws).T.to(torch.bfloat16),
        "state.none": torch.empty(0),
    }
    rows = {"memory.inputs": torch.randint(255, (5, 2), dtype=torch.uint8, generator=draws)}
    facts = {"position": [1, 2], "rate": 0.1 + seed, "accuracy": float("inf")}
    return ClientSnapshot(exchange, Snapshot(tensors=tensors, private=rows, facts=facts))


def bits(parked):
    """Return everything that a snapshot holds, as bytes by name."""
    found = {}
    for values in (parked.snapshot.tensors, parked.snapshot.private):
        for name, value in values.items():
            plain = value.contiguous().reshape(-1).view(torch.uint8)
            found[name] = (value.dtype, tuple(value.shape), plain.numpy().tobytes())
    return found, json.dumps(parked.snapshot.facts), parked.exchange


def test_a_parked_client_comes_back_with_the_same_bits():
    parked = ParkedClients()
    for seed in range(5):
        parked.put(seed, snapshot(seed, exchange=seed))
    parked.put(2, snapshot(7, size=30_000))
    for seed in (4, 0, 3, 1):
        assert bits(parked.pop(seed)) == bits(snapshot(seed, exchange=seed))
    assert bits(parked.pop(2)) == bits(snapshot(7, size=30_000))
    assert parked.pop(2) is None


def test_parked_values_are_not_in_memory():
    parked = ParkedClients()
    given = snapshot(0)
    held = weakref.ref(given.snapshot.tensors["optimizer.momentum"])
    parked.put(0, given)
    del given
    assert held() is None


def test_the_file_grows_with_clients_and_not_with_rounds():
    parked = ParkedClients()
    for client in range(10):
        parked.put(client, snapshot(client))
    size = parked.size
    assert size <= 10 * 8192
    for number in range(50):
        client = number % 10
        parked.pop(client)
        parked.put(client, snapshot(number))
    assert parked.size == size


def test_the_file_has_no_name_and_no_other_reader(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    parked = ParkedClients()
    parked.put(0, snapshot(0))
    assert list(tmp_path.iterdir()) == []
    links = [
        each for each in Path("/proc/self/fd").iterdir() if str(tmp_path) in str(each.resolve())
    ]
    opened = [each.stat() for each in links]
    assert [(each.st_nlink, each.st_mode & 0o077) for each in opened] == [(0, 0)]


def test_a_killed_process_leaves_no_file(tmp_path):
    program = (
        "import os, signal, torch\n"
        "from perdure.federated.client_store import ClientSnapshot\n"
        "from perdure.federated.parked_clients import ParkedClients\n"
        "from perdure.learner.checkpoint import Snapshot\n"
        "parked = ParkedClients()\n"
        "parked.put(0, ClientSnapshot(0, Snapshot(tensors={'a': torch.zeros(9999)})))\n"
        "assert parked.size\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "TMPDIR": tmp_path})
    assert done.returncode == -9
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_plain_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(StorageError, match="missing"):
        ParkedClients().put(0, snapshot(0))


def test_a_federation_leaves_nothing_in_the_temporary_folder(stream, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    streams, _ = hard(stream)
    federation = Federation(clients=len(streams), rounds=2, alive=1)
    run_federation(maker(stream, Replay(memory_size=20)), streams, federation)
    assert list(tmp_path.iterdir()) == []
