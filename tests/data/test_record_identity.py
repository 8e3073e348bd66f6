"""Privacy refuses one record in two partitions, because its costs would not be added up."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.learners import SIMULATED, learner_of  # noqa: F401
from helpers.toy_data import records
from perdure.data import Records, Stream, blurry, dirichlet, iid, online, permuted, rotated, split
from perdure.data.experience import Experience
from perdure.data.record_identity import ComparedRecords, refuse_records_in_two_partitions
from perdure.errors import GuardError


def by_hand(*parts):
    """Return a stream of these training records with assigned_by_record=True."""
    test = records(8, first_id=1000)
    experiences = tuple(
        Experience(index=index, train=part, test=test, classes=(0, 1, 2, 3))
        for index, part in enumerate(parts)
    )
    return Stream(
        name="by hand",
        scenario="domain",
        experiences=experiences,
        num_classes=4,
        input_shape=(1, 4, 6),
        assigned_by_record=True,
    )


def months(second_ids, *, first_ids=None):
    """Return a stream of two partitions with separate tensors."""
    one = records(20, partition="january")
    two = records(20, first_id=50, partition="february")
    first_ids = torch.arange(20) if first_ids is None else first_ids
    return by_hand(replace(one, ids=first_ids), replace(two, ids=second_ids))


@pytest.mark.parametrize("common", [20, 1])
def test_privacy_refuses_one_id_in_two_partitions(learner_of, common):  # noqa: F811
    stream = months(torch.arange(20) + 20 - common)
    told = "partitions 'january' and 'february' of stream by hand contain records with the same id"
    learner = learner_of(stream=stream, privacy=SIMULATED)
    with pytest.raises(GuardError, match=told) as caught:
        learner.fit(stream)
    assert "if they are different people, give them different ids" in str(caught.value)
    with pytest.raises(GuardError, match=told):
        learner.prepare(stream)


def test_the_refusal_of_shared_ids_reveals_no_record():
    texts = set()
    for common in (1, 7, 20):
        with pytest.raises(GuardError) as caught:
            refuse_records_in_two_partitions([months(torch.arange(20) + 20 - common)])
        texts.add(str(caught.value))
    assert len(texts) == 1


def test_privacy_accepts_different_ids_or_one_partition_name(learner_of):  # noqa: F811
    refuse_records_in_two_partitions([months(torch.arange(20) + 20)])
    one = records(20, partition="people")
    again = replace(records(20, first_id=50, partition="people"), ids=one.ids)
    stream = by_hand(one, again)
    learner = learner_of(stream=stream, privacy=SIMULATED)
    learner.fit(stream)
    ledger = learner.private_sum.ledger
    assert sum(charge.steps for charge in ledger.charges("people")) == 8


def test_training_without_privacy_accepts_shared_ids(learner_of):  # noqa: F811
    stream = months(torch.arange(20))
    assert len(learner_of(stream=stream).fit(stream)) == len(stream)


def test_privacy_refuses_two_partitions_with_the_same_rows(learner_of):  # noqa: F811
    none = torch.empty(0, dtype=torch.int64)
    one, two = (replace(e.train, ids=none) for e in months(torch.arange(20)))
    assert torch.equal(one.ids, two.ids) and one.ids_by_position
    refuse_records_in_two_partitions([by_hand(one, two)])
    table = torch.rand(40, 1, 4, 6)
    halves = [replace(one, inputs=table[:20]), replace(two, inputs=table[20:])]
    refuse_records_in_two_partitions([by_hand(*halves)])
    alternating = [replace(one, inputs=table[::2]), replace(two, inputs=table[1::2])]
    refuse_records_in_two_partitions([by_hand(*alternating)])
    copied = by_hand(halves[0], replace(two, inputs=table[:20].clone()))
    refuse_records_in_two_partitions([copied])
    for other in (table[:20], table[19:39]):
        stream = by_hand(halves[0], replace(two, inputs=other))
        with pytest.raises(GuardError, match="contain the same rows of one tensor"):
            learner_of(stream=stream, privacy=SIMULATED).prepare(stream)


@pytest.mark.parametrize(
    "build",
    [
        lambda data: split(data, scenario="class", experiences=2),
        lambda data: split(data, scenario="domain", experiences=2),
        lambda data: permuted(data, experiences=3),
        lambda data: rotated(data, angles=(0.0, 90.0)),
        lambda data: blurry(data, experiences=2, blurry_share=0.5),
        lambda data: online(split(data, scenario="task", experiences=2), chunk=30, exact=False),
    ],
    ids=["class", "domain", "permuted", "rotated", "blurry", "online"],
)
@pytest.mark.parametrize("own_ids", [True, False], ids=["ids", "positions"])
def test_every_built_in_stream_passes_the_shared_id_check(toy, build, own_ids):
    ids = toy.train.ids if own_ids else torch.empty(0, dtype=torch.int64)
    stream = build(replace(toy, train=replace(toy.train, ids=ids)))
    assert refuse_records_in_two_partitions([stream]) is None
    for clients in (iid(stream, clients=3, exact=False), dirichlet(stream, clients=3, alpha=0.5)):
        assert refuse_records_in_two_partitions(clients) is None


def test_a_split_with_one_id_in_two_classes_is_refused(toy):
    """Two rows belong to one person, and the split by class puts them into two partitions."""
    ids = toy.train.ids.clone()
    ids[1] = ids[2]  # of classes 1 and 2
    stream = split(replace(toy, train=replace(toy.train, ids=ids)), scenario="class", experiences=2)
    with pytest.raises(GuardError, match="'experience-0' and 'experience-1' of stream split-toy"):
        refuse_records_in_two_partitions([stream])


@pytest.mark.parametrize("first", [0, 12, 20])
def test_privacy_recognises_rows_of_a_file_that_is_mapped_twice(tmp_path, first):
    """20 rows of each mapping, without ids of their own; the second mapping begins later."""
    path = tmp_path / "rows.npy"
    np.save(path, np.zeros((40, 1, 4, 6), dtype=np.float32))
    parts = []
    for partition, start in (("january", 0), ("february", first)):
        mapped = np.load(path, mmap_mode="c")[start : start + 20]
        parts.append(
            Records(
                inputs=torch.from_numpy(mapped),
                labels=torch.zeros(20, dtype=torch.int64),
                partition=partition,
            )
        )
    if first == 20:
        refuse_records_in_two_partitions([by_hand(*parts)])
        return
    with pytest.raises(GuardError, match="contain the same rows of one tensor"):
        refuse_records_in_two_partitions([by_hand(*parts)])


def test_records_are_compared_again_with_changed_streams_only():
    stream = months(torch.arange(20) + 20)
    other = by_hand(records(20, first_id=3_000, partition="march"))
    compared = ComparedRecords()
    test, trained = stream[0].test, stream[1].train
    assert compared.find_learnt((stream,), [test, trained]) is trained
    assert compared.find_learnt((other,), [test, trained]) is None
    assert compared.find_learnt((other, stream), [trained, test]) is trained
    lent = replace(test, ids=trained.ids[: len(test)].clone())
    assert compared.find_learnt((other,), [lent]) is None
    assert compared.find_learnt((stream,), [lent]) is lent
