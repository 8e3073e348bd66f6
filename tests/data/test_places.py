"""The place of a record does not depend on other records: after a removal all others stay in
place.
"""

from dataclasses import replace
from functools import cache, partial

import pytest
import torch

from perdure.data import (
    Dataset,
    Records,
    blurry,
    by_domain,
    by_time,
    dirichlet,
    iid,
    joint,
    online,
    permuted,
    repetition,
    rotated,
    split,
)

CLASSES = 4
DECLARED = 24


@cache
def data_of(seed, *, own_ids=True, declared=DECLARED):
    """Return 8 to 24 random records with random labels and ids that do not follow from
    positions.
    """
    place = torch.Generator().manual_seed(seed)
    n = int(torch.randint(8, 25, (), generator=place))
    ids = (
        torch.randint(-(2**62), 2**62, (n,), generator=place) if own_ids else torch.empty(0).long()
    )
    labels = torch.randint(0, CLASSES, (n,), generator=place)
    inputs = torch.rand(n, 1, 2, 2, generator=place)
    train = Records(
        inputs=inputs,
        labels=labels,
        ids=ids,
        declared_size=declared,
        attributes=attributes_of(inputs),
    )
    test = Records(inputs=inputs[:4], labels=labels[:4], attributes=attributes_of(inputs[:4]))
    return Dataset(
        name="random", train=train, test=test, num_classes=CLASSES, input_shape=(1, 2, 2)
    )


def attributes_of(inputs):
    """Return a time in [0, 1) and one of six domains for each record."""
    time = inputs.flatten(1).amax(1)
    return {"time": time, "domain": (time * 600).long() % 6}


def without(data, row):
    """Return the data set without one row, under the same declared size."""
    kept = torch.arange(len(data.train)) != row
    train = data.train
    rows = {"inputs": train.inputs[kept], "labels": train.labels[kept]}
    rows["attributes"] = attributes_of(rows["inputs"])
    if not train.ids_by_position:
        rows["ids"] = train.ids[kept]
    declared = 0 if train.size_counted else train.declared_size
    return replace(data, train=Records(**rows, declared_size=declared))


def keys(inputs):
    """Return the largest number of each record as its key; views of one image share it."""
    return inputs.flatten(1).amax(1).tolist()


def places(streams):
    """Return the place of every record, (stream, experience, label), and the declared facts."""
    found = {}
    facts = []
    for number, stream in enumerate(streams):
        for e in stream:
            facts.append((number, e.index, e.train.partition, e.train.declared_size, e.classes))
            for key, label in zip(keys(e.train.inputs), e.train.labels.tolist(), strict=True):
                found.setdefault(key, []).append((number, e.index, label))
    return found, facts


def moved(build, data, row):
    """True if the place of another record, or a declared fact, changes without the record in
    `row`.
    """
    whole, facts = places(build(data))
    fewer, facts_after = places(build(without(data, row)))
    if not whole or not fewer:
        return False  # an exact split that the smaller data set has no records for
    (gone,) = keys(data.train.inputs[row : row + 1])
    whole.pop(gone)
    return whole != fewer or facts != facts_after


def moved_times(build, trials, **options):
    data = [data_of(seed, **options) for seed in range(trials)]
    return sum(moved(build, one, seed % len(one.train)) for seed, one in enumerate(data))


def by_class(data):
    return split(data, scenario="class", experiences=2)


def by_task(data):
    return permuted(data, experiences=2, scenario="task")


def clients(splitter, source, data):
    return splitter(source(data), clients=3, min_size=4, exact=False)


BY_RECORD = {
    "split": lambda data: [by_class(data)],
    "split, domain": lambda data: [split(data, scenario="domain", experiences=2, seed=1)],
    "split, unequal": lambda data: [split(data, scenario="class", increments=(1, 3))],
    "repetition": lambda data: [repetition(data, experiences=5, repeat_probability=0.6)],
    "by time": lambda data: [by_time(data, boundaries=(0.7, 0.8, 0.9))],
    "by domain": lambda data: [by_domain(data, order=(5, 0, 3, 1, 2, 4))],
    "joint": lambda data: [joint(data)],
    "permuted": lambda data: [by_task(data)],
    "rotated": lambda data: [rotated(data, angles=(0.0, 0.0))],
    "blurry": lambda data: [blurry(data, experiences=2, blurry_share=0.4)],
    "online": lambda data: [online(by_class(data), chunk=7, exact=False)],
    "online of permuted": lambda data: [online(by_task(data), chunk=7, exact=False)],
    "dirichlet": partial(clients, partial(dirichlet, alpha=0.1), by_class),
    "dirichlet of permuted": partial(clients, partial(dirichlet, alpha=0.3), by_task),
    "dirichlet of blurry": partial(
        clients, partial(dirichlet, alpha=0.3), partial(blurry, experiences=2)
    ),
    "iid": partial(clients, iid, by_class),
    "iid of online": lambda data: iid(
        online(by_class(data), chunk=12, exact=False), clients=3, min_size=4, exact=False
    ),
}


@pytest.mark.parametrize(
    "trials",
    [
        30,
        pytest.param(400, marks=pytest.mark.deep(reason="full replay: 400 random data sets")),
    ],
)
@pytest.mark.parametrize("splitter", BY_RECORD)
def test_a_removal_moves_no_other_record_if_assigned_by_record(splitter, trials):
    build = BY_RECORD[splitter]
    assert all(stream.assigned_by_record is True for stream in build(data_of(0)))
    assert moved_times(build, trials) == 0


MOVING = {
    "exact dirichlet": lambda d: dirichlet(by_class(d), clients=3, alpha=0.3, min_size=2),
    "exact iid": lambda d: iid(by_class(d), clients=3, min_size=2),
    "exact online": lambda d: [online(by_class(d), chunk=7)],
    "by time, equal": lambda d: [by_time(d, experiences=3)],
}


def allowed(build, data):
    """Return the streams if the data set is large enough for the exact minimum size."""
    from perdure.errors import ConfigError

    try:
        return build(data)
    except ConfigError:
        return []


@pytest.mark.parametrize("splitter", MOVING)
def test_assigned_by_record_is_false_if_other_records_move(splitter):
    build = partial(allowed, MOVING[splitter])
    streams = MOVING[splitter](data_of(3))
    assert all(stream.assigned_by_record is False for stream in streams)
    assert moved_times(build, 60) > 8


HASHED = ("blurry", "online", "repetition", "dirichlet", "iid")


@pytest.mark.parametrize("splitter", HASHED)
def test_streams_with_ids_by_position_are_not_assigned_by_record(splitter):
    build = BY_RECORD[splitter]
    assert all(not s.assigned_by_record for s in build(data_of(0, own_ids=False)))
    assert moved_times(build, 30, own_ids=False) > 15


def test_pieces_of_a_counted_size_are_not_assigned_by_record():
    build = BY_RECORD["online"]
    assert all(not stream.assigned_by_record for stream in build(data_of(0, declared=0)))
    assert moved_times(build, 60, declared=0) > 5


@pytest.mark.parametrize("by_record", [None, False])
def test_a_client_split_keeps_assigned_by_record_of_its_stream(by_record):
    stream = replace(by_class(data_of(0)), assigned_by_record=by_record)
    for splitter in (iid, partial(dirichlet, alpha=1.0)):
        parts = splitter(stream, clients=2, exact=False)
        assert all(part.assigned_by_record is by_record for part in parts)
    assert online(stream, chunk=5, exact=False).assigned_by_record is by_record
