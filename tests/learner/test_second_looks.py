"""One charge covers one noisy answer: forked processes, second writers, and restored logs."""

import os
import shutil

import pytest
import torch

from perdure.errors import LedgerError, PerdureError, RunError
from perdure.privacy.settings import Privacy
from perdure.utils.folder_lock import LOCK

SECRET = Privacy(noise_multiplier=1.0)
OPENED = 1
"""Lines of the log when the first block has been opened."""

pytestmark = pytest.mark.filterwarnings("ignore:privacy.delta")


class Stop(Exception):  # noqa: N818
    """An exception in place of a kill."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PERDURE_STATE", str(tmp_path / "state"))
    return tmp_path / "run"


@pytest.fixture
def make(learner_of, folder):
    def learner(*callbacks, **changes):
        options = {"folder": folder, "privacy": SECRET, "iterations": 3, "blocks": 1}
        return learner_of(callbacks=list(callbacks), **(options | changes))

    return learner


class Answers:
    """A callback that keeps the gradient of a step, and stops after another step."""

    def __init__(self, step=0, stop=None):
        self.step = step
        self.stop = stop
        self.kept = []

    def __call__(self, point, learner):
        if point != "step.done" or learner.position.experience:
            return
        if learner.position.step == self.step + 1:
            self.kept += [torch.cat([p.grad.flatten() for p in learner.model.parameters()]).clone()]
        if learner.position.step == self.stop:
            raise Stop


def lines(folder):
    return (folder / "private" / "draws.jsonl").read_bytes().splitlines(keepends=True)


def entries(learner):
    return [e for e in learner.private_sum.ledger.entries if "experience-0" in e.scope]


def in_child(work):
    """Return the error message of `work` in a forked child process, or ""."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
        except PerdureError as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as file:
        return file.read()


def test_a_forked_child_process_draws_no_noise_of_its_parent(make, toy_stream, folder):
    """A hundred child processes once got a hundred answers to one sum."""
    told = []

    def fork(point, learner):
        if point == "step.sampled" and learner.position.step == 1 and not told:
            rows = learner.session.held.drawn_rows
            told.append(in_child(lambda: learner.session.fill_gradients(rows)))
            told.append(in_child(lambda: make().prepare(toy_stream())))

    make(fork).fit(toy_stream())
    assert told[0].startswith("LedgerError") and "forked, and belongs to the parent" in told[0]
    assert told[1].startswith("RunError") and "in use by another process" in told[1]
    assert sum(b'"kind": "draw"' in line for line in lines(folder)) == 6


def test_a_child_process_can_use_a_folder_that_its_parent_closed(make, toy_stream):
    learner = make()
    learner.fit(toy_stream())
    assert in_child(lambda: make().fit(toy_stream())) == ""


@pytest.mark.parametrize(
    ("kept", "beside"),
    [(None, False), (OPENED, False), (-1, False), (0, True), (OPENED, True)],
    ids=["removed", "opened", "one line missing", "empty, no head", "opened, no head"],
)
def test_a_restored_older_draw_log_makes_a_repeat_a_new_charge(
    make, toy_stream, folder, kept, beside
):
    """Only the log is restored, and the checkpoint is deleted; the ledger is unchanged."""
    first = Answers(stop=3)
    with pytest.raises(Stop):
        make(first).fit(toy_stream())
    log = folder / "private" / "draws.jsonl"
    left = lines(folder)[:kept]
    log.unlink()
    if kept is not None:
        log.write_bytes(b"".join(left))
    if beside:
        log.with_suffix(".head").unlink()
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    second = Answers()
    again = make(second)
    again.fit(toy_stream())
    assert [e.attempt for e in entries(again)] == [0, 1]
    assert not torch.equal(first.kept[0], second.kept[0])


def test_a_draw_log_that_lost_a_line_makes_a_new_charge(make, toy_stream, folder):
    with pytest.raises(Stop):
        make(Answers(stop=2)).fit(toy_stream())
    (folder / "private" / "draws.jsonl").write_bytes(b"".join(lines(folder)[:-1]))
    again = make()
    again.fit(toy_stream())
    assert [e.attempt for e in entries(again)] == [0, 1]


def test_a_checkpoint_detects_an_older_draw_log(make, toy_stream, folder, monkeypatch):
    """The log and its head are restored, and there is no state directory."""
    monkeypatch.setenv("PERDURE_STATE", "off")
    log = folder / "private" / "draws.jsonl"
    kept = {}

    def copy(point, learner):
        if point == "step.sampled" and not kept:
            kept.update({path: path.read_bytes() for path in (log, log.with_suffix(".head"))})
        if point == "checkpoint.end":
            raise Stop

    with pytest.raises(Stop):
        make(copy, blocks=3).fit(toy_stream())
    for path, data in kept.items():
        path.write_bytes(data)
    make(blocks=3).prepare(toy_stream())
    assert [b'"lost"' in line for line in lines(folder)] == [False, True]


def test_a_restart_without_changes_adds_no_privacy_charge(make, toy_stream, folder):
    first = Answers(stop=2)
    with pytest.raises(Stop):
        make(first).fit(toy_stream())
    second = Answers()
    again = make(second)
    again.fit(toy_stream())
    assert torch.equal(first.kept[0], second.kept[0]) and len(entries(again)) == 1


@pytest.fixture
def stopped(make, toy_stream):
    """Return a learner that stopped inside its first block, before a draw, and its own answers."""
    answers = Answers()
    stops = [True]

    def stop(point, learner):
        if point == "step.sampled" and stops:
            stops.pop()
            raise Stop

    learner = make(stop, answers)
    learner.prepare(toy_stream())
    learner.begin(0)
    with pytest.raises(Stop):
        learner.train(range(3))
    return learner, answers.kept


@pytest.fixture
def trained_by_another(make, toy_stream):
    """Train the first experience by another learner of the folder, and return the answers."""

    def train():
        answers = Answers()
        other = make(answers)
        other.prepare(toy_stream())
        other.begin(0)
        other.train(range(3))
        other.close()
        return answers.kept

    return train


def test_a_continuing_learner_reads_draws_of_another_learner(stopped, trained_by_another):
    """Step 0 was once drawn twice, by a learner that had read the log before."""
    learner, mine = stopped
    learner.close()
    others = trained_by_another()
    learner.session.open(0)
    learner.train(range(3))
    assert torch.equal(mine[0], others[0]) and len(entries(learner)) == 1


def test_a_second_writer_is_detected_without_the_lock_file(stopped, trained_by_another, folder):
    learner, mine = stopped
    (folder / LOCK).unlink()
    others = trained_by_another()
    learner.session.open(0)
    learner.train(range(3))
    assert torch.equal(mine[0], others[0]) and len(entries(learner)) == 1


def test_one_learner_works_at_a_time_after_the_lock_is_deleted(stopped, make, toy_stream, folder):
    learner, mine = stopped
    (folder / LOCK).unlink()
    other = make()
    other.prepare(toy_stream())
    with pytest.raises(RunError, match="in use by another process or learner"):
        learner.train(range(3))
    assert not mine
    other.close()
    learner.session.open(0)
    learner.train(range(3))
    assert len(mine) == 1


def test_a_draw_log_changed_by_others_stops_the_draws(make, toy_stream, folder):
    """No lock shows the change, so the file itself is checked before every draw."""

    def meddle(point, learner):
        if point == "step.sampled" and learner.position.step == 1:
            log = folder / "private" / "draws.jsonl"
            log.write_bytes(b"".join(lines(folder)[:OPENED]))

    answers = Answers(step=1)
    with pytest.raises(LedgerError, match="changed, or replaced by an older copy"):
        make(meddle, answers).fit(toy_stream())
    assert not answers.kept
