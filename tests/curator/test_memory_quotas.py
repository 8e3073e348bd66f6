"""A memory with quotas is filled piece by piece, without a look at all of its rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.memory_rows import place, rows
from perdure.contract.plan import MemoryPlan
from perdure.curator.memory import Memory, balanced, concatenate, groups_of
from perdure.tasks import SingleLabel


def chosen_again(stored, new, plan, seed, stages):
    """Memory after an offer, chosen among all rows again."""
    order = torch.arange(len(new)).flip(0)
    if plan.selection == "class-balanced":
        order = torch.randperm(len(new), generator=place(seed))
    parts = [stored, new.take(order)]
    if plan.selection == "ring":
        parts.reverse()
    groups = groups_of(parts, stages, SingleLabel())
    return concatenate(parts).take(balanced(groups, plan.capacity, plan.per_class))


@pytest.mark.property
@settings(deadline=None, max_examples=20)
@given(
    st.lists(
        st.tuples(st.booleans(), st.lists(st.integers(0, 3), max_size=6)), min_size=1, max_size=12
    ),
    st.integers(1, 12),
    st.none() | st.integers(1, 3),
    st.sampled_from(["class-balanced", "ring"]),
)
def test_offering_rows_in_pieces_keeps_the_rows_of_one_offer(
    pieces, capacity, per_class, selection
):
    """Same rows in the same order, so that every later draw from memory is the same as well."""
    plan = MemoryPlan(capacity=capacity, selection=selection, per_class=per_class)
    memory = Memory()
    expected = rows([])
    stages = torch.zeros(0, dtype=torch.int64)
    for piece, (begins, labels) in enumerate(pieces):
        last = int(stages[-1]) if len(stages) else -1
        stages = torch.cat([stages, torch.tensor([last + 1 if begins or last < 0 else last])])
        new = rows(labels, task=piece, first_id=100 * piece)
        expected = chosen_again(expected, new, plan, piece, stages)
        memory.offer(new, plan, place(piece), stages=stages)
        for name, value in memory.rows.tensors().items():
            assert torch.equal(value, expected.tensors()[name])


def test_filling_class_quotas_piece_by_piece_copies_few_rows():
    plan = MemoryPlan(capacity=300)
    memory = Memory()
    places = set()
    for piece in range(80):
        memory.offer(rows([0, 1, 2] * 2, first_id=6 * piece), plan, place(piece))
        places.add(memory.rows.inputs.data_ptr())
    assert len(memory) == 300 and len(places) <= 8


def test_a_full_memory_takes_pieces_without_reading_stored_rows():
    """Pieces of known groups read no stored row: a memory whose rows cannot be read takes them."""
    plan = MemoryPlan(capacity=4)
    memory = Memory()
    memory.offer(rows([0, 1] * 4), plan, place(0))
    memory.offer(rows([0, 1], first_id=50), plan, place(1))
    before = memory.rows
    kept = before.ids.tolist()
    object.__setattr__(before, "labels", None)
    memory.offer(rows([1, 0] * 30, first_id=90), plan, place(2))
    assert memory.rows is before and before.ids.tolist() == kept and memory.offered == 70


def test_a_full_memory_accepts_rows_if_the_plan_gets_larger():
    memory = Memory()
    for piece, capacity in enumerate((4, 4, 6)):
        memory.offer(
            rows([0, 1] * 4, first_id=10 * piece), MemoryPlan(capacity=capacity), place(piece)
        )
    assert torch.bincount(memory.rows.labels).tolist() == [3, 3]
