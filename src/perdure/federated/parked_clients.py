"""Memory of clients without a folder and without a learner, in a temporary file."""

import json
import tempfile
import weakref
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from perdure.federated.client_store import ClientSnapshot
from perdure.learner.checkpoint import Snapshot
from perdure.utils.atomic_files import writing

SMALLEST = 4096
"""Smallest piece of the file, in bytes; the others are this times a power of two."""


@dataclass(frozen=True)
class Piece:
    """Place of a client's snapshot in the file, in bytes, and the number of its last exchange."""

    exchange: int
    start: int
    room: int
    facts: int
    tensors: int


class ParkedClients:
    """Snapshots of clients without privacy, so that memory does not grow with the clients met.

    They are in a file without a name, as JSON and safetensors: only this process can open it, and
    it ends with the process, also with a killed one. Python chooses its folder: the variable TMPDIR
    or the system's. Keys and ledgers are never in it, because clients with privacy are not parked.
    A piece that is free again is used for the next snapshot of its size, so the file grows with the
    clients that are met, and not with rounds.
    """

    def __init__(self) -> None:
        self._file: BinaryIO | None = None
        self._pieces: dict[int, Piece] = {}
        self._free: dict[int, list[int]] = defaultdict(list)
        self._end = 0

    @property
    def size(self) -> int:
        """Length of the file in bytes."""
        return self._end

    def put(self, client: int, parked: ClientSnapshot) -> None:
        """Write a client's snapshot.

        Raises:
            StorageError: if the file cannot be written.
        """
        from safetensors.torch import save

        snapshot = parked.snapshot
        kinds = {"public": snapshot.tensors, "private": snapshot.private}
        tensors = save(
            {
                f"{kind}.{name}": value.detach().cpu().contiguous().clone()
                for kind, values in kinds.items()
                for name, value in values.items()
            }
        )
        facts = json.dumps(dict(snapshot.facts)).encode()
        self._drop(client)
        with writing(Path(tempfile.gettempdir())):
            file = self._opened()
            start, room = self._place(len(facts) + len(tensors))
            file.seek(start)
            file.write(facts)
            file.write(tensors)
            file.flush()
        self._pieces[client] = Piece(parked.exchange, start, room, len(facts), len(tensors))

    def pop(self, client: int) -> ClientSnapshot | None:
        """Read a client's snapshot and let it go; None if the client is not parked."""
        from safetensors.torch import load

        piece = self._pieces.get(client)
        if piece is None:
            return None
        file = self._opened()
        file.seek(piece.start)
        facts = json.loads(file.read(piece.facts))
        tensors = load(file.read(piece.tensors))
        self._drop(client)
        kinds = {
            kind: {
                name.removeprefix(f"{kind}."): value
                for name, value in tensors.items()
                if name.startswith(f"{kind}.")
            }
            for kind in ("public", "private")
        }
        snapshot = Snapshot(tensors=kinds["public"], private=kinds["private"], facts=facts)
        return ClientSnapshot(piece.exchange, snapshot)

    def _opened(self) -> BinaryIO:
        """Return the file; it is opened late, because an app travels to Ray's processes."""
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  closed with this object
            weakref.finalize(self, self._file.close)
        return self._file

    def _place(self, count: int) -> tuple[int, int]:
        """Return start and length of a free piece with room for `count` bytes."""
        room = SMALLEST
        while room < count:
            room *= 2
        if self._free[room]:
            return self._free[room].pop(), room
        start = self._end
        self._end += room
        return start, room

    def _drop(self, client: int) -> None:
        piece = self._pieces.pop(client, None)
        if piece is not None:
            self._free[piece.room].append(piece.start)
