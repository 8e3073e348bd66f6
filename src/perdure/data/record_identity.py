"""Detect records that are in two partitions, because their privacy costs would not be added.

A ledger counts by partition. Its epsilon holds for a record only if the record is in one partition.
Two facts show that a record is in two of them: the id that it was given at its source, and the
memory that holds its row. Classes, partition names and values are not used.

Guarantee: none. The check is for the holder of the records, before a curator holds them. A set of
streams that it refuses has no privacy statement at all. The streams of this library pass it with
any records, because they put each record into one partition or give its copies one name. No other
public fact depends on ids.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from perdure.data.experience import Stream
from perdure.data.records import Records
from perdure.data.row_view import addresses_of
from perdure.errors import DataError, GuardError

Place = tuple[int, str]
"""Number of a stream and name of a partition in it."""
LARGEST_FILE = 2**44
"""Largest size of a mapped file in bytes; it separates the numbers of two files."""


def refuse_records_in_two_partitions(streams: Sequence[Stream]) -> None:
    """Refuse streams in which one record is in two partitions.

    If no ids were given, ids are positions and do not identify records: such records are compared
    only by the memory that holds them, and rows of a mapped file by their place in the file.

    Args:
        streams: the streams of all parties whose records this process holds. Partitions of two
            streams are always different, because each party has its own ledger.

    Raises:
        GuardError: names the two partitions, but no record.
    """
    held: dict[Place, list[Records]] = {}
    for number, stream in enumerate(streams):
        for experience in stream:
            held.setdefault((number, experience.train.partition), []).append(experience.train)
    by_id = {place: _ids(parts) for place, parts in held.items()}
    files = _mapped_files()
    by_memory = {place: files.places(_addresses(parts)) for place, parts in held.items()}
    found = _shared(by_id)
    if found is not None:
        raise GuardError(
            f"{_told(found, streams)} contain records with the same id, and their privacy costs "
            "would not be added; if they are different people, give them different ids (for "
            f"example ids + 10_000); if not, give all experiences of a record {_one_place(found)}"
        )
    found = _shared(by_memory)
    if found is not None:
        raise GuardError(
            f"{_told(found, streams)} contain the same rows of one tensor, and their privacy "
            "costs would not be added; give each of them different rows, or give all experiences "
            f"of a record {_one_place(found)}"
        )


def refuse_test_ids_in_training(train: Records, test: Records, name: str) -> None:
    """Refuse a test part that has a record in common with the training part, by their ids.

    If no ids were given, ids are positions and do not identify records.

    Args:
        train: training records.
        test: test records.
        name: name of the data, for the message.

    Raises:
        DataError: names the first row of the test part that is in both.
    """
    if train.ids_by_position or test.ids_by_position:
        return
    both = torch.isin(test.ids, train.ids.to(test.ids.device)).nonzero()
    if len(both):
        raise DataError(_of_both(name, test, both))


def refuse_measured_records(stream: Stream) -> None:
    """Refuse a stream with a record that is both in training and in the evaluation, by its id.

    Args:
        stream: stream with any number of experiences; records that several of them share are
            checked once.

    Raises:
        DataError: names the experience and the row of the first such test record.
    """
    learnt = _ids([experience.train for experience in stream])
    seen: set[int] = set()
    for experience in stream:
        test = experience.test
        if id(test.ids) in seen or test.ids_by_position:
            continue
        seen.add(id(test.ids))
        both = torch.isin(test.ids.cpu(), learnt).nonzero()
        if len(both):
            raise DataError(_of_both(f"experience {experience.index} of {stream.name}", test, both))


def learnt_rows(streams: Iterable[Stream], rows: Tensor, ids: Tensor | None = None) -> Tensor:
    """Find rows that are training records of some streams, by their memory or their ids.

    Names of partitions are not compared, because a record keeps its identity under another name.

    Args:
        streams: streams with training records.
        rows: (n, ...) inputs.
        ids: (n,) ids that were given to the rows; None if they are positions or not known.

    Returns:
        (n,) bool, on the CPU.
    """
    learnt = [experience.train for stream in streams for experience in stream]
    files = _mapped_files()
    places = addresses_of(rows)
    known = files.places(_addresses(learnt))
    found = torch.isin(files.places(places), known) & (places != 0)
    return found if ids is None else found | torch.isin(ids.cpu(), _ids(learnt))


def _of_both(name: str, test: Records, both: Tensor) -> str:
    """Build the message about test records that are training records, too."""
    row = int(both[0])
    return (
        f"{name} has id {int(test.ids[row])} in row {row} of its test records and among the "
        f"training records ({len(both)} such rows); allowed: each record in one part; leave it out "
        "of one, or give different records different ids"
    )


def _ids(parts: Iterable[Records]) -> Tensor:
    """Return the ids (r,) that were given to the records of a partition, each once."""
    given = [part.ids.cpu() for part in parts if not part.ids_by_position]
    return torch.unique(torch.cat(given)) if given else torch.empty(0, dtype=torch.int64)


def _addresses(parts: Iterable[Records]) -> Tensor:
    """Return the memory addresses (r,) at which the rows of a partition begin, each once."""
    found: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
    seen: set[int] = set()
    for part in parts:
        rows = part.inputs
        if id(rows) in seen:
            continue
        seen.add(id(rows))
        places = addresses_of(rows)
        found.append(places[places != 0])  # rows without an address cannot be compared
    each: Tensor = torch.unique(torch.cat(found))
    return each


@dataclass(frozen=True, kw_only=True, eq=False)
class _MappedFiles:
    """Parts of memory that are mapped from files.

    Args:
        starts: (m,) int64 first address of each part, ascending.
        ends: (m,) int64 address behind each part.
        moves: (m,) int64 difference of an address to the place in its file, which is negative and
            is the same however often the file is mapped.
    """

    starts: Tensor
    ends: Tensor
    moves: Tensor

    def places(self, addresses: Tensor) -> Tensor:
        """Convert addresses (r,) in mapped files to places in the files; keep other addresses."""
        if not len(self.starts):
            return addresses
        part = torch.bucketize(addresses, self.ends, right=True).clamp(max=len(self.ends) - 1)
        inside = (self.starts[part] <= addresses) & (addresses < self.ends[part])
        return torch.where(inside, addresses + self.moves[part], addresses)


def _mapped_files() -> _MappedFiles:
    """Return the mapped files of this process; none if the system does not list them."""
    lines: list[str] = []
    with suppress(OSError):
        lines = Path("/proc/self/maps").read_text().splitlines()
    numbers: dict[str, int] = {}
    found = []
    for span, _, offset, device, inode, *_ in (line.split(maxsplit=5) for line in lines):
        if inode != "0":
            start, end = (int(address, 16) for address in span.split("-"))
            file = numbers.setdefault(f"{device} {inode}", len(numbers) + 1)
            found.append((start, end, int(offset, 16) - start - file * LARGEST_FILE))
    starts, ends, moves = torch.tensor(found, dtype=torch.int64).reshape(-1, 3).T
    return _MappedFiles(starts=starts, ends=ends.contiguous(), moves=moves)


def _shared(keys: Mapping[Place, Tensor]) -> tuple[Place, Place] | None:
    """Return the first two partitions that have a key in common; None if there are none."""
    every = torch.cat(list(keys.values()))
    owner = torch.cat([torch.full_like(own, n) for n, own in zip(count(), keys.values())])
    order = torch.argsort(every, stable=True)
    twice = (every[order][1:] == every[order][:-1]).nonzero().flatten()
    if not len(twice):
        return None
    first = int(twice[0])
    places = list(keys)
    one, other = (places[int(owner[order[row]])] for row in (first, first + 1))
    return one, other


def _told(found: tuple[Place, Place], streams: Sequence[Stream]) -> str:
    (one, here), (other, there) = found
    if one == other:
        return f"partitions {here!r} and {there!r} of stream {streams[one].name}"
    return f"partition {here!r} of client {one} and partition {there!r} of client {other}"


def _one_place(found: tuple[Place, Place]) -> str:
    (one, _), (other, _) = found
    return "one partition name" if one == other else "to one client"
