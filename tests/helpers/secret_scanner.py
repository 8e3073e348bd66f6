"""Secrets of a run in every written form, and a search for them in all outputs."""

import base64
import contextlib
import io
import logging
import sys
import warnings
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pytest
import torch
from safetensors.torch import load

from perdure.curator.memory import Memory
from perdure.federated.flower_adapter import InProcessGrid
from perdure.federated.messages import from_record
from perdure.privacy.noise.key import NoiseKey

with warnings.catch_warnings():
    # typer takes names from click that click is about to move
    warnings.filterwarnings("ignore", message="'click", category=DeprecationWarning)
    from perdure.cli import main as cli

# --------------------------------------------------------------------------- what is looked for


@dataclass
class Secrets:
    """Everything that must not leave: keys, coins and tags (float64), memory rows (n, d), and their
    record ids.
    """

    keys: set[bytes] = field(default_factory=set)
    coins: list[torch.Tensor] = field(default_factory=list)
    rows: list[torch.Tensor] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)

    def needles(self):
        """Map every written form of a secret to its kind."""
        found = {needle: "key" for key in self.keys for needle in written_key(key)}
        for coins in self.coins:
            found |= dict.fromkeys(written_coins(coins), "coin")
        for rows in self.rows:
            found |= {needle: "memory row" for row in rows for needle in written_row(row)}
        for ids in self.ids:
            found |= dict.fromkeys(written_ids(ids), "record ids")
        return found


def in_base64(secret):
    """Return the base64 characters that `secret` fixes, for each of three positions in a longer
    text.
    """
    for shift in range(3):
        text = base64.b64encode(bytes(shift) + secret)
        yield text[-(-shift * 8 // 6) : (shift + len(secret)) * 8 // 6]


def in_text(numbers):
    """Return JSON with and without spaces."""
    for gap in (", ", ","):
        yield gap.join(map(repr, numbers)).encode()


def written_key(key):
    yield from (key, key.hex().encode(), key.hex().upper().encode(), repr(key)[2:-1].encode())
    yield from in_base64(key)
    yield from in_text(list(key))


def written_coins(coins):
    """Yield each coin in full precision, as bytes and as a number, and pairs of neighbours in half
    precision.
    """
    values = coins.numpy()
    yield from (value.tobytes() for value in values)
    yield from (text.encode() for text in map(repr, values.tolist()) if len(text) > 12)
    yield from (values[i : i + 2].astype("f4").tobytes() for i in range(len(values) - 1))


def written_row(row):
    """Yield the row and its halves, unless they are mostly blank."""
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
    """Yield every four neighbouring ids, in stored and in sorted order."""
    for order in (ids, sorted(ids)):
        for i in range(len(order) - 3):
            four = order[i : i + 4]
            yield from (np.array(four, dtype=kind).tobytes() for kind in ("i8", "i4"))
            yield from in_text(four)


class Searcher:
    """Search for many byte strings of 8 bytes or more, first by eight bytes of each."""

    def __init__(self, secrets):
        self.kinds = secrets.needles()
        self.places = {}
        for needle in self.kinds:
            offset = max(range(len(needle) - 7), key=lambda i, n=needle: len(set(n[i : i + 8])))
            word = int.from_bytes(needle[offset : offset + 8], "little")
            self.places.setdefault(word, []).append((offset, needle))
        self.words = np.array(sorted(self.places), dtype="<u8")

    def kinds_in(self, data):
        """Return the kinds of secrets that the bytes contain."""
        found = set()
        for shift in range(min(8, max(0, len(data) - 7))):
            words = np.frombuffer(data, dtype="<u8", offset=shift, count=(len(data) - shift) // 8)
            places = (
                self.words[np.searchsorted(self.words, words).clip(max=len(self.words) - 1)]
                == words
            )
            for i in np.flatnonzero(places):
                for offset, needle in self.places[int(words[i])]:
                    start = shift + 8 * int(i) - offset
                    if start >= 0 and data[start : start + len(needle)] == needle:
                        found.add(self.kinds[needle])
        return found

    def found(self, surface):
        """Map the name of each output that contains a secret to the kinds of secrets."""
        held = {name: set().union(*map(self.kinds_in, views)) for name, views in surface.items()}
        return {name: kinds for name, kinds in held.items() if kinds}


def as_values(tensors):
    """Yield the bytes of tensor values, by row and by column, for any dtype."""
    for value in tensors.values():
        for layout in {value, value.movedim(0, -1)} if value.dim() > 1 else {value}:
            for kind in (torch.float32, torch.float64, torch.int64):
                yield layout.to(kind).contiguous().numpy().tobytes()


def files(folder, private):
    """Map the name of every file inside (or outside) private folders to its bytes and tensor
    values.
    """
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and ("private" in path.relative_to(folder).parts[:-1]) == private:
            data = path.read_bytes()
            values = as_values(load(data)) if path.suffix == ".safetensors" else ()
            found[str(path.relative_to(folder))] = [data, *values]
    return found


def message_views(message):
    """Return a serialised message, its array values, and its numbers as text."""
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
    """Secrets, noise and messages recorded while something ran."""

    secrets: Secrets = field(default_factory=Secrets)
    noise: list[torch.Tensor] = field(default_factory=list)
    messages: dict[str, list[bytes]] = field(default_factory=dict)


@contextlib.contextmanager
def hearing():
    """Record keys, coins, tags, noise, memories and messages of everything that runs inside."""
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

    def noted(add_noise, noise):
        def adding(key, total, scale, **place):
            before = total.clone()
            add_noise(key, total, scale, **place)
            noise.append((total - before).double())

        return adding

    def carry(messages):
        for message in messages:
            heard.messages[f"message {len(heard.messages)}"] = message_views(message)

    push = InProcessGrid.push_messages

    def pushed(grid, messages):
        waiting = list(messages)
        numbers = push(grid, waiting)
        carry(waiting)
        return numbers

    with pytest.MonkeyPatch.context() as patch:
        listen(NoiseKey, "__init__", lambda key, args, answer: heard.secrets.keys.add(args[0]))
        listen(NoiseKey, "uniform", lambda key, args, answer: heard.secrets.coins.append(answer))
        listen(NoiseKey, "tags", lambda key, args, answer: heard.secrets.coins.append(answer))
        patch.setattr(NoiseKey, "add_noise", noted(NoiseKey.add_noise, heard.noise))
        listen(Memory, "offer_by_coin", keep)
        patch.setattr(InProcessGrid, "push_messages", pushed)
        listen(InProcessGrid, "pull_messages", lambda grid, args, answer: carry(answer))
        yield heard


@contextlib.contextmanager
def told():
    """Record everything that is printed or logged, at any level."""
    surface = {}
    texts = {name: io.StringIO() for name in ("stdout", "stderr", "log")}
    handler = logging.StreamHandler(texts["log"])
    root = logging.getLogger()
    loggers = [root, logging.getLogger("flwr")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(1)
    try:
        with (
            contextlib.redirect_stdout(texts["stdout"]),
            contextlib.redirect_stderr(texts["stderr"]),
        ):
            yield surface
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
        surface |= {name: [text.getvalue().encode()] for name, text in texts.items()}


def command(*words):
    """Call `perdure` in this process; return the printed and logged text."""
    with pytest.MonkeyPatch.context() as patch, told() as surface:
        patch.setattr(sys, "argv", ["perdure", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert not ended.value.code, surface["stderr"]
    return surface


@dataclass
class Ran:
    """A finished run: its folder, the recorded secrets, and the printed and logged text."""

    folder: object
    heard: Heard
    printed: dict[str, list[bytes]]

    @cached_property
    def searcher(self):
        return Searcher(self.heard.secrets)

    @property
    def left(self):
        """Return everything that leaves `private/`."""
        return files(self.folder, private=False) | self.printed | self.heard.messages


def ran(folder, text):
    (folder / "mine.toml").write_text(text)
    with hearing() as heard:
        printed = command("run", folder / "mine.toml", "--out", folder / "run")
    for more in (("report",), ("ledger", "show"), ("ledger", "verify")):
        again = command(*more, folder / "run")
        printed |= {f"{name} of {more[-1]}": views for name, views in again.items()}
    return Ran(folder / "run", heard, printed)
