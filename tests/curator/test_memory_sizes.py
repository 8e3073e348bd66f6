"""Sizes of a memory, options that are refused, and copies of its rows."""

import pytest
import torch

from helpers.memory_rows import place, rows
from perdure.contract.plan import MemoryPlan, records_in
from perdure.curator.memory import (
    Memory,
    concatenate,
    distinct_rows,
    reservoir,
)
from perdure.errors import ConfigError


def test_memory_size_accepts_a_number_of_records_or_bytes(toy_stream):
    """A toy record has 5 numbers of 4 bytes, plus label and id of 8 bytes each: 36 bytes."""
    first = toy_stream()[0]
    assert records_in(7, first) == 7
    sizes = {
        "0.036 kB": 1,
        "0.359 kB": 9,
        "0.36 kB": 10,
        "1 kB": 27,
        "3.6 MB": 100_000,
        "1.8 GB": 50_000_000,
    }
    assert {size: records_in(size, first) for size in sizes} == sizes
    assert records_in("0.001 kB", first) == 1  # at least one


@pytest.mark.parametrize(
    "size",
    ["2MB", "MB", "2 mb", "2 KB", "two MB", "-2 MB", "1e3 kB", "1.2.3 kB", "2  MB", ". kB", ""],
)
def test_an_invalid_memory_size_text_is_refused(toy_stream, size):
    with pytest.raises(
        ConfigError,
        match=r"memory_size = .* is not allowed; allowed: a number of records, or bytes",
    ):
        records_in(size, toy_stream()[0])


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"update": "daily"}, "memory update = 'daily'"),
        ({"use": "lookup"}, "memory use = 'lookup'"),
        (
            {"use": "pooled", "update": "step"},
            "memory use = 'pooled' is not allowed; allowed: with update='experience'",
        ),
        (
            {"selection": "herding", "update": "step"},
            "memory selection = 'herding' .*because this selection compares all records",
        ),
    ],
)
def test_the_memory_plan_refuses_options_that_exclude_each_other(options, field):
    with pytest.raises(ConfigError, match=field):
        MemoryPlan(capacity=5, **options)


def test_stored_rows_enter_the_loss_only_if_the_plan_says_so():
    uses = {
        use: MemoryPlan(capacity=5, use=use).rehearsed
        for use in ("rehearsal", "pooled", "reference", "references")
    }
    assert uses == {"rehearsal": True, "pooled": True, "reference": False, "references": False}


def test_loss_aware_memory_keeps_the_highest_losses_per_class():
    memory = Memory()
    plan = MemoryPlan(capacity=4, selection="loss-aware")
    losses = torch.tensor([0.1, 3.0, 2.0, 0.5, 0.2, 9.0])
    memory.offer(rows([0, 0, 0, 1, 1, 1]), plan, place(), losses)
    assert sorted(memory.rows.ids.tolist()) == [1, 2, 3, 5]
    memory.offer(
        rows([2, 2], task=1, first_id=50),
        MemoryPlan(capacity=3, selection="loss-aware"),
        place(),
        losses[:2],
    )
    assert sorted(memory.rows.ids.tolist()) == [1, 5, 51]


@pytest.mark.parametrize("selection", ["herding", "loss-aware"])
def test_herding_and_loss_aware_refuse_an_update_per_step(selection):
    with pytest.raises(ConfigError, match=f"memory selection = '{selection}'.*update='experience'"):
        MemoryPlan(capacity=4, selection=selection, update="step")


def test_a_growing_reservoir_reallocates_its_rows_rarely():
    """The reference is a list of rows that is copied as a whole at every offer."""
    plan = MemoryPlan(capacity=300, selection="reservoir")
    memory = Memory()
    expected = rows([])
    places = set()
    for offer in range(60):
        new = rows([offer % 3] * 8, first_id=8 * offer)
        kept = reservoir(len(expected), 8 * offer, 8, 300, place(offer))
        expected = concatenate([expected, new]).take(kept)
        memory.offer(new, plan, place(offer))
        places.add(memory.rows.inputs.data_ptr())
        assert torch.equal(memory.rows.ids, expected.ids)
        assert torch.equal(memory.rows.inputs, expected.inputs)
    assert len(memory) == 300 and len(places) <= 7


def test_memory_never_writes_into_rows_given_from_outside():
    plan = MemoryPlan(capacity=30, selection="reservoir")
    memory = Memory()
    memory.offer(rows([0, 1]), plan, place())
    given = rows([2, 2, 2], first_id=50)
    memory.rows = given
    memory.offer(rows([0, 1], first_id=90), plan, place())
    assert memory.rows.ids.tolist() == [50, 51, 52, 90, 91] and len(given) == 3


@pytest.mark.reference
@pytest.mark.parametrize(("stored", "offered", "capacity"), [(0, 0, 5), (3, 3, 9), (9, 40, 9)])
def test_a_reservoir_equals_algorithm_r_on_a_list_of_slots(stored, offered, capacity):
    for seed in range(20):
        slots = list(range(stored))
        draws = torch.rand(12, generator=place(seed), dtype=torch.float64).tolist()
        for i, draw in enumerate(draws):
            slot = int(draw * (offered + i + 1))
            if len(slots) < capacity:
                slots.append(stored + i)
            elif slot < capacity:
                slots[slot] = stored + i
        assert reservoir(stored, offered, 12, capacity, place(seed)).tolist() == slots


@pytest.mark.parametrize("largest", [3, 2**40, 2**62])
def test_distinct_rows_separates_groups_with_large_numbers(largest):
    groups = torch.tensor([[0, -largest], [1, largest], [0, largest], [0, -largest], [1, 0]])
    found, which = distinct_rows(groups)
    expected, places = torch.unique(groups, dim=0, return_inverse=True)
    assert torch.equal(found, expected) and torch.equal(which, places)
