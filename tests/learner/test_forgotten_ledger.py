"""Ledgers that were deleted, rolled back or left behind are refused; privacy stays on or off in a
folder.
"""

import shutil
from dataclasses import replace

import pytest

from helpers.learners import SIMULATED
from perdure.errors import LedgerError, PrivacyError
from perdure.privacy.ledger.anchors import state_folder
from perdure.privacy.settings import Privacy
from perdure.strategies import EWC

SECRET = Privacy(noise_multiplier=1.0)
LEDGER = ("ledger.jsonl", "ledger.head.json")


class Stop(Exception):  # noqa: N818
    """An exception in place of a power failure."""


@pytest.fixture
def fit(learner_of, toy_stream, tmp_path):
    """Fit in a folder, optionally stopped before the second experience, and return the learner."""

    def run(privacy=SIMULATED, folder=tmp_path / "run", stop=False, **changes):
        def look(point, learner):
            if stop and point == "experience.begin" and learner.position.experience == 1:
                raise Stop

        options = {"folder": folder, "privacy": privacy, "callbacks": [look]} | changes
        learner = learner_of(EWC(strength=1.0), **options)
        if stop:
            with pytest.raises(Stop):
                learner.fit(toy_stream())
        else:
            learner.fit(toy_stream())
        return learner

    return run


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def remove(folder, *names):
    for name in names:
        (folder / name).unlink()


@pytest.mark.parametrize("privacy", [SIMULATED, SECRET], ids=["simulated", "secret"])
@pytest.mark.parametrize(
    "names", [(), ("private/ledger.head.json",)], ids=["ledger", "ledger and copy"]
)
def test_a_deleted_ledger_is_refused_and_no_file_is_written(fit, tmp_path, privacy, names):
    folder = tmp_path / "run"
    fit(privacy, stop=True)
    remove(folder, *LEDGER, *names)
    before = contents(folder)
    for _ in range(2):  # a refusal makes no ledger that the next attempt would take
        with pytest.raises(LedgerError, match=r"missing or empty, but .* records \d+, .*restore"):
            fit(privacy)
        assert contents(folder) == before


def test_a_run_without_its_noise_key_is_refused(fit, tmp_path):
    folder = tmp_path / "run"
    fit(SECRET, stop=True)
    remove(folder, *LEDGER, "private/key", "private/ledger.head.json")
    with pytest.raises(LedgerError, match=r"private/key is missing, but checkpoint .* refers to"):
        fit(SECRET)
    assert not (folder / "private" / "key").exists()


def test_a_checkpoint_copied_without_its_ledger_is_refused(fit, tmp_path):
    fit(stop=True)
    shutil.copytree(tmp_path / "run" / "checkpoint", tmp_path / "other" / "checkpoint")
    with pytest.raises(LedgerError, match="missing or empty, but checkpoint"):
        fit(folder=tmp_path / "other")


@pytest.mark.parametrize("with_copy", [False, True])
def test_a_run_refuses_a_ledger_older_than_its_checkpoint(fit, tmp_path, with_copy):
    """The head and, in one case, the copy in `private/` are restored too; the checkpoint still
    shows it.
    """
    folder = tmp_path / "run"
    fit(stop=True)
    names = [*LEDGER, *(["private/ledger.head.json"] if with_copy else [])]
    older = {name: (folder / name).read_bytes() for name in names}
    fit()
    for name, data in older.items():
        (folder / name).write_bytes(data)
    with pytest.raises(LedgerError, match=r"holds \d+ lines, but .* records \d+"):
        fit()


def test_a_different_ledger_sealed_with_the_same_key_is_refused(fit, tmp_path):
    fit(stop=True)
    fit(folder=tmp_path / "other", batch_size=4)
    for name in (*LEDGER, "private/ledger.head.json"):
        shutil.copy(tmp_path / "other" / name, tmp_path / "run" / name)
    with pytest.raises(LedgerError, match=r"not the line recorded by checkpoint \d+"):
        fit()


def test_the_state_directory_detects_a_rolled_back_folder(fit, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setenv("PERDURE_STATE", str(tmp_path / "state"))
    fit(SECRET, stop=True)
    shutil.copytree(folder, tmp_path / "kept")
    fit(SECRET)
    (recorded,) = (tmp_path / "state").rglob("*.json")
    assert recorded.stat().st_mode & 0o777 == 0o600
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "kept", folder)
    with pytest.raises(LedgerError, match=f"{recorded} records"):
        fit(SECRET)
    monkeypatch.setenv("PERDURE_STATE", "off")
    fit(SECRET)  # from inside it cannot be seen


def test_simulated_runs_write_nothing_to_the_state_directory(fit, tmp_path, monkeypatch):
    monkeypatch.setenv("PERDURE_STATE", str(tmp_path / "state"))
    fit()
    assert not (tmp_path / "state").exists()


def test_an_unwritable_state_directory_gives_a_warning(fit, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PERDURE_STATE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be written .* PERDURE_STATE"):
        fit(SECRET)


def test_the_state_directory_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("PERDURE_STATE", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_folder() == tmp_path / "perdure"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_folder() == tmp_path / ".local" / "state" / "perdure"
    monkeypatch.setenv("PERDURE_STATE", "off")
    assert state_folder() is None


def test_a_run_without_privacy_cannot_continue_with_privacy(fit, tmp_path):
    fit(None)
    with pytest.raises(PrivacyError, match="has a run without privacy"):
        fit()
    assert not (tmp_path / "run" / "ledger.jsonl").exists()


@pytest.mark.parametrize("removed", [(), LEDGER, (*LEDGER, "private/ledger.head.json")])
def test_a_private_run_cannot_continue_without_privacy(fit, tmp_path, removed):
    fit(stop=True)
    remove(tmp_path / "run", *removed)
    with pytest.raises(
        PrivacyError, match=r"has a run with privacy .*, but privacy=None was given"
    ):
        fit(None)


def test_a_private_run_without_checkpoint_stays_private(learner_of, toy_stream, tmp_path):
    learner = learner_of(privacy=SIMULATED, folder=tmp_path)
    learner.prepare(toy_stream())
    learner.close()
    with pytest.raises(PrivacyError, match="has a run with privacy"):
        learner_of(folder=tmp_path).prepare(toy_stream())


def test_a_checkpoint_records_the_head_of_the_ledger(fit, tmp_path):
    learner = fit(stop=True)
    head = learner.private_sum.ledger.chain.head
    facts = learner.checkpoint().facts["ledger"]
    assert facts == {"count": head.count, "hash": head.hash, "mac": head.mac}
    copy = (tmp_path / "run" / "private" / "ledger.head.json").read_text()
    assert copy == (tmp_path / "run" / "ledger.head.json").read_text()
    assert fit(None, folder=tmp_path / "plain").checkpoint().facts["ledger"] is None


def test_a_resumed_run_refuses_another_noise_multiplier(fit):
    fit(stop=True)
    with pytest.raises(Exception, match=r"privacy.noise_multiplier \(given 2.0, stored 1.0\)"):
        fit(replace(SIMULATED, noise_multiplier=2.0))
