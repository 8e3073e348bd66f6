"""Rows of the steps without privacy: shuffled once an epoch if they are small, else per step."""

import pytest
import torch

from perdure.contract.plan import Plan
from perdure.curator import sampling
from perdure.curator.sampling import Opened, Pool
from perdure.data.datasets.digits import digits
from perdure.data.records import Batch
from perdure.data.scenarios import split

SIZE = 50


def pool_of(experience):
    rows = Batch.current(experience.train, 0)
    return Pool(
        current=rows,
        new=rows,
        stored=None,
        plan=None,
        batch_size=SIZE,
        place=(3, 0, 0),
        opened=Opened(experiences=[experience], plan=Plan(), memory=None),
    )


@pytest.fixture(scope="module")
def experience():
    return split(digits(), scenario="class", experiences=5)[0]


@pytest.mark.parametrize("most", [0, 4_000, sampling.SHUFFLED_AT_ONCE])
def test_steps_take_the_rows_of_the_epochs_order(experience, monkeypatch, most):
    monkeypatch.setattr(sampling, "SHUFFLED_AT_ONCE", most)
    pool = pool_of(experience)
    n = len(pool.new)
    steps = 2 * -(-n // SIZE)
    seen = []
    for step in range(steps):
        batch, share = pool.side_by_side(step)
        wanted = pool.new.at(pool.shuffled("new", n, SIZE, step)).tensors()
        assert all(torch.equal(value, wanted[name]) for name, value in batch.tensors().items())
        assert (share, batch.unpadded) == (0.0, True)
        seen += batch.ids.tolist()
        if step == 1:
            pool.rest()
    assert sorted(seen) == sorted(2 * pool.new.ids.tolist())
    assert seen[:n] != seen[n:]


def test_writing_into_a_batch_leaves_the_records_and_other_steps(experience):
    pool, other = pool_of(experience), pool_of(experience)
    first = pool.side_by_side(0)[0]
    first.inputs.fill_(-1.0)
    first.tasks.fill_(9)
    first.valid.fill_(False)
    assert (pool.new.inputs >= 0).all() and pool.new.valid.all()
    again = pool.side_by_side(1)[0].tensors()
    wanted = other.side_by_side(1)[0].tensors()
    assert all(torch.equal(value, wanted[name]) for name, value in again.items())


def test_rows_of_several_experiences_keep_their_tasks(experience):
    pool = pool_of(experience)
    n = len(pool.new)
    tasks = torch.arange(n) % 3
    pool.new = Batch.from_tensors(pool.new.tensors() | {"tasks": tasks})
    for step in range(3):
        batch, _ = pool.side_by_side(step)
        assert torch.equal(batch.tasks, tasks[pool.shuffled("new", n, SIZE, step)])


def test_padded_rows_are_not_taken_for_full_ones(experience):
    pool = pool_of(experience)
    pool.new.valid[3] = False
    steps = -(-len(pool.new) // SIZE)
    found = [pool.side_by_side(step)[0].unpadded for step in range(steps)]
    assert found.count(False) == 1
