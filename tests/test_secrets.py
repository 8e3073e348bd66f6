"""No key, coin or memory row is in anything that leaves `private/`; and no request shares its noise with another one.

Every file of a run, everything it prints or logs and every message between server and clients is searched for its
secrets, written in any of the usual ways. A picture of a record, or a record that was computed with, is not looked for.
"""

import base64
import contextlib
import io
import json
import logging
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from perdure.federated.grid import InProcessGrid
from perdure.federated.state import from_record
from perdure.learner import Learner
from perdure.memory import Memory
from perdure.privacy.noise import NoiseKey
from perdure.privacy.policy import Privacy
from perdure.strategies import EWC, Replay

with warnings.catch_warnings():
    # typer takes names from click that click is about to move
    warnings.filterwarnings("ignore", message="'click", category=DeprecationWarning)
    from perdure import cli

CONFIG = """
name = "secret"
explain = 1
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
delta = 0.001
sampling_rate = 0.25
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

# --------------------------------------------------------------------------- what is looked for


@dataclass
class Secrets:
    """Everything that must not leave: keys, coins and tags (float64), memory rows (n, d), and their record ids."""

    keys: set[bytes] = field(default_factory=set)
    coins: list[torch.Tensor] = field(default_factory=list)
    rows: list[torch.Tensor] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)

    def needles(self):
        """Every way in which a secret may be written, to the kind of secret it is."""
        found = {needle: "key" for key in self.keys for needle in written_key(key)}
        for coins in self.coins:
            found |= dict.fromkeys(written_coins(coins), "coin")
        for rows in self.rows:
            found |= {needle: "memory row" for row in rows for needle in written_row(row)}
        for ids in self.ids:
            found |= dict.fromkeys(written_ids(ids), "record ids")
        return found


def in_base64(secret):
    """The characters that `secret` decides, at each of the three places where it may begin in a longer text."""
    for shift in range(3):
        text = base64.b64encode(bytes(shift) + secret)
        yield text[-(-shift * 8 // 6) : (shift + len(secret)) * 8 // 6]


def in_text(numbers):
    """As JSON, with and without spaces."""
    for gap in (", ", ","):
        yield gap.join(map(repr, numbers)).encode()


def written_key(key):
    yield from (key, key.hex().encode(), key.hex().upper().encode(), repr(key)[2:-1].encode())
    yield from in_base64(key)
    yield from in_text(list(key))


def written_coins(coins):
    """Each coin in full precision, as bytes or as a number; two neighbours in half of it."""
    values = coins.numpy()
    yield from (value.tobytes() for value in values)
    yield from (text.encode() for text in map(repr, values.tolist()) if len(text) > 12)
    yield from (values[i : i + 2].astype("f4").tobytes() for i in range(len(values) - 1))


def written_row(row):
    """The row and its halves, where they are not mostly blank."""
    half = len(row) // 2
    for part in (row, row[:half], row[half:]):
        if len(part.unique()) >= 8:
            values = part.numpy()
            forms = [values.astype(kind).tobytes() for kind in ("f4", "f8", "f2")]
            forms += [(scale * values).round().astype("u1").tobytes() for scale in (16, 255)]
            yield from forms
            yield from in_text(part.tolist())
            yield from (text for form in forms[:1] for text in in_base64(form))


def written_ids(ids):
    """Every four neighbours, in the order they are kept in and sorted."""
    for order in (ids, sorted(ids)):
        for i in range(len(order) - 3):
            four = order[i : i + 4]
            yield from (np.array(four, dtype=kind).tobytes() for kind in ("i8", "i4"))
            yield from in_text(four)


class Searcher:
    """Finds any of many needles of 8 bytes or more: eight bytes of each are looked up, then the needle is compared."""

    def __init__(self, secrets):
        self.kinds, self.places = secrets.needles(), {}
        for needle in self.kinds:
            offset = max(range(len(needle) - 7), key=lambda i, n=needle: len(set(n[i : i + 8])))
            word = int.from_bytes(needle[offset : offset + 8], "little")
            self.places.setdefault(word, []).append((offset, needle))
        self.words = np.array(sorted(self.places), dtype="<u8")

    def kinds_in(self, data):
        """Kinds of secrets that the bytes hold."""
        found = set()
        for shift in range(min(8, max(0, len(data) - 7))):
            words = np.frombuffer(data, dtype="<u8", offset=shift, count=(len(data) - shift) // 8)
            places = self.words[np.searchsorted(self.words, words).clip(max=len(self.words) - 1)] == words
            for i in np.flatnonzero(places):
                for offset, needle in self.places[int(words[i])]:
                    start = shift + 8 * int(i) - offset
                    if start >= 0 and data[start : start + len(needle)] == needle:
                        found.add(self.kinds[needle])
        return found

    def found(self, surface):
        """Names of all that holds a secret, with its kinds."""
        held = {name: set().union(*map(self.kinds_in, views)) for name, views in surface.items()}
        return {name: kinds for name, kinds in held.items() if kinds}


# --------------------------------------------------------------------------- where it is looked for


def as_values(tensors):
    """Bytes of the tensors' values, row by row and column by column, whatever their dtype."""
    for value in tensors.values():
        for layout in {value, value.movedim(0, -1)} if value.dim() > 1 else {value}:
            for kind in (torch.float32, torch.float64, torch.int64):
                yield layout.to(kind).contiguous().numpy().tobytes()


def files(folder, private):
    """Name of every file inside (or outside) folders called private to its bytes, and the values of its tensors."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and ("private" in path.relative_to(folder).parts[:-1]) == private:
            data = path.read_bytes()
            values = as_values(load(data)) if path.suffix == ".safetensors" else ()
            found[str(path.relative_to(folder))] = [data, *values]
    return found


def message_views(message):
    """A message as it goes over the wire, the values of its arrays, and its numbers as text."""
    from flwr.app import ArrayRecord
    from flwr.common.serde import message_to_proto

    views = [message_to_proto(message).SerializeToString()]
    for record in message.content.values() if message.has_content() else ():
        if isinstance(record, ArrayRecord):
            views += as_values(from_record(record))
        else:
            views.append(repr(dict(record)).encode())  # the wire packs whole numbers
    return views


@dataclass
class Heard:
    """Secrets and noise that passed by, and messages, while something ran."""

    secrets: Secrets = field(default_factory=Secrets)
    noise: list[torch.Tensor] = field(default_factory=list)
    messages: dict[str, list[bytes]] = field(default_factory=dict)


@contextlib.contextmanager
def hearing():
    """Listen to keys, coins, tags, noise, memories and messages of all that runs inside."""
    heard = Heard()

    def listen(owner, name, tell):
        call = getattr(owner, name)

        def listened(self, *args, **options):
            answer = call(self, *args, **options)
            tell(self, args, answer)
            return answer

        patch.setattr(owner, name, listened)

    def keep(memory, args, answer):
        heard.secrets.rows.append(memory.rows.inputs.flatten(1).clone())
        heard.secrets.ids.append(memory.rows.ids.tolist())

    def carry(grid, args, answer):
        for message in (*args, answer):
            heard.messages[f"message {len(heard.messages)}"] = message_views(message)

    with pytest.MonkeyPatch.context() as patch:
        listen(NoiseKey, "__init__", lambda self, args, answer: heard.secrets.keys.add(self._secret))
        listen(NoiseKey, "uniform", lambda self, args, answer: heard.secrets.coins.append(answer))
        listen(NoiseKey, "tags", lambda self, args, answer: heard.secrets.coins.append(answer))
        listen(NoiseKey, "normal", lambda self, args, answer: heard.noise.extend(map(torch.clone, answer.values())))
        listen(Memory, "offer_by_coin", keep)
        listen(InProcessGrid, "_deliver", carry)
        yield heard


@contextlib.contextmanager
def told():
    """Everything that is printed or logged, at any level."""
    surface, texts = {}, {name: io.StringIO() for name in ("stdout", "stderr", "log")}
    handler, root = logging.StreamHandler(texts["log"]), logging.getLogger()
    loggers = [root, logging.getLogger("flwr")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(1)
    try:
        with contextlib.redirect_stdout(texts["stdout"]), contextlib.redirect_stderr(texts["stderr"]):
            yield surface
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
        surface |= {name: [text.getvalue().encode()] for name, text in texts.items()}


def command(*words):
    """Call `perdure` in this process: what it printed and logged."""
    with pytest.MonkeyPatch.context() as patch, told() as surface:
        patch.setattr(sys, "argv", ["perdure", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert not ended.value.code, surface["stderr"]
    return surface


@dataclass
class Ran:
    """A finished run: its folder, what was heard, what it printed and logged."""

    folder: object
    heard: Heard
    printed: dict[str, list[bytes]]

    @cached_property
    def searcher(self):
        return Searcher(self.heard.secrets)

    @property
    def left(self):
        """Everything that leaves `private/`."""
        return files(self.folder, private=False) | self.printed | self.heard.messages


def ran(folder, text):
    (folder / "mine.toml").write_text(text)
    with hearing() as heard:
        printed = command("run", folder / "mine.toml", "--out", folder / "run")
    for more in (("report",), ("ledger", "show"), ("ledger", "verify")):
        again = command(*more, folder / "run")
        printed |= {f"{name} of {more[-1]}": views for name, views in again.items()}
    return Ran(folder / "run", heard, printed)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """EWC and Replay alone, with noise from the operating system."""
    return ran(tmp_path_factory.mktemp("alone"), CONFIG)


@pytest.fixture(scope="module")
def federated(tmp_path_factory):
    """The same two over three clients."""
    return ran(tmp_path_factory.mktemp("federated"), FEDERATED)


@pytest.fixture(params=["alone", "federated"])
def either(request):
    return request.getfixturevalue(request.param)


# --------------------------------------------------------------------------- the rule


@pytest.mark.slow
def test_nothing_that_leaves_holds_a_secret(either):
    assert either.searcher.found(either.left) == {}


def test_everything_was_looked_at(alone, federated):
    """Every kind of file and message; and the searcher does find the secrets where they belong."""
    for one, curators in ((alone, 2), (federated, 6)):
        secrets, left = one.heard.secrets, one.left
        kept = {path.read_bytes() for path in one.folder.rglob("key")}
        assert len(kept) == curators and kept <= secrets.keys
        assert len(secrets.rows) == curators and all(len(rows) > 3 for rows in secrets.rows)
        for name in ("result.json", "metrics.jsonl", "ledger.jsonl", "report.html", "config.toml", "stdout", "log"):
            assert left[name][0], name
        for part in ("figures/", "explanations", "checkpoint/ewc-private/model", "arms/replay-private/"):
            assert any(name.startswith(part) for name in left), part
        inside = one.searcher.found(files(one.folder, private=True))
        assert set().union(*inside.values()) == KINDS
        assert all("private/" in name for name in inside)
    # in each of two arms all clients are asked which they are, then in both experiences for two rounds and an end
    assert len(federated.heard.messages) == 2 * 2 * 3 * (1 + 2 * (2 + 1))
    assert not alone.heard.messages


@pytest.mark.slow
def test_an_audit_leaves_nothing_but_its_verdict(tmp_path, monkeypatch):
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
    assert [path.name for path in tmp_path.rglob("*")] == ["mine.toml", "tmp"]


# --------------------------------------------------------------------------- a planted secret is found

PLANTS = {
    "key as bytes": (lambda s: min(s.keys), "key"),
    "key in hex": (lambda s: min(s.keys).hex().encode(), "key"),
    "key in base64": (lambda s: base64.b64encode(b"a" + min(s.keys) + b"b"), "key"),
    "key as JSON": (lambda s: json.dumps(list(min(s.keys))).encode(), "key"),
    "key in a message": (lambda s: f"no key {min(s.keys)!r} at all".encode(), "key"),
    "row as floats": (lambda s: busy(s).numpy().tobytes(), "memory row"),
    "row as pixels": (lambda s: (16 * busy(s)).to(torch.uint8).numpy().tobytes(), "memory row"),
    "row as JSON": (lambda s: json.dumps({"row": busy(s).tolist()}).encode(), "memory row"),
    "row as short JSON": (lambda s: json.dumps(busy(s).tolist(), separators=(",", ":")).encode(), "memory row"),
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
def test_a_planted_secret_is_found(alone, name, shift):
    make, kind = PLANTS[name]
    secrets = alone.heard.secrets
    text = bytes(shift) + b"before " + make(secrets) + b" after"
    assert alone.searcher.found({"file": [text], "clean": [b"before and after"]}) == {"file": {kind}}


@pytest.mark.parametrize("name", TENSORS)
def test_a_planted_tensor_is_found_in_a_file_and_in_a_message(alone, tmp_path, name):
    make, kind = TENSORS[name]
    secrets = alone.heard.secrets
    (tmp_path / "private").mkdir()
    for path in (tmp_path / "model.safetensors", tmp_path / "private" / "000001.safetensors"):
        path.write_bytes(save({"clean": torch.zeros(3, 3), "planted": make(secrets)}))
    found = alone.searcher.found(files(tmp_path, private=False))
    assert found == {"model.safetensors": {kind}}
    values = list(as_values({"planted": make(secrets)}))
    assert alone.searcher.found({"message": values}) == {"message": {kind}}


def test_what_is_printed_logged_and_sent_is_searched(federated):
    secrets = federated.heard.secrets
    with told() as surface:
        print(min(secrets.keys).hex())
        print(secrets.ids[0], file=sys.stderr)
        logging.getLogger("perdure.curator").debug("coins %s", secrets.coins[0].tolist())
    assert federated.searcher.found(surface) == {"stdout": {"key"}, "stderr": {"record ids"}, "log": {"coin"}}


def test_a_secret_in_a_message_is_found(toy_stream, toy_model):
    """Memory rows as an array, a key as text and ids as numbers: what is recorded of a message holds them all."""
    from flwr.app import ConfigRecord, Message, RecordDict

    from perdure.federated import client_app
    from perdure.federated.state import to_record

    def make(number):
        return learner_of(toy_model(toy_stream()), SAME), toy_stream()

    rows, key = torch.rand(5, 16, generator=torch.Generator().manual_seed(0)), bytes(range(100, 132))
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
    options = {"optimizer": partial(torch.optim.SGD, lr=0.1), "iterations": 4, "batch_size": 8, "seed": 5} | changes
    return Learner(model=model, strategy=strategy or EWC(strength=9.0), privacy=privacy, **options)


def windows(noise):
    """Every four neighbours among the values of each tensor, with how often they occur."""
    return Counter(
        flat[i : i + WINDOW].tobytes()
        for value in noise
        for flat in [value.flatten().numpy()]
        for i in range(len(flat) - WINDOW + 1)
    )


def another_pixel(stream):
    """The stream with another value in one input of its first record."""
    first = stream[0]
    inputs = first.train.inputs.clone()
    inputs[0, 0] = 1 - inputs[0, 0]
    changed = replace(first, train=replace(first.train, inputs=inputs))
    return replace(stream, experiences=(changed, *stream.experiences[1:]))


def one_record_less(stream):
    """The stream without its first record, under the declared size of before."""
    first = stream[0]
    rest = replace(first.train.take(torch.arange(1, len(first.train))), declared_size=first.train.declared_size)
    return replace(stream, experiences=(replace(first, train=rest), *stream.experiences[1:]))


CHANGES = {
    "one pixel": {"stream": another_pixel},
    "one record": {"stream": one_record_less},
    "clip norm": {"privacy": replace(SAME, clip_norm=1.25)},
    "learning rate": {"optimizer": partial(torch.optim.SGD, lr=0.1000001)},
}


@pytest.mark.parametrize("strategy", [EWC(strength=9.0), Replay(memory_size=20)], ids=["ewc", "replay"])
@pytest.mark.parametrize("name", ["nothing", *CHANGES])
def test_runs_that_differ_in_anything_share_no_noise(toy_stream, toy_model, strategy, name):
    """Four float32 normals coincide by chance with probability below 1e-20: no pair among these few thousand does."""
    drawn = []
    for changes in ({}, dict(CHANGES.get(name, {}))):
        stream = changes.pop("stream", lambda stream: stream)(toy_stream())
        with hearing() as heard:
            learner_of(toy_model(toy_stream()), changes.pop("privacy", SAME), strategy, **changes).fit(stream)
        assert all(value.dtype == torch.float32 for value in heard.noise)
        drawn.append(windows(heard.noise))
    draws = 8 + 2 * isinstance(strategy, EWC)
    each = sum(param.numel() - WINDOW + 1 for param in toy_model(toy_stream()).parameters())
    assert sum(drawn[0].values()) == draws * each
    assert all(set(found.values()) == {1} for found in drawn)  # nor is any drawn twice within a run
    assert (drawn[0] == drawn[1]) if name == "nothing" else not drawn[0].keys() & drawn[1].keys()


def test_clients_and_arms_share_no_noise(alone, federated):
    for one in (alone, federated):
        found = windows(one.heard.noise)
        assert len(found) > 1000 and set(found.values()) == {1}
    assert not windows(alone.heard.noise).keys() & windows(federated.heard.noise).keys()
