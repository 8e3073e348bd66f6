"""Steps that are executed again: an equal sum is replayed, another one is charged again."""

from functools import partial

import pytest
import torch

from perdure.privacy.ledger.ledger import Ledger
from perdure.privacy.noise.draw_log import DrawLog
from perdure.privacy.noise.key import NoiseKey
from perdure.privacy.private_sum import ChangedSumError, PrivateSum, ReleaseKey, Schedule
from perdure.privacy.settings import Privacy

PARAMS = {"w": torch.zeros(50)}
STEPS = range(4)
RECORDS = torch.stack([torch.arange(1000), torch.zeros(1000, dtype=torch.int64)], dim=1)


class Process:
    """A private sum on the files of one folder, as a process of its own would open it."""

    def __init__(self, folder, *, boot="boot 1", **changes):
        self.key = NoiseKey.from_os(folder / "private" / "key")
        ledger = Ledger.open(folder / "ledger.jsonl", key=self.key)
        ledger.declare("p", 100)
        privacy = Privacy(**{"noise_multiplier": 1.0} | changes)
        self.sum = PrivateSum(
            privacy=privacy,
            schedule=Schedule(noise=(privacy.noise_multiplier,)),
            ledger=ledger,
            key=self.key,
            draws=DrawLog(folder / "private" / "draws.jsonl", self.key, boot),
        )

    @property
    def spent(self):
        return self.sum.ledger.epsilon(delta=1e-5)

    def reserve(self, rate=0.1, slots=None):
        self.sum.reserve(
            scope={"p": rate},
            steps=STEPS,
            start="s",
            data="d",
            expected=10.0,
            numbers=50,
            slots=slots,
        )

    def step(self, step, value=1.0):
        """Gradient of a step; None where it was charged again."""
        try:
            return self.sum.gradient(lambda clip: total(value), PARAMS, step=step)["w"]
        except ChangedSumError:
            return None

    def release(self, value=1.0):
        key = ReleaseKey(partitions=("p",), numbers=range(1), start="s", data={"x": torch.zeros(1)})
        return self.sum.release(
            lambda clip: total(value),
            purpose="means",
            occasion=key,
            shapes={"w": torch.Size([50])},
            clip_norm=1.0,
        )["w"]


def total(value):
    return {"w": torch.full((50,), value / 50**0.5)}


@pytest.fixture
def process(tmp_path):
    return partial(Process, tmp_path)


def test_an_equal_block_is_replayed_at_no_cost(process):
    first = process()
    first.reserve()
    drawn = [first.step(step) for step in STEPS]
    again = process()
    again.reserve()
    assert all(torch.equal(again.step(step), drawn[step]) for step in STEPS)
    assert again.spent == first.spent and len(again.sum.ledger.entries) == 1


def test_another_sum_is_charged_again_before_it_is_drawn(process):
    """Six draws of one step for one charge were had before: 12.9 stated, 42.8 spent."""
    first = process()
    first.reserve()
    drawn = [first.step(step) for step in STEPS]
    spent = [first.spent]
    for attempt in range(1, 4):
        again = process()
        again.reserve()
        changed = 1.0 + attempt / 10
        assert torch.equal(again.step(0), drawn[0])
        refused = 0
        while (value := again.step(1, changed)) is None:
            refused += 1
        assert refused == attempt  # an attempt before had another sum each
        assert not torch.equal(value - total(changed)["w"], drawn[1] - total(1.0)["w"])
        assert [e.attempt for e in again.sum.ledger.entries] == list(range(attempt + 1))
        assert again.sum.ledger.entries[-1].first_step == 1
        spent.append(again.spent)
    assert spent == sorted(spent) and len(set(spent)) == 4


def test_a_changed_step_draws_other_records(process):
    first = process()
    first.reserve()
    coins = first.sum.coins(RECORDS, 0)
    first.step(0)
    again = process()
    again.reserve()
    assert torch.equal(again.sum.coins(RECORDS, 0), coins)
    assert again.step(0, 0.5) is None
    assert not torch.equal(again.sum.coins(RECORDS, 0), coins)


def test_the_changed_run_is_replayed_in_its_turn(process):
    first = process()
    first.reserve()
    first.step(0)
    values = []
    for _ in range(2):
        again = process()
        again.reserve()
        assert again.step(0, 0.5) is None
        values.append([again.step(0, 0.5), again.step(1, 0.5)])
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))
    assert len(again.sum.ledger.entries) == 2


def test_a_step_that_was_not_drawn_costs_nothing_more(process):
    """Killed between charge and draw, or between steps, on the same boot."""
    first = process()
    first.reserve()
    first.step(0)
    again = process()
    again.reserve()
    again.step(0)
    assert again.step(1, 0.3) is not None
    assert len(again.sum.ledger.entries) == 1


@pytest.mark.parametrize(("boot", "entries"), [("boot 1", 1), ("boot 2", 2), ("", 2)])
def test_an_open_block_is_charged_again_after_another_boot(process, boot, entries):
    first = process()
    first.reserve()
    first.step(0)
    again = process(boot=boot)
    again.reserve()
    again.step(0)
    assert len(again.sum.ledger.entries) == entries


def test_a_closed_block_is_replayed_after_another_boot(process):
    first = process()
    first.reserve()
    drawn = [first.step(step) for step in STEPS]
    again = process(boot="boot 2")
    again.reserve()
    assert torch.equal(again.step(0), drawn[0])
    assert len(again.sum.ledger.entries) == 1


def test_a_deleted_log_makes_no_second_look_free(process, tmp_path):
    first = process()
    first.reserve()
    drawn = first.step(0)
    (tmp_path / "private" / "draws.jsonl").unlink()
    again = process()
    again.reserve()
    assert not torch.equal(again.step(0), drawn)
    assert len(again.sum.ledger.entries) == 2


def test_a_sum_is_in_the_log_before_its_noise_is_drawn(process, tmp_path):
    made = process()
    made.reserve()
    lines = []

    def look(point):
        if point == "noise.drawn":
            lines.append((tmp_path / "private" / "draws.jsonl").read_text().count('"draw"'))

    made.sum.ledger.trace = look
    for step in range(3):
        made.step(step)
    assert lines == [1, 2, 3]


def test_a_release_with_another_answer_is_charged_again(process):
    first = process()
    value = first.release()
    again = process()
    assert torch.equal(again.release(), value)
    assert len(again.sum.ledger.entries) == 1
    changed = process()
    other = changed.release(0.5)
    assert len(changed.sum.ledger.entries) == 2
    assert not torch.equal(other - total(0.5)["w"], value - total(1.0)["w"])


def test_correlated_noise_begins_anew_where_a_block_changed(process):
    made = process(bands=2)
    made.reserve(rate=1.0, slots=4)
    drawn = [made.step(step) for step in STEPS]
    again = process(bands=2)
    again.reserve(rate=1.0, slots=4)
    assert torch.equal(again.step(0), drawn[0])
    assert again.step(1, 0.5) is None
    assert again.step(1, 0.5) is not None and again.step(2, 0.5) is not None
    assert [e.participations for e in again.sum.ledger.entries] == [1, 1]
