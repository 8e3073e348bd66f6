"""Repeated steps: an equal sum gets the same noise, another sum is charged again."""

import json
import stat
from functools import partial

import pytest
import torch

from perdure.privacy.adaptive_clipping import Adaptive
from perdure.privacy.answers import Answers
from perdure.privacy.clipping.clip import WITHIN
from perdure.privacy.ledger.ledger import Ledger
from perdure.privacy.noise.draw_log import DrawLog
from perdure.privacy.noise.key import NoiseKey
from perdure.privacy.private_sum import ChangedSumError, PrivateSum, ReleaseKey, Schedule
from perdure.privacy.settings import Privacy

PARAMS = {"w": torch.zeros(50)}
STEPS = range(4)
RECORDS = torch.stack([torch.arange(1000), torch.zeros(1000, dtype=torch.int64)], dim=1)


class Process:
    """A private sum on the files of one folder, opened as by a separate process."""

    def __init__(self, folder, *, boot="boot 1", key=None, **changes):
        self.key = key or NoiseKey.from_os(folder / "private" / "key")
        ledger = Ledger.open(folder / "ledger.jsonl", key=self.key)
        ledger.declare("p", 100)
        privacy = Privacy(**{"noise_multiplier": 1.0} | changes)
        self.sum = PrivateSum(
            privacy=privacy,
            schedule=Schedule(noise=(privacy.noise_multiplier,)),
            ledger=ledger,
            key=self.key,
            draws=DrawLog(folder / "private" / "draws.jsonl", self.key, boot),
            answers=Answers(folder / "private" / "answers", self.key),
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
        """Return the gradient of a step, or None if it was charged again."""
        try:
            return self.sum.gradient(partial(clipped, value), PARAMS, step=step)["w"]
        except ChangedSumError:
            return None

    def release(self, value=1.0, number=0, seen=None):
        def clipped(clip):
            if seen is not None:
                seen.append(clip)
            return total(value)

        return self.sum.release(
            clipped,
            purpose="means",
            occasion=occasion(number),
            shapes={"w": torch.Size([50])},
            clip_norm=1.0,
        )["w"]

    def ask(self, asked, value):
        """Return the answer of one kind of release."""
        if asked == "release":
            return self.release(value)
        if asked == "count":
            counts = torch.full((20,), round(100 * value))
            return self.sum.count(counts, purpose="bins", occasion=occasion(0))
        scores = torch.arange(1000.0) * value
        return self.sum.select(scores, purpose="top", occasion=occasion(0))


def occasion(number):
    numbers = range(number, number + 1)
    return ReleaseKey(partitions=("p",), numbers=numbers, start="s", data={"x": torch.zeros(1)})


def total(value):
    return {"w": torch.full((50,), value / 50**0.5)}


def clipped(value, clip):
    return total(value) | ({WITHIN: torch.tensor(0.5)} if clip.counted else {})


@pytest.fixture
def process(tmp_path):
    return partial(Process, tmp_path)


def test_an_equal_block_is_repeated_at_no_privacy_cost(process):
    first = process()
    first.reserve()
    drawn = [first.step(step) for step in STEPS]
    again = process()
    again.reserve()
    assert all(torch.equal(again.step(step), drawn[step]) for step in STEPS)
    assert again.spent == first.spent and len(again.sum.ledger.entries) == 1


def test_a_changed_sum_is_charged_again_before_it_is_drawn(process):
    """Six draws of one step were once possible for one charge: epsilon 12.9 stated, 42.8 spent."""
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


def test_a_block_charged_again_samples_other_records(process):
    first = process()
    first.reserve()
    coins = first.sum.coins(RECORDS, 0)
    first.step(0)
    again = process()
    again.reserve()
    assert torch.equal(again.sum.coins(RECORDS, 0), coins)
    assert again.step(0, 0.5) is None
    assert not torch.equal(again.sum.coins(RECORDS, 0), coins)


def test_repeating_a_changed_run_again_has_no_privacy_cost(process):
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


def test_a_step_that_was_not_drawn_has_no_cost_on_restart(process):
    """The process is killed between charge and draw, or between steps, on the same boot."""
    first = process()
    first.reserve()
    first.step(0)
    again = process()
    again.reserve()
    again.step(0)
    assert again.step(1, 0.3) is not None
    assert len(again.sum.ledger.entries) == 1


@pytest.mark.parametrize(("boot", "entries"), [("boot 1", 1), ("boot 2", 2), ("", 2)])
def test_an_unfinished_block_is_charged_again_after_a_reboot(process, boot, entries):
    first = process()
    first.reserve()
    first.step(0)
    again = process(boot=boot)
    again.reserve()
    again.step(0)
    assert len(again.sum.ledger.entries) == entries


def test_a_finished_block_is_not_charged_again_after_a_reboot(process):
    first = process()
    first.reserve()
    drawn = [first.step(step) for step in STEPS]
    again = process(boot="boot 2")
    again.reserve()
    assert torch.equal(again.step(0), drawn[0])
    assert len(again.sum.ledger.entries) == 1


def test_a_deleted_draw_log_does_not_make_a_repeat_free(process, tmp_path):
    first = process()
    first.reserve()
    drawn = first.step(0)
    (tmp_path / "private" / "draws.jsonl").unlink()
    again = process()
    again.reserve()
    assert not torch.equal(again.step(0), drawn)
    assert len(again.sum.ledger.entries) == 2


def test_a_sum_is_logged_before_its_noise_is_drawn(process, tmp_path):
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


ASKED = ["release", "count", "select"]


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("value", [1.0, 0.5], ids=["equal", "changed"])
def test_a_stored_release_is_returned_again_unchanged(process, asked, value):
    """An additional entry, or another answer, would reveal if two exact sums are equal."""
    first = process()
    answer = first.ask(asked, 1.0)
    again = process()
    assert torch.equal(again.ask(asked, value), answer)
    assert len(again.sum.ledger.entries) == 1


def test_a_stored_release_is_not_computed_again(process):
    process().release()
    asked = []
    process().release(seen=asked)
    assert not asked


@pytest.mark.parametrize("value", [1.0, 0.5], ids=["equal", "changed"])
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("how", ["removed", "damaged"])
def test_a_release_without_a_stored_answer_is_charged_again(process, tmp_path, asked, value, how):
    process().ask(asked, 1.0)
    (file,) = (tmp_path / "private" / "answers").iterdir()
    if how == "removed":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    again = process()
    again.ask(asked, value)
    assert [e.attempt for e in again.sum.ledger.entries] == [0, 1]


@pytest.mark.parametrize("point", ["ledger.head-written", "noise.drawn"])
@pytest.mark.parametrize("value", [1.0, 0.5], ids=["equal", "changed"])
def test_a_release_stopped_before_its_answer_is_charged_once(process, tmp_path, value, point):
    """The process stops between charge and answer; the ledger looks the same for all sums."""
    made = process()

    def stop(here):
        if here == point:
            raise Stop

    made.sum.ledger.trace = stop
    with pytest.raises(Stop):
        made.release()
    again = process()
    noise = again.release(value) - total(value)["w"]
    assert len(again.sum.ledger.entries) == 1
    lines = map(json.loads, (tmp_path / "private" / "draws.jsonl").read_text().splitlines())
    nonces = [line["nonce"] for line in lines if line["kind"] == "draw"]
    drawn_twice = point == "noise.drawn" and value != 1.0
    assert len(nonces) == len(set(nonces)) == 1 + drawn_twice
    assert noise.abs().max() > 0


def test_stored_answers_are_private_and_old_ones_are_deleted(process, tmp_path):
    made = process()
    for index in range(4):
        made.sum.open(index)
        made.release(number=index)
    kept = sorted((tmp_path / "private" / "answers").iterdir())
    assert [file.name[:6] for file in kept] == ["000002", "000003"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in kept} == {0o600}


def test_the_ledger_does_not_reveal_if_two_answers_are_equal(process):
    made = process()
    for number in range(2):
        made.release(1.0, number=number)
    first, second = made.sum.ledger.entries
    assert first.data != second.data


@pytest.mark.parametrize(("value", "entries"), [(1.0, 1), (0.5, 2)])
def test_a_release_with_simulated_noise_is_computed_again(tmp_path, value, entries):
    """So a simulated run ends with the same bits wherever it was stopped."""
    first = Process(tmp_path, key=NoiseKey.from_seed(0))
    answer = first.release()
    again = Process(tmp_path, key=NoiseKey.from_seed(0))
    assert torch.equal(again.release(value), answer) is (value == 1.0)
    assert len(again.sum.ledger.entries) == entries
    assert not (tmp_path / "private" / "answers").exists()


def test_correlated_noise_restarts_if_a_block_changed(process):
    made = process(bands=2)
    made.reserve(rate=1.0, slots=4)
    drawn = [made.step(step) for step in STEPS]
    again = process(bands=2)
    again.reserve(rate=1.0, slots=4)
    assert torch.equal(again.step(0), drawn[0])
    assert again.step(1, 0.5) is None
    assert again.step(1, 0.5) is not None and again.step(2, 0.5) is not None
    assert [e.participations for e in again.sum.ledger.entries] == [1, 1]


class Stop(Exception):  # noqa: N818
    """A callback that raises an error."""


@pytest.mark.parametrize("changes", [{"bands": 3}, {"clipping": Adaptive(count_noise=0.5)}, {}])
@pytest.mark.parametrize("stopped", [0, 1, 3])
def test_a_step_repeated_after_a_failure_is_charged_once(process, tmp_path, changes, stopped):
    """A record of such a step was once counted twice in the noise chain: 1.43 times its clip
    norm.
    """
    slots = {"rate": 1.0, "slots": 4} if "bands" in changes else {}
    made = process(**changes)
    made.reserve(**slots)
    drawn = [made.step(step, 0.3) for step in STEPS]
    norm, deviation = made.sum.clip_norm, made.sum.deviation
    again = process(**changes)
    again.reserve(**slots)

    def fail(point):
        again.sum.ledger.trace = lambda point: None
        raise Stop

    for step in STEPS:
        if step == stopped:
            again.sum.ledger.trace = fail
            with pytest.raises(Stop):
                again.step(step, 0.3)
        assert torch.equal(again.step(step, 0.3), drawn[step])
    assert (again.sum.clip_norm, again.sum.deviation) == (norm, deviation)
    assert len(again.sum.ledger.entries) == 1
