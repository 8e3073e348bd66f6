"""Messages of each client of a federation, counted from the start of the run."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

from perdure.federated.held_arrays import HeldArray, values_of

COUNTS = ("asked", "accepted", "bytes_sent", "bytes_received")
"""Columns of the whole numbers that are counted for each client."""
PREFIX = "clients."
"""Beginning of the names of the counts in a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class ClientTotal:
    """Counts of one client since the start of the run.

    Args:
        client: number of the client.
        asked: number of exchanges in which the client was asked.
        accepted: number of exchanges in which its reply was accepted.
        bytes_sent: bytes of all tensors that the server sent to it.
        bytes_received: bytes of all tensors in its replies, rejected ones included.
        seconds: time of its work; see `ClientTotals`.
    """

    client: int
    asked: int
    accepted: int
    bytes_sent: int
    bytes_received: int
    seconds: float


class ClientTotals:
    """Counts of all clients; iterate over them for a `ClientTotal` of each.

    A client that is asked twice in one exchange counts once as asked, and its messages count twice.
    Seconds are the time in which the client answered: in this process its own work, on other
    engines the time from sending the messages of the exchange to the arrival of its reply.

    Bytes are those of the tensors: names, numbers of the task and the engine's own envelope are not
    counted. No tensor is serialised to be counted.

    Args:
        clients: number of clients.
    """

    def __init__(self, clients: int) -> None:
        self._counts = torch.zeros(clients, len(COUNTS), dtype=torch.int64).numpy()
        self._seconds = torch.zeros(clients, dtype=torch.float64).numpy()

    def __len__(self) -> int:
        return len(self._seconds)

    def __iter__(self) -> Iterator[ClientTotal]:
        rows = zip(self._counts.tolist(), self._seconds.tolist(), strict=True)
        for client, (counts, seconds) in enumerate(rows):
            yield ClientTotal(
                client=client, seconds=seconds, **dict(zip(COUNTS, counts, strict=True))
            )

    def count_sent(self, client: int, content: RecordDict) -> None:
        """Count a message to a client."""
        self._counts[client, 2] += tensor_bytes(content)

    def count_received(self, client: int, content: RecordDict | None, seconds: float) -> None:
        """Count a reply; its content is None if it is an error."""
        self._counts[client, 3] += 0 if content is None else tensor_bytes(content)
        self._seconds[client] += seconds

    def end(self, asked: Iterable[int], accepted: Iterable[int]) -> None:
        """Count the clients of an exchange that ends now."""
        self._counts[list(asked), 0] += 1
        self._counts[list(accepted), 1] += 1

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of the counts for a checkpoint."""
        return {
            f"{PREFIX}counts": torch.tensor(self._counts),
            f"{PREFIX}seconds": torch.tensor(self._seconds),
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from the counts of a checkpoint; a checkpoint of an older version has none."""
        if f"{PREFIX}counts" in tensors:
            self._counts[:] = tensors[f"{PREFIX}counts"].numpy()
            self._seconds[:] = tensors[f"{PREFIX}seconds"].numpy()


def tensor_bytes(content: RecordDict) -> int:
    """Return the bytes of the numbers in all arrays of a message, however it is carried."""
    return sum(
        _bytes_of(array)
        for record in content.values()
        if isinstance(record, ArrayRecord)
        for array in values_of(record).values()
    )


def _bytes_of(array: Array) -> int:
    value = array.tensor if isinstance(array, HeldArray) else None
    if value is not None:
        return int(value.nbytes)
    data = array.data
    # A file of NumPy begins with ten bytes and a header, whose length is in the last two of them.
    # The shape beside the bytes is what a foreign client says of them.
    return max(0, len(data) - 10 - int.from_bytes(data[8:10], "little"))
