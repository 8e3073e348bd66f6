"""Streams of clients that do not hold every experience of a federation.

A client's stream has the experiences of the federation in their order. An experience with a
declared size of 0 is a gap: the client is not asked for it. A shorter stream ends in gaps. The
client's own learner trains on the other experiences, numbered from 0.
"""

from collections.abc import Sequence
from dataclasses import replace

from perdure.data.experience import Stream


def held_experiences(stream: Stream) -> list[int]:
    """Return the indices of the experiences that a client holds."""
    return [each.index for each in stream if each.train.declared_size > 0]


def without_gaps(stream: Stream) -> Stream:
    """Return the stream of the held experiences, numbered from 0; the same one without gaps."""
    held = held_experiences(stream)
    if len(held) == len(stream):
        return stream
    own = [replace(stream[old], index=new, stage=-1) for new, old in enumerate(held)]
    return replace(stream, experiences=tuple(own))


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
