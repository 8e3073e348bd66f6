"""Reopened experiences: rows are grouped and hashed once, and changed rows are detected."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.learners import SIMULATED, learner_of  # noqa: F401
from perdure.curator.record_groups import group_records
from perdure.errors import PrivacyError
from perdure.strategies import Replay


class Sorts(TorchDispatchMode):
    """Count sorts and searches for duplicates."""

    COUNTED = ("aten::sort", "aten::argsort", "aten::_unique2", "aten::unique_dim")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name().partition(".")[0] in self.COUNTED
        return func(*args, **(kwargs or {}))


def opened(learner, index=0):
    """Return the number of sorts of one opening, and the fingerprint of its rows."""
    with Sorts() as sorts:
        learner.begin(index)
    return sorts.count, learner.session.held.fingerprint


@pytest.fixture
def prepared(learner_of, toy_stream):  # noqa: F811
    learner = learner_of(privacy=SIMULATED, strategy=Replay(memory_size=8))
    learner.prepare(toy_stream())
    return learner


def test_an_experience_opened_again_is_not_sorted_again(prepared):
    first, fingerprint = opened(prepared)
    assert first > 0
    assert opened(prepared) == (0, fingerprint)


@pytest.mark.parametrize("name", ["ids", "labels", "inputs"])
def test_the_fingerprint_of_records_detects_a_changed_record(prepared, name):
    _, before = opened(prepared)
    value = getattr(prepared.stream[0].train, name)
    if name == "inputs":
        value = value.parts[0].source  # the rows of a view are written to where they are read from
    was = value[0].clone()
    value[0] += 10_000 if name == "ids" else 1
    try:
        count, after = opened(prepared)
    finally:
        value[0] = was  # other tests read the same source
    assert after != before
    assert (count > 0) == (name == "ids")


def test_a_write_into_ids_through_numpy_is_detected(prepared):
    opened(prepared)
    ids = prepared.stream[0].train.ids
    ids.numpy()[0] = 77_777
    assert opened(prepared)[0] > 0
    assert 77_777 in prepared.session.held.samplers["gradient"].records.ids


def test_a_record_id_changed_to_a_duplicate_is_refused(prepared):
    opened(prepared)
    ids = prepared.stream[0].train.ids
    ids[0] = ids[1]
    for _ in range(2):
        with pytest.raises(PrivacyError, match="share an id"):
            prepared.begin(0)


@pytest.mark.property
@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 2)), max_size=20))
def test_row_groups_equal_the_unique_pairs_of_id_and_owner(pairs):
    ids, owner = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
    found = group_records(ids, owner)
    own, record, counts = torch.unique(
        torch.stack([ids, owner], dim=1), dim=0, return_inverse=True, return_counts=True
    )
    assert torch.equal(found.whose, own)
    assert torch.equal(found.counts, counts)
    assert torch.equal(found.order, torch.argsort(record, stable=True))
    assert torch.equal(found.starts, counts.cumsum(0) - counts)
