"""Streams of clients that do not hold every experience of a federation.

A client's stream has the experiences of the federation in their order. An experience with a
declared size of 0 is a gap: the client is not asked for it. A shorter stream ends in gaps. The
client's own learner trains on the other experiences, numbered from 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

from perdure.data.experience import Stream
from perdure.errors import DataError
from perdure.federated.settings import Federation
from perdure.planning.training_plan import Participation


def held_experiences(stream: Stream, *, present: bool = False) -> list[int]:
    """Return the indices of the experiences that a client holds.

    Args:
        stream: stream of the client.
        present: True to leave out experiences of which records are declared, but none is there.
            Only for clients without privacy, because it shows a number of records.
    """
    return [
        each.index
        for each in stream
        if each.train.declared_size > 0 and (len(each.train) > 0 or not present)
    ]


def without_gaps(stream: Stream, client: int, *, present: bool = False) -> Stream:
    """Return the stream of the held experiences, numbered from 0; the same one without gaps.

    Args:
        stream: stream of the client.
        client: number of the client, for the message.
        present: as in `held_experiences`.

    Raises:
        DataError: if the client has no records in any experience.
    """
    held = held_experiences(stream, present=present)
    if not held:
        raise DataError(
            f"client {client} has no training records in any experience; allowed: records in at "
            "least one; leave its stream out, and give Federation(clients=...) one client less"
        )
    if len(held) == len(stream):
        return stream
    own = [replace(stream[old], index=new, stage=-1) for new, old in enumerate(held)]
    return replace(stream, experiences=tuple(own))


def participation(
    federation: Federation, streams: Sequence[Stream]
) -> Callable[[int], Participation] | None:
    """Return a function from a client's number to the rounds in which it is asked to train.

    The rounds follow from the public seed and the declared sizes. None if all clients train in
    every round.
    """
    if federation.fraction == 1:
        return None
    held = [set(held_experiences(stream)) for stream in streams]

    @cache
    def cohort(experience: int, number: int) -> frozenset[int]:
        def holds(client: int) -> bool:
            return experience in held[client]

        return frozenset(federation.cohort(experience, number, holds))

    def of(client: int) -> Participation:
        taken = tuple(
            frozenset(n for n in range(federation.rounds) if client in cohort(experience, n))
            for experience in sorted(held[client])
        )
        return Participation(rounds=federation.rounds, taken=taken)

    return of


def union(streams: Sequence[Stream]) -> Stream:
    """Return a stream with every experience of the federation, each from a client that holds it."""
    longest = max(streams, key=len)
    held = [set(held_experiences(each)) for each in streams]
    experiences = []
    for experience in longest:
        index = experience.index
        holders = (each[index] for each, own in zip(streams, held, strict=True) if index in own)
        experiences.append(next(holders, experience))
    return replace(longest, experiences=tuple(experiences))
