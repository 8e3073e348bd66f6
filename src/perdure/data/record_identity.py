"""Detect records that are in two partitions, because their privacy costs would not be added.

A ledger counts by partition. Its epsilon holds for a record only if the record is in one partition.
Two facts show that a record is in two of them: the id that it was given at its source, and the
memory that holds its row. Classes, partition names and values are not used.

Guarantee: none. The check is for the holder of the records, before a curator holds them. A set of
streams that it refuses has no privacy statement at all. The streams of this library pass it with
any records, because they put each record into one partition or give its copies one name. No other
public fact depends on ids.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Self
from weakref import WeakSet

import torch
from torch import Tensor

from perdure.data.experience import Stream
from perdure.data.records import Records
from perdure.data.row_view import addresses_of, storages_of
from perdure.errors import DataError, GuardError

Place = tuple[int, str]
"""Number of a stream and name of a partition in it."""
LARGEST_FILE = 2**44
"""Largest size of a mapped file in bytes; it separates the numbers of two files."""
FILE_LINES = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) ([0-9a-f]+:[0-9a-f]+ [1-9][0-9]*)", re.MULTILINE
)
"""Start, end, offset, and device with inode of each mapped file in /proc/self/maps."""


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
    files = _mapped_files_of(part.inputs for parts in held.values() for part in parts)
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


class LearntRows:
    """Training records of some streams, which are found among other rows by their memory or ids.

    Names of partitions are not compared, because a record keeps its identity under another name.

    Args:
        streams: streams with training records.
    """

    def __init__(self, streams: Iterable[Stream]) -> None:
        learnt = [experience.train for stream in streams for experience in stream]
        self._files = _mapped_files()
        self._places = self._files.places(_addresses(learnt))
        self._ids = _ids(learnt)

    def among(self, rows: Tensor, ids: Tensor | None = None) -> Tensor:
        """Find the training records among some rows.

        Args:
            rows: (n, ...) inputs.
            ids: (n,) ids that were given to the rows; None if they are positions or not known.

        Returns:
            (n,) bool, on the CPU.
        """
        addresses = addresses_of(rows)
        found = torch.isin(self._files.places(addresses), self._places) & (addresses != 0)
        return found if ids is None else found | torch.isin(ids.cpu(), self._ids)


class ComparedRecords:
    """Records that share no record with the training records of some streams.

    A comparison visits every training record and every mapped file of the process, so each set of
    records is compared once with the same streams.
    """

    def __init__(self) -> None:
        self._streams: tuple[Stream, ...] = ()
        self._apart: WeakSet[Records] = WeakSet()

    def find_learnt(self, streams: tuple[Stream, ...], parts: Iterable[Records]) -> Records | None:
        """Return the first of some sets of records that contains a training record.

        Args:
            streams: streams with training records.
            parts: sets of records to compare with them.

        Returns:
            The set; None if there is none.
        """
        if streams != self._streams:
            self._streams = streams
            self._apart.clear()
        new = [part for part in dict.fromkeys(parts) if part not in self._apart]
        learnt = LearntRows(streams) if new else None
        for part in new:
            assert learnt is not None
            ids = None if part.ids_by_position else part.ids
            if bool(learnt.among(part.inputs, ids).any()):
                return part
            self._apart.add(part)
        return None


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

    @classmethod
    def of(cls, lines: Iterable[tuple[bytes, ...]]) -> Self:
        """Read start, end, offset and file of each part, in hexadecimal, starts ascending."""
        numbers: dict[bytes, int] = {}
        found = []
        for first, behind, offset, file in lines:
            start = int(first, 16)
            number = numbers.setdefault(file, len(numbers) + 1)
            found.append((start, int(behind, 16), int(offset, 16) - start - number * LARGEST_FILE))
        starts, ends, moves = torch.tensor(found, dtype=torch.int64).reshape(-1, 3).T
        return cls(starts=starts, ends=ends.contiguous(), moves=moves)

    def places(self, addresses: Tensor) -> Tensor:
        """Convert addresses (r,) in mapped files to places in the files; keep other addresses."""
        if not len(self.starts):
            return addresses
        part = torch.bucketize(addresses, self.ends, right=True).clamp(max=len(self.ends) - 1)
        inside = (self.starts[part] <= addresses) & (addresses < self.ends[part])
        return torch.where(inside, addresses + self.moves[part], addresses)


def _mapped_files_of(rows: Iterable[Tensor]) -> _MappedFiles:
    """Return the mapped files of this process; none if all rows are in one storage.

    A storage maps each place of a file once, so addresses inside it tell rows apart, and the list
    of files need not be read.
    """
    one = len(set().union(*map(storages_of, rows))) < 2
    return _MappedFiles.of([]) if one else _mapped_files()


def _mapped_files() -> _MappedFiles:
    """Return the mapped files of this process; none if the system does not list them."""
    lines: list[tuple[bytes, ...]] = []
    with suppress(OSError):
        lines = FILE_LINES.findall(Path("/proc/self/maps").read_bytes())
    return _MappedFiles.of(lines)


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
