"""`tune_run`: trials as runs of a config, stops, refusals, and the epsilon of a private search."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest

from perdure.errors import BudgetError, ConfigError, PrivacyError, RunError, StorageError
from perdure.experiment import parse, tune_run
from perdure.experiment.private_searches import planned_charges, refuse_larger
from perdure.experiment.search_trials import TrialRuns
from perdure.privacy.accounting import Charge, epsilon
from perdure.privacy.accounting.selection import Selection, selection_epsilon
from perdure.privacy.ledger.merged import read as read_ledger
from perdure.report import front_picture, search_table

CONFIG = """
name = "small"
[data]
name = "helpers.own_data:blobs"
experiences = 2
[model]
hidden = [4]
[training]
optimizer = "SGD"
learning_rate = 1e-6
iterations = 6
[search]
trials = 5
[search.space]
"training.learning_rate" = [0.001, 1.0]
"model.hidden" = {choices = [[4], [8, 8]]}
[[arms]]
strategy = "naive"
"""
PRIVATE = CONFIG.replace(
    "[search]\ntrials = 5",
    "[privacy]\nnoise_multiplier = 2.0\nseed = 1\n[search]\nprivacy = 'charge_all'\ntrials = 2",
).replace("[[arms]]", "[[arms]]\nprivate = true")
SELECT = PRIVATE.replace("'charge_all'", "'select'\nsampler = 'random'")
SECRET = SELECT.replace("seed = 1\n", "").replace("iterations = 6", "iterations = 2")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return tune_run(CONFIG, tmp_path_factory.mktemp("search"), trials=4)


def test_a_search_beats_the_default_and_writes_its_config(found):
    assert len(found.trials) == 4 and found.improved
    assert found.best.score.values[0] == max(t.score.values[0] for t in found.trials)
    assert {tuple(t.values["model.hidden"]) for t in found.trials} <= {(4,), (8, 8)}
    best = parse((found.folder / "best.toml").read_text())
    assert best.name == "small-tuned" and best.search is None
    assert best.training.learning_rate == found.best.values["training.learning_rate"]
    stored = json.loads((found.folder / "result.json").read_text())
    assert stored["default"]["values"] == list(found.default.values)
    assert search_table(found).row_count == 2


def test_a_stopped_search_of_a_config_ends_in_the_same_result(found, tmp_path):
    def stop(line):
        if line.startswith("trial 2/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_run(CONFIG, tmp_path, trials=4, told=stop)
    resumed = tune_run(CONFIG, tmp_path, trials=4)
    assert resumed.trials == found.trials and resumed.default == found.default
    with pytest.raises(RunError, match="a search with another seed"):
        tune_run(CONFIG, tmp_path, trials=4, seed=9)


def test_a_search_for_two_goals_has_a_front(tmp_path):
    text = CONFIG.replace("trials = 5", "goals = ['accuracy', 'parameters']\nsampler = 'nsga2'")
    found = tune_run(text, tmp_path, trials=4)
    costs = {(-t.score.values[0], t.score.values[1]) for t in found.trials}
    front = {(-t.score.values[0], t.score.values[1]) for t in found.front}
    assert front <= costs
    for cost in costs - front:
        assert any(a <= cost[0] and b <= cost[1] for a, b in front)
    names = {f"front-{trial.number:04d}.toml" for trial in found.front}
    assert {path.name for path in tmp_path.glob("front-*.toml")} == names
    assert "<svg" in front_picture(found).svg()


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        ("training.learning_rate", "training.larning_rate", ConfigError, "larning_rate"),
        ("[0.001, 1.0]", "[-1.0, 1.0]", ConfigError, r'"training.learning_rate" with -1\.0'),
        ("[[4], [8, 8]]", '["wide"]', ConfigError, "\"model.hidden\" with 'wide'"),
        ("training.learning_rate", "data.experiences", ConfigError, "data.experiences"),
        ("training.learning_rate", "arms.3.strength", ConfigError, r"arms\.3\.strength"),
        ("training.learning_rate", "arms.0.private", ConfigError, "change no statement"),
        ("trials = 5", "experiences = 2", ConfigError, "search.experiences = 2.*1 to 1"),
        ("trials = 5", "goals = ['epsilon']", ConfigError, "epsilon for a private arm only"),
        ("trials = 5", "goals = ['robust_accuracy']", ConfigError, r"with \[attack\] only"),
        ("trials = 5", "privacy = 'select'", ConfigError, "the arm is not private"),
        ("trials = 5", "arm = 'ewc'", ConfigError, "search.arm = 'ewc'"),
    ],
)
def test_a_wrong_search_is_refused_before_a_trial(tmp_path, old, new, error, message):
    with pytest.raises(error, match=message):
        tune_run(CONFIG.replace(old, new), tmp_path / "search")
    assert not (tmp_path / "search" / "arms").exists()


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        ("privacy = 'charge_all'\n", "", PrivacyError, "search.privacy is missing"),
        ("seed = 1", "diagnostics = 'raw'", ConfigError, "privacy.diagnostics"),
        ("trials = 2", "goals = ['seconds']", ConfigError, "depends on the records"),
        ("[model]", "[start]\nrun = 'runs/a'\n[model]", ConfigError, "a public start"),
        ("noise_multiplier = 2.0", "epsilon = [1.0, 1.0]", ConfigError, "one number in a search"),
        ("training.learning_rate", "federation.fraction", ConfigError, "one learner"),
        (
            '"training.learning_rate" = [0.001, 1.0]',
            '"federation.clients" = {choices = [2, 3]}',
            ConfigError,
            "one learner",
        ),
        ("'charge_all'", "'select'", ConfigError, "search.sampler = 'tpe'.*needs trainings"),
        (
            "private = true",
            "name = 'open'\nstrategy = 'naive'\n[[arms]]\nprivate = true",
            PrivacyError,
            "records that a private arm protects",
        ),
    ],
)
def test_a_private_search_without_a_bound_is_refused(tmp_path, old, new, error, message):
    text = PRIVATE.replace(old, new)
    if "open" in new:
        text = text.replace("privacy = 'charge_all'", "arm = 'open'")
    with pytest.raises(error, match=message):
        tune_run(text, tmp_path / "search")
    assert not (tmp_path / "search" / "arms").exists()


def number(text):
    return float(re.search(r"epsilon ([0-9.]+)", text)[1])


def test_a_private_search_charges_every_trial(tmp_path):
    told = []
    found = tune_run(PRIVATE, tmp_path, told=told.append)
    assert told[0].startswith("search, in advance: at most epsilon")
    ledger = read_ledger(tmp_path / "ledger.jsonl")
    assert len(ledger.parts) == 3  # the default and two trials
    charges = [c for part in ledger.parts for c in part.account.charges(part.account.partitions[0])]
    spent = epsilon(charges, delta=1e-5)
    assert spent <= number(found.epsilon) <= spent + 0.011
    assert number(found.epsilon) <= number(found.announced)
    best = parse((tmp_path / "best.toml").read_text()).privacy
    assert epsilon(best.spent, delta=1e-5) == pytest.approx(spent)
    assert best.noise_multiplier == 2.0


def test_a_private_selection_shows_the_best_trial_only(tmp_path):
    told = []
    found = tune_run(SELECT, tmp_path, told=told.append)
    assert len(told) == 2 and "secret" in told[1]
    kept = {path.name for path in tmp_path.iterdir()} - {".lock"}
    assert kept == {"best", "config.toml", "result.json", "search.json"}
    assert found.trials == () and found.default is None
    assert "number" not in json.loads((tmp_path / "result.json").read_text())["best"]
    one_run = (Charge(*_rate_and_noise(), "grid-gaussian"),)
    spent = selection_epsilon(one_run, 1e-5, Selection(mean=2))
    assert spent <= number(found.epsilon) <= spent + 0.011
    assert tune_run(SELECT, tmp_path) == found


def _rate_and_noise():
    """Sampling rate, noise and steps of one training: 32 per step, capped at the 24 records."""
    return 1.0, 2.0, 6


def test_a_stopped_selection_goes_on_with_its_trainings(tmp_path):
    whole = tune_run(SELECT, tmp_path / "whole")
    folder = tmp_path / "stopped"

    def stop(line):
        if "secret" in line:
            (folder / "private" / "arms").write_text("in the way of the first training")

    with pytest.raises(Exception, match="arms"):
        tune_run(SELECT, folder, told=stop)
    assert (folder / "private").stat().st_mode & 0o077 == 0
    (folder / "private" / "arms").unlink()
    again = tune_run(SELECT, folder)
    assert again.best == whole.best and again.epsilon == whole.epsilon


def test_a_selection_without_its_key_is_refused(tmp_path):
    def stop(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_run(SECRET, tmp_path, told=stop)
    key = tmp_path / "private" / "key"
    kept = key.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        tune_run(SECRET, tmp_path, told=stop)
    assert key.read_bytes() == kept
    key.unlink()
    with pytest.raises(PrivacyError, match="the secret number of trainings; nothing is released"):
        tune_run(SECRET, tmp_path)
    assert not key.exists()


@pytest.fixture(scope="module")
def kept_folders(tmp_path_factory):
    """State directory, search whose result could not be written, and its folder from before."""
    base = tmp_path_factory.mktemp("secret")
    folder = base / "search"

    def prepare(line):
        if line.startswith("the trainings run"):
            shutil.copytree(folder, base / "before")
            (folder / "result.json" / "in the way").mkdir(parents=True)
            for path in folder.iterdir():
                os.utime(path, (1, 1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERDURE_STATE", str(base / "state"))
        with pytest.raises(StorageError):
            tune_run(SECRET, folder, told=prepare)
    return base


def test_a_selection_leaves_one_file_in_the_state_directory(kept_folders, monkeypatch):
    state = kept_folders / "state"
    assert len(list((kept_folders / "search" / "private" / "arms").iterdir())) > 0
    assert [path.suffixes for path in state.rglob("*.*")] == [[".selection", ".json"]]
    monkeypatch.setenv("PERDURE_STATE", str(state))
    folder = kept_folders / "search"
    shutil.rmtree(folder / "result.json")
    assert tune_run(SECRET, folder).best is not None
    assert [path.suffixes for path in state.rglob("*.*")] == [[".selection", ".json"]]
    # nor does the time of a file tell for how long the search trained
    ended = (folder / "result.json").stat().st_mtime
    assert {path.stat().st_mtime for path in folder.rglob("*")} == {ended}


def test_a_selection_that_was_put_back_is_not_released(kept_folders, monkeypatch):
    monkeypatch.setenv("PERDURE_STATE", str(kept_folders / "state"))
    with pytest.raises(PrivacyError, match="another release of this search"):
        tune_run(SECRET, kept_folders / "before")
    left = {path.name for path in (kept_folders / "before").iterdir()}
    assert not left & {"best", "result.json"}


def test_a_selection_gives_no_warning_for_a_training(tmp_path):
    with pytest.warns(UserWarning, match=r"privacy\.delta") as given:
        tune_run(SELECT.replace("seed = 1", "seed = 1\ndelta = 0.1"), tmp_path)
    assert len(given) == 1


def test_the_announced_epsilon_is_for_the_least_noise(tmp_path):
    text = PRIVATE.replace("trials = 2", "trials = 1").replace(
        '"training.learning_rate" = [0.001, 1.0]', '"privacy.noise_multiplier" = [1.0, 4.0]'
    )
    found = tune_run(text, tmp_path)
    noises = [trial.values["privacy.noise_multiplier"] for trial in found.trials]
    worst = Charge(1.0, 1.0, 6, "grid-gaussian")
    assert min(noises) > 1.0
    assert number(found.announced) == pytest.approx(epsilon([worst] * 2, delta=1e-5), abs=0.011)
    # later noise depends on earlier scores, so that the sum of what was charged is no bound
    assert found.epsilon == found.announced and not (tmp_path / "ledger.jsonl").exists()
    best = parse((tmp_path / "best.toml").read_text()).privacy
    assert epsilon(best.spent, delta=1e-5) == pytest.approx(epsilon([worst] * 3, delta=1e-5))


def test_a_trial_beyond_the_announced_charges_is_refused(tmp_path):
    config = parse(PRIVATE)
    table = tomllib.loads(PRIVATE)
    runs = TrialRuns(table=table, source="", folder=tmp_path, search=config.search, place=0)
    bound = planned_charges(runs, {})
    refuse_larger(runs, bound, {"privacy.noise_multiplier": 2.5})
    for value in ({"privacy.noise_multiplier": 1.9}, {"training.iterations": 7}):
        with pytest.raises(BudgetError, match="would charge more than the ends of the space"):
            refuse_larger(runs, bound, value)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Folder of a private search that was stopped after its default."""
    return _stopped(PRIVATE, tmp_path_factory.mktemp("begun"))


def _stopped(text, folder):
    def stop(line):
        if line.startswith("default"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_run(text, folder, told=stop)
    return folder


def test_a_training_beyond_the_announced_total_is_refused(begun, tmp_path):
    folder = tmp_path / "search"
    shutil.copytree(begun, folder)
    for name in ("other", "more"):
        shutil.copytree(begun / "arms" / "default", folder / "arms" / name)
    with pytest.raises(BudgetError, match="trial-0000 would exceed the announced epsilon"):
        tune_run(PRIVATE, folder)
    assert not (folder / "arms" / "trial-0000").exists()


def test_a_trial_that_charged_more_than_announced_is_refused(begun, tmp_path):
    longer = _stopped(PRIVATE.replace("iterations = 6", "iterations = 7"), tmp_path / "longer")
    folder = tmp_path / "search"
    shutil.copytree(begun, folder)
    shutil.rmtree(folder / "arms")
    shutil.copytree(longer / "arms", folder / "arms")
    with pytest.raises(PrivacyError, match="was charged more than announced"):
        tune_run(PRIVATE, folder)


@pytest.mark.deep(reason="chaos: searches that are killed, and worker processes")
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_killed_tune_command_ends_in_the_same_result(tmp_path, workers):
    root = Path(__file__).parents[2]
    (tmp_path / "c.toml").write_text(CONFIG)
    environment = os.environ | {"PYTHONPATH": f"{root / 'src'}:{root / 'tests'}"}
    words = [sys.executable, "-m", "perdure.cli.main", "tune", "c.toml", "--workers", workers]
    begin = partial(
        subprocess.Popen, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    for stop in ("default", "trial 1/", "trial 4/"):
        with begin([*words, "--out", "killed"]) as killed:
            for line in killed.stdout:
                if line.startswith(stop):
                    os.kill(killed.pid, signal.SIGKILL)
                    break
        assert killed.returncode == -signal.SIGKILL
    for name in ("killed", "whole"):
        with begin([*words, "--out", name]) as ended:
            out = ended.stdout.read()
        assert ended.returncode == 0, out
    results = [json.loads((tmp_path / n / "result.json").read_text()) for n in ("killed", "whole")]
    assert results[0] == results[1]
    best = (tmp_path / "killed" / "best.toml").read_text()
    assert tomllib.loads(best)["name"] == "small-tuned"
