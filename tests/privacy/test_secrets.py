"""No key, coin or memory row is in anything that leaves `private/`; and no request shares its noise
with another one.

Every file of a run, everything it prints or logs and every message between server and clients is
searched for its secrets, written in any of the usual ways. A picture of a record, or a record that
was computed with, is not looked for.
"""

import base64
import getpass
import json
import logging
import sys
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save

from helpers.secret_scanner import Searcher, Secrets, as_values, command, files, hearing, ran, told
from perdure.federated.flower_adapter import InProcessGrid
from perdure.learner.learner import Learner
from perdure.privacy.settings import Privacy
from perdure.strategies import EWC, Replay

CONFIG = """
name = "secret"
[data]
experiences = 2
[model]
hidden = [6]
[training]
optimizer = "SGD"
learning_rate = 0.1
epochs = 1
[privacy]
noise_multiplier = 1.0
delta = 0.0005
sampling_rate = 0.25
[explain]
method = "kernel_shap"
records = 1
[[arms]]
strategy = "ewc"
strength = 1.0
private = true
[[arms]]
strategy = "replay"
memory_size = 40
private = true
"""
FEDERATED = CONFIG + "[federation]\nclients = 3\nrounds = 2\n"
KINDS = {"key", "coin", "memory row", "record ids"}
SAME = Privacy(noise_multiplier=1.0, seed=0)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Return a run of EWC and Replay with one learner and noise from the operating system."""
    return ran(tmp_path_factory.mktemp("alone"), CONFIG)


@pytest.fixture(scope="module")
def federated(tmp_path_factory):
    """Return a run of the same two strategies with three clients."""
    return ran(tmp_path_factory.mktemp("federated"), FEDERATED)


@pytest.fixture(params=["alone", "federated"])
def either(request):
    return request.getfixturevalue(request.param)


# --------------------------------------------------------------------------- the rule


@pytest.mark.slow
def test_the_outputs_of_a_run_contain_no_secret(either):
    assert either.searcher.found(either.left) == {}


def test_the_secret_search_covers_every_kind_of_output(alone, federated):
    """Every kind of file and message is searched, and the search finds the secrets in private
    folders.
    """
    for one, curators in ((alone, 2), (federated, 6)):
        secrets = one.heard.secrets
        left = one.left
        kept = {path.read_bytes() for path in one.folder.rglob("key")}
        assert len(kept) == curators and kept <= secrets.keys
        assert len(secrets.rows) == curators and all(len(rows) > 3 for rows in secrets.rows)
        for name in (
            "result.json",
            "metrics.jsonl",
            "ledger.jsonl",
            "report.html",
            "config.toml",
            "stdout",
            "log",
        ):
            assert left[name][0], name
        for part in (
            "figures/",
            "explanations",
            "checkpoint/ewc-private/model",
            "arms/replay-private/",
        ):
            assert any(name.startswith(part) for name in left), part
        inside = one.searcher.found(files(one.folder, private=True))
        assert set().union(*inside.values()) == KINDS
        assert all("private/" in name for name in inside)
    # in each of two arms all clients are asked which they are, then in both experiences for two
    # rounds and an end
    assert len(federated.heard.messages) == 2 * 2 * 3 * (1 + 2 * (2 + 1))
    assert not alone.heard.messages


@pytest.mark.slow
def test_an_audit_writes_nothing_except_its_result(tmp_path, monkeypatch):
    (tmp_path / "mine.toml").write_text(CONFIG)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.chdir(tmp_path)
    with hearing() as heard:
        printed = command("audit", tmp_path / "mine.toml", "--canaries", 50)
    secrets = heard.secrets
    assert len(secrets.keys) == 1 and len(secrets.coins) > 8 and len(secrets.rows) == 2
    assert b"epsilon is at least" in printed["stdout"][0]
    assert Searcher(secrets).found(printed) == {}
    # torch makes an empty cache folder where temporary files go, when it is first used
    made = {path.name for path in tmp_path.rglob("*")} - {f"torchinductor_{getpass.getuser()}"}
    assert made == {"mine.toml", "tmp"}


# ------------------------------------------------------------------------ a planted secret is found

PLANTS = {
    "key as bytes": (lambda s: min(s.keys), "key"),
    "key in hex": (lambda s: min(s.keys).hex().encode(), "key"),
    "key in base64": (lambda s: base64.b64encode(b"a" + min(s.keys) + b"b"), "key"),
    "key as JSON": (lambda s: json.dumps(list(min(s.keys))).encode(), "key"),
    "key in a message": (lambda s: f"no key {min(s.keys)!r} at all".encode(), "key"),
    "row as floats": (lambda s: busy(s).numpy().tobytes(), "memory row"),
    "row as pixels": (lambda s: (16 * busy(s)).to(torch.uint8).numpy().tobytes(), "memory row"),
    "row as JSON": (lambda s: json.dumps({"row": busy(s).tolist()}).encode(), "memory row"),
    "row as short JSON": (
        lambda s: json.dumps(busy(s).tolist(), separators=(",", ":")).encode(),
        "memory row",
    ),
    "row in base64": (lambda s: base64.b64encode(b"a" + busy(s).numpy().tobytes()), "memory row"),
    "ids as JSON": (lambda s: json.dumps(s.ids[0][:5]).encode(), "record ids"),
    "ids as integers": (lambda s: np.array(s.ids[0][:5]).tobytes(), "record ids"),
    "sorted ids": (lambda s: str(sorted(s.ids[0])).encode(), "record ids"),
    "coin as bytes": (lambda s: s.coins[0][3].numpy().tobytes(), "coin"),
    "coin as JSON": (lambda s: json.dumps({"tag": float(s.coins[-1][3])}).encode(), "coin"),
}
TENSORS = {
    "rows in a tensor": (lambda s: s.rows[0].clone(), "memory row"),
    "rows in columns": (lambda s: s.rows[0].T.contiguous(), "memory row"),
    "rows in double precision": (lambda s: s.rows[0].double(), "memory row"),
    "rows in half precision": (lambda s: s.rows[0].half(), "memory row"),
    "ids in a tensor": (lambda s: torch.tensor(s.ids[0], dtype=torch.int32), "record ids"),
    "coins in a tensor": (lambda s: s.coins[0][:1].clone(), "coin"),
    "coins in single precision": (lambda s: s.coins[0].float(), "coin"),
}


def busy(secrets):
    """A memory row."""
    return max(secrets.rows[0], key=lambda row: len(row.unique()))


@pytest.mark.parametrize("name", PLANTS)
@pytest.mark.parametrize("shift", [0, 3])
def test_the_secret_search_finds_a_planted_secret(alone, name, shift):
    make, kind = PLANTS[name]
    secrets = alone.heard.secrets
    text = bytes(shift) + b"before " + make(secrets) + b" after"
    assert alone.searcher.found({"file": [text], "clean": [b"before and after"]}) == {
        "file": {kind}
    }


@pytest.mark.parametrize("name", TENSORS)
def test_the_secret_search_finds_a_tensor_in_files_and_messages(alone, tmp_path, name):
    make, kind = TENSORS[name]
    secrets = alone.heard.secrets
    (tmp_path / "private").mkdir()
    for path in (tmp_path / "model.safetensors", tmp_path / "private" / "000001.safetensors"):
        path.write_bytes(save({"clean": torch.zeros(3, 3), "planted": make(secrets)}))
    found = alone.searcher.found(files(tmp_path, private=False))
    assert found == {"model.safetensors": {kind}}
    values = list(as_values({"planted": make(secrets)}))
    assert alone.searcher.found({"message": values}) == {"message": {kind}}


def test_the_secret_search_covers_printed_and_logged_text(federated):
    secrets = federated.heard.secrets
    with told() as surface:
        print(min(secrets.keys).hex())
        print(secrets.ids[0], file=sys.stderr)
        logging.getLogger("perdure.curator.local_curator").debug(
            "coins %s", secrets.coins[0].tolist()
        )
    assert federated.searcher.found(surface) == {
        "stdout": {"key"},
        "stderr": {"record ids"},
        "log": {"coin"},
    }


def test_the_secret_search_finds_secrets_in_a_client_message(toy_stream, toy_model):
    """The message contains memory rows as an array, a key as text and ids as numbers."""
    from flwr.app import ConfigRecord, Message, RecordDict

    from perdure.federated import client_app
    from perdure.federated.messages import to_record

    def make(number):
        return learner_of(toy_model(toy_stream()), SAME), toy_stream()

    rows = torch.rand(5, 16, generator=torch.Generator().manual_seed(0))
    key = bytes(range(100, 132))
    task = ConfigRecord({"note": key.hex(), "of": [3, 14, 15, 92]})
    content = RecordDict({"arrays": to_record({"w": rows}), "task": task})
    with hearing() as heard, InProcessGrid(client_app(make), 1).running() as grid:
        grid.send_and_receive([Message(content, 1, "query.partition")])
    assert len(heard.messages) == 2
    found = Searcher(Secrets(keys={key}, rows=[rows], ids=[[3, 14, 15, 92]])).found(heard.messages)
    assert found == {"message 0": {"key", "memory row", "record ids"}}


# --------------------------------------------------------------------------- noise is never shared

WINDOW = 4


def learner_of(model, privacy, strategy=None, **changes):
    options = {
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "iterations": 4,
        "batch_size": 8,
        "seed": 5,
    } | changes
    return Learner(model=model, strategy=strategy or EWC(strength=9.0), privacy=privacy, **options)


def windows(noise):
    """Return every four neighbouring values of each tensor, with counts."""
    return Counter(
        flat[i : i + WINDOW].tobytes()
        for value in noise
        for flat in [value.flatten().numpy()]
        for i in range(len(flat) - WINDOW + 1)
    )


def another_pixel(stream):
    """Return the stream with another value in one input of its first record."""
    first = stream[0]
    inputs = first.train.inputs.clone()
    inputs[0, 0] = 1 - inputs[0, 0]
    changed = replace(first, train=replace(first.train, inputs=inputs))
    return replace(stream, experiences=(changed, *stream.experiences[1:]))


def one_record_less(stream):
    """Return the stream without its first record, under the same declared size."""
    first = stream[0]
    rest = replace(
        first.train.take(torch.arange(1, len(first.train))), declared_size=first.train.declared_size
    )
    return replace(stream, experiences=(replace(first, train=rest), *stream.experiences[1:]))


CHANGES = {
    "one pixel": {"stream": another_pixel},
    "one record": {"stream": one_record_less},
    "clip norm": {"privacy": replace(SAME, clip_norm=1.25)},
    "learning rate": {"optimizer": partial(torch.optim.SGD, lr=0.1000001)},
}


@pytest.mark.parametrize(
    "strategy", [EWC(strength=9.0), Replay(memory_size=20)], ids=["ewc", "replay"]
)
@pytest.mark.parametrize("name", ["nothing", *CHANGES])
def test_different_runs_have_different_noise(toy_stream, toy_model, strategy, name):
    """Four integers coincide by chance with probability below 1e-20, and none of these do."""
    drawn = []
    for changes in ({}, dict(CHANGES.get(name, {}))):
        stream = changes.pop("stream", lambda stream: stream)(toy_stream())
        with hearing() as heard:
            learner_of(
                toy_model(toy_stream()), changes.pop("privacy", SAME), strategy, **changes
            ).fit(stream)
        drawn.append(windows(heard.noise))
    draws = 8 + 2 * isinstance(strategy, EWC)
    each = sum(param.numel() for param in toy_model(toy_stream()).parameters()) - WINDOW + 1
    assert sum(drawn[0].values()) == draws * each
    assert all(set(found.values()) == {1} for found in drawn)  # nor is any drawn twice within a run
    assert (drawn[0] == drawn[1]) if name == "nothing" else not drawn[0].keys() & drawn[1].keys()


def test_different_clients_and_arms_have_different_noise(alone, federated):
    for one in (alone, federated):
        found = windows(one.heard.noise)
        assert len(found) > 1000 and set(found.values()) == {1}
    assert not windows(alone.heard.noise).keys() & windows(federated.heard.noise).keys()
