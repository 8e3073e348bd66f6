"""Streams whose experiences are cut into small pieces, to be seen once each."""

import math
from dataclasses import replace

from perdure.data.experience import Stream, placed_again, require_stream
from perdure.data.records import Records
from perdure.data.scenarios.places import hashable, public_coin
from perdure.errors import ConfigError


def online(stream: Stream, *, chunk: int, seed: int = 0, exact: bool = True) -> Stream:
    """Cut every experience into small ones, to be seen once each.

    Classes and test records are the parent's.

    Guarantee: partitions are the parent's, so what the pieces spend composes. With `exact`, every
    piece has `chunk` records (the last has the rest): the field's protocol, but one more record
    moves others into the next piece, so the stream says `assigned_by_record = False`. Without, a
    hash of the record's id and the seed picks the piece: sizes vary around `chunk`, and adding or
    removing a record changes one piece only. That holds where the parent's size was declared, as
    the number of pieces follows from it, and records came with ids; else the stream says
    `assigned_by_record = False` too.

    Args:
        stream: the parent. `stage` of a piece is the index of its parent.
        chunk: records in a piece; without `exact` the declared size, which is met on average.
        seed: of the order, public.
        exact: whether the size is exact.

    Raises:
        ConfigError: for a chunk below 1.

    Source: Mai et al. 2022, "Online continual learning in image classification: an empirical
    survey".
    """
    require_stream(stream)
    if chunk < 1:
        raise ConfigError.of("chunk", chunk, "whole numbers from 1")
    cut = _exact_pieces if exact else _hashed_pieces
    pieces = [(parent, piece) for parent in stream for piece in cut(parent.train, chunk, seed)]
    experiences = tuple(
        replace(parent, index=index, train=piece) for index, (parent, piece) in enumerate(pieces)
    )
    counted = any(parent.train.size_counted for parent in stream)
    kept = placed_again(stream, not exact and not counted and hashable(stream))
    return replace(
        stream, name=f"online-{stream.name}", experiences=experiences, assigned_by_record=kept
    )


def _exact_pieces(records: Records, chunk: int, seed: int) -> list[Records]:
    order = public_coin(records.ids, seed=seed).argsort(stable=True).to(records.inputs.device)
    return [records.take(order[start : start + chunk]) for start in range(0, len(records), chunk)]


def _hashed_pieces(records: Records, chunk: int, seed: int) -> list[Records]:
    # from the declared size: a count of the records present would depend on who is among them
    count = math.ceil(records.declared_size / chunk)
    piece = (public_coin(records.ids, seed=seed) * count).long()
    # one sort of all, or every piece would look at every record
    order = piece.argsort(stable=True).to(records.inputs.device)
    rows = order.split(piece.bincount(minlength=count).tolist())
    return [records.take(taken).declared(chunk) for taken in rows]
