"""Scenario that cuts experiences into small pieces, for training in one pass."""

import math
from dataclasses import replace

import torch

from perdure.data.experience import Stream, placed_again, require_stream
from perdure.data.records import Records
from perdure.data.scenarios.places import hashable, public_coin
from perdure.errors import ConfigError
from perdure.utils.checked_arguments import checked_arguments


@checked_arguments
def online(stream: Stream, *, chunk: int, seed: int = 0, exact: bool = True) -> Stream:
    """Cut every experience into small pieces, for training with one pass over each piece.

    A piece has the classes and test records of its parent experience.

    `exact=True`: every piece has exactly `chunk` records (the last one may have fewer), as usual in
    the literature. Adding one record then moves other records to another piece, so
    `assigned_by_record` is False. `exact=False`: a hash of the record's id and the seed chooses the
    piece, so adding or removing a record changes one piece only. Pieces then have at most `chunk`
    records on average. `assigned_by_record` is then True if the parent's is, the parent's sizes
    were declared, and the records have ids of their own; otherwise False.

    Guarantee: pieces keep the partition of their parent, so their privacy costs add up.

    Args:
        stream: stream to cut. `stage` of a piece is the index of its parent experience.
        chunk: number of records in a piece; with `exact=False` the declared size, which is an upper
            bound on the average.
        seed: public seed of the order.
        exact: True for exact sizes, False for sizes on average.

    Raises:
        ConfigError: if `chunk` is below 1.

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
    # from the declared size, because the number of present records depends on private data
    count = math.ceil(records.declared_size / chunk)
    piece = (public_coin(records.ids, seed=seed) * count).long()
    # one sort for all pieces; otherwise every piece would read every record
    order = piece.argsort(stable=True).to(records.inputs.device)
    rows = torch.split(order, piece.bincount(minlength=count).tolist())
    return [records.take(taken).declared(chunk) for taken in rows]
