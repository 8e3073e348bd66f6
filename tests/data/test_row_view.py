"""Row views: parts of a data set read the rows of the whole, without copies and with the same
results.
"""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch

from helpers.learners import bits, same_bits
from helpers.toy_data import records, toy  # noqa: F401
from perdure import Learner
from perdure.data import Dataset, blurry, dirichlet, online, permuted, rotated, split
from perdure.data.record_identity import refuse_records_in_two_partitions
from perdure.data.records import Records
from perdure.data.row_view import (
    RowPart,
    RowView,
    addresses_of,
    changed_rows,
    joined_rows,
    rows_at,
    view_rows,
)
from perdure.errors import DataError, GuardError
from perdure.models import mlp
from perdure.privacy.settings import Privacy
from perdure.strategies import DER, GDumb, ICaRL, Joint, Replay
from perdure.utils.chunking import HELD_BYTES, row_slices

ROWS = torch.arange(60.0).reshape(10, 2, 3)
AT = torch.tensor([7, 1, 4, 4])
LARGE = torch.zeros(1, 1).expand(1 + HELD_BYTES // 2**18, 2**16)  # one number in memory


def views():
    """Return views of the same rows: of one source, of a view, of neighbouring rows, and of two
    sources.
    """
    of_two = RowView([RowPart(source=ROWS[:5]), RowPart(source=-ROWS, change=torch.neg)])
    return {
        "index": view_rows(ROWS, AT),
        "view of a view": view_rows(view_rows(ROWS, AT.flip(0)), torch.arange(4).flip(0)),
        "neighbours": view_rows(ROWS[AT], torch.arange(4)),
        "two sources": view_rows(of_two, torch.tensor([12, 1, 4, 9])),
    }


READS = {
    "index": lambda rows: rows[torch.tensor([0, -1])],
    "mask": lambda rows: rows[torch.tensor([True, False, True, False])],
    "slice": lambda rows: rows[1:3],
    "past the end": lambda rows: rows[2:100],
    "nothing": lambda rows: rows[3:1],
    "steps": lambda rows: rows[::2],
    "one": lambda rows: rows[-2],
    "column": lambda rows: rows[:, 1],
    "arithmetic": lambda rows: rows.double() / 3 + rows,
    "cat": lambda rows: torch.cat([rows, rows]),
    "split": lambda rows: torch.cat(torch.split(rows, 3)),
    "vmap": lambda rows: torch.func.vmap(torch.sum)(rows),
    "numpy": lambda rows: torch.from_numpy(rows.numpy() + 1),
    "list": lambda rows: torch.tensor(rows.tolist()),
    "copy": copy.deepcopy,
    "dtype": lambda rows: rows.to(torch.float64),
    "device": lambda rows: torch.zeros_like(rows.to("meta"), device="cpu"),
    "zeros": torch.zeros_like,
    "shape": lambda rows: torch.tensor([len(rows), *rows.shape, rows.nbytes]),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("kind", views())
def test_a_row_view_reads_the_same_values_as_a_copy(kind, read):
    found = READS[read](views()[kind])
    assert type(found) is torch.Tensor
    assert torch.equal(found, READS[read](ROWS[AT]))


def parts_of(stream):
    return [records for each in stream for records in (each.train, each.test)]


@pytest.mark.parametrize(
    "streams",
    [
        lambda data: [split(data, scenario="class", experiences=2)],
        lambda data: [split(data, scenario="domain", experiences=2)],
        lambda data: [blurry(data, experiences=2)],
        lambda data: [online(split(data, scenario="class", experiences=2), chunk=30)],
        lambda data: [online(split(data, scenario="task", experiences=2), chunk=30, exact=False)],
        lambda data: dirichlet(
            split(data, scenario="class", experiences=2), clients=3, alpha=1.0, seed=0
        ),
    ],
    ids=["class", "domain", "blurry", "online", "online by hash", "clients"],
)
def test_parts_of_a_data_set_share_its_memory(toy, streams):  # noqa: F811
    whole = torch.cat([addresses_of(toy.train.inputs), addresses_of(toy.test.inputs)])
    everyone = []
    for stream in streams(toy):
        for part in parts_of(stream):
            assert bool(torch.isin(addresses_of(part.inputs), whole).all())
            assert torch.equal(part.inputs, at_ids(toy, part.ids))
        everyone += [each.train.ids for each in stream]
    assert torch.equal(torch.cat(everyone).sort().values, toy.train.ids)


def at_ids(data, ids):
    return torch.cat([data.train.inputs, data.test.inputs])[ids]


@pytest.mark.parametrize(
    "write",
    [
        lambda rows: rows.add_(1),
        lambda rows: rows.__setitem__(0, 1.0),
        lambda rows: rows.__setitem__(0, rows[0].add_(1)),
        lambda rows: torch.neg(ROWS[AT], out=rows),
        lambda rows: rows.copy_(ROWS[AT]),
    ],
    ids=["in place", "item", "in place on an item", "out", "copy"],
)
@pytest.mark.parametrize("at", [AT, torch.arange(4)], ids=["anywhere", "neighbours"])
def test_writing_into_a_row_view_is_refused(write, at):
    with pytest.raises(DataError, match="cannot be changed; change a copy"):
        write(view_rows(ROWS, at))
    assert torch.equal(ROWS, torch.arange(60.0).reshape(10, 2, 3))


@pytest.mark.parametrize("kind", views())
def test_a_copy_of_a_row_view_holds_only_its_own_rows(kind):
    build, arguments, *_ = views()[kind].__reduce_ex__(2)  # what is sent to another process
    for copied in (copy.deepcopy(views()[kind]), build(*arguments)):
        assert copied.untyped_storage().nbytes() == copied.nbytes
        assert torch.equal(copied, ROWS[AT])


@pytest.mark.parametrize("index", [torch.tensor([0, 10]), torch.tensor([-11]), torch.ones(9) > 0])
def test_records_refuse_a_position_out_of_range(index):
    with pytest.raises(DataError, match="allowed: "):
        Records(inputs=ROWS, labels=torch.zeros(10).long()).take(index)


def test_privacy_refuses_the_same_tensor_rows_in_two_partitions():
    whole = replace(records(20), ids=torch.arange(20), ids_by_position=True)
    stream = split(
        Dataset(name="t", train=whole, test=whole, num_classes=4, input_shape=(1, 4, 6)),
        scenario="class",
        experiences=2,
    )
    refuse_records_in_two_partitions([stream])
    same = whole.take(torch.arange(9, -1, -1))
    again = [
        replace(each, train=replace(same, partition=f"{each.index}"), classes=(0, 1, 2, 3))
        for each in stream
    ]
    with pytest.raises(GuardError, match="contain the same rows of one tensor"):
        refuse_records_in_two_partitions([replace(stream, experiences=tuple(again))])


def test_large_row_views_transform_rows_only_when_read():
    changed = changed_rows(LARGE, lambda rows: rows.double() + 1)
    assert isinstance(changed, RowView)
    assert changed.dtype == torch.float64
    assert changed[:2, :2].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    joined = joined_rows([LARGE, torch.ones(2, 2**16)])
    assert joined[-3:][:, 0].tolist() == [0.0, 1.0, 1.0]
    backwards = torch.arange(len(LARGE)).flip(0)
    of_one = joined_rows([view_rows(LARGE, backwards), view_rows(LARGE, torch.tensor([3, 1]))])
    assert isinstance(of_one, RowView)
    assert [len(part) for part in of_one.parts] == [len(LARGE) + 2]
    pieces = list(row_slices(joined))
    assert [piece.stop for piece in pieces[:-1]] == [piece.start for piece in pieces[1:]]
    assert (pieces[0].start, pieces[-1].stop) == (0, len(joined))
    assert list(row_slices(ROWS)) == [slice(0, 10)]


@pytest.mark.parametrize("of", [permuted, rotated])
def test_a_lazily_permuted_or_rotated_row_is_bit_identical(toy, of):  # noqa: F811
    settings = {"experiences": 2} if of is permuted else {"angles": (0.0, 30.0)}
    train = toy.train
    for each in of(toy, **settings):
        change = partial(change_of, of, each.index, settings)
        lazily = RowView([RowPart(source=train.inputs, change=change)])
        places = torch.tensor([3, 399, 17])
        assert torch.equal(rows_at(lazily, places), each.train.inputs[places])
        assert torch.equal(lazily[10:13], each.train.inputs[10:13])


def change_of(of, index, settings, rows):
    small = Records(inputs=rows, labels=torch.zeros(len(rows)).long())
    data = Dataset(name="r", train=small, test=small, num_classes=4, input_shape=(1, 4, 6))
    return of(data, **settings)[index].train.inputs


STRATEGIES = {
    "Joint": Joint(),
    "Replay": Replay(memory_size=20),
    "DER": DER(memory_size=20),
    "ICaRL": ICaRL(memory_size=20),
    "GDumb": GDumb(memory_size=20),
}


@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_training_on_row_views_is_bit_identical_to_copies(toy, name, private):  # noqa: F811
    stream = split(toy, scenario="class", experiences=2)
    copied = tuple(
        replace(
            each,
            train=replace(each.train, inputs=each.train.inputs.clone()),
            test=replace(each.test, inputs=each.test.inputs.clone()),
        )
        for each in stream
    )
    found = []
    for each in (stream, replace(stream, experiences=copied)):
        learner = Learner(
            model=mlp(input_shape=(1, 4, 6), num_classes=4, hidden=(8,), seed=0),
            strategy=STRATEGIES[name],
            optimizer=partial(torch.optim.SGD, lr=0.1),
            iterations=3,
            batch_size=8,
            seed=1,
            privacy=Privacy(noise_multiplier=1.0, seed=0) if private else None,
        )
        report = learner.fit(each)
        found.append((bits(learner.model.state_dict()), str(report)))
    assert same_bits(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
