"""A run on disk: its files, their contents, and secrets that they must not contain."""

import json
import shutil

import pytest
import torch

from helpers.small_runs import ATTACK, SMALL, ran
from perdure.data.datasets.registry import load
from perdure.errors import ConfigError, RunError
from perdure.experiment.arm import ArmRun, open_stream
from perdure.experiment.config import parse
from perdure.experiment.metrics_log import MetricsLog
from perdure.experiment.result_schema import checked
from perdure.experiment.run import TIMINGS, untimed
from perdure.experiment.run import load as load_model
from perdure.learner import POINTS
from perdure.privacy.ledger.merged import read as read_ledger
from perdure.privacy.noise.key import NoiseKey
from perdure.report import write_report
from perdure.report.wording import epsilon_number
from perdure.utils.folder_lock import locked

ARMS = ("replay-plain", "ewc-private", "replay-private")
PRIVATE = ARMS[1:]
SEEDED = SMALL.replace("sampling_rate", "seed = 3\nsampling_rate")
FEDERATED = SEEDED.replace(ATTACK, "[federation]\nclients = 2\nrounds = 2\n")


@pytest.fixture(scope="module")
def secret(tmp_path_factory):
    """A finished run with noise from the operating system: folder, result, progress, points."""
    folder = tmp_path_factory.mktemp("secret") / "run"
    points = []
    result, told = ran(
        folder, SMALL, callbacks=[lambda point, learner: points.append((learner.owner, point))]
    )
    write_report(folder, figures=True)
    return folder, result, told, points


@pytest.fixture(scope="module")
def federated(tmp_path_factory):
    """A finished federated run: folder, result, progress, points."""
    folder = tmp_path_factory.mktemp("federated") / "run"
    points = []
    result, told = ran(
        folder, FEDERATED, callbacks=[lambda point, learner: points.append((learner.owner, point))]
    )
    return folder, result, told, points


@pytest.fixture(params=["secret", "federated"])
def either(request):
    """Folder, result, progress and points of both kinds of run."""
    return request.getfixturevalue(request.param)


def contents(folder):
    """Return the bytes and the modification time of every file."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths
    }


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------- the files


def test_a_run_writes_all_its_files(secret):
    folder = secret[0]
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "arms",
        "checkpoint",
        "config.toml",
        "explanations.safetensors",
        "figures",
        "ledger.jsonl",
        "metrics.jsonl",
        "report.html",
        "result.json",
    ]
    assert (folder / "config.toml").read_text() == SMALL
    assert sorted(
        path.relative_to(folder / "checkpoint").as_posix() for path in folder.glob("checkpoint/*/*")
    ) == [f"{arm}/model.safetensors" for arm in sorted(ARMS)]


def test_the_stored_result_equals_the_returned_result(either):
    folder, result, _, _ = either
    stored = checked(json.loads((folder / "result.json").read_text()))
    assert stored == result
    assert [(arm["strategy"], arm["private"]) for arm in stored["arms"]] == [
        ("replay", False),
        ("ewc", True),
        ("replay", True),
    ]
    assert stored["stream"]["classes"] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_every_arm_has_one_metrics_line_per_experience(either):
    folder, result, _, _ = either
    rows = rows_of(folder)
    assert [(row["arm"], row["experience"]) for row in rows] == [
        (arm, index) for arm in ARMS for index in (0, 1)
    ]
    for name, arm in zip(ARMS, result["arms"], strict=True):
        own = [row for row in rows if row["arm"] == name]
        assert [row["accuracy"] for row in own] == arm["accuracy_matrix"]
        spent = [row["epsilon"] for row in own]
        assert spent == (arm["epsilon_over_time"] or [None, None])


def test_average_accuracy_is_the_mean_of_the_last_matrix_row(either):
    for arm in either[1]["arms"]:
        assert arm["average_accuracy"] == pytest.approx(sum(arm["accuracy_matrix"][-1]) / 2)


@pytest.mark.parametrize("arm", ARMS)
def test_the_stored_model_has_the_accuracy_of_the_result(either, arm):
    folder, result, _, _ = either
    learner = load_model(folder, arm)
    expected = result["arms"][ARMS.index(arm)]["accuracy_matrix"][-1]
    assert learner.evaluate(open_stream(parse(SMALL))) == expected
    assert learner.privacy is None
    assert not learner.callbacks


def test_loading_returns_the_trained_model_of_an_arm(secret, tmp_path):
    learner = load_model(secret[0], "replay-plain")
    config = parse(SMALL)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    fresh = ArmRun(config, config.arms[0], open_stream(config), tmp_path, log).untrained()
    before = fresh.model.state_dict()
    assert any(
        not torch.equal(value, before[name]) for name, value in learner.model.state_dict().items()
    )
    assert any(
        bool(value.any())
        for value in load_model(secret[0], "ewc-private").state.group("fisher").values()
    )


def test_loading_a_missing_trained_model_is_refused(secret, tmp_path):
    with pytest.raises(
        RunError, match="has no arm 'naive-plain'; give one of replay-plain, ewc-private"
    ):
        load_model(secret[0], "naive-plain")
    (tmp_path / "config.toml").write_text(SMALL)
    with pytest.raises(RunError, match="let the run finish first"):
        load_model(tmp_path, "replay-plain")
    (tmp_path / "checkpoint" / "replay-plain").mkdir(parents=True)
    (tmp_path / "checkpoint" / "replay-plain" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(RunError, match="cannot be read"):
        load_model(tmp_path, "replay-plain")


# --------------------------------------------------------------------------- privacy


def test_the_ledger_is_valid_and_agrees_with_the_result(secret):
    folder, result, _, _ = secret
    keys = {
        f"{arm}/client-0": NoiseKey.from_os(folder / "arms" / arm / "private" / "key")
        for arm in PRIVATE
    }
    account = read_ledger(folder / "ledger.jsonl", keys)
    assert account.verified == "chains and keyed heads verified"
    assert account.per_client(0.0005) == {
        f"{arm}/client-0": result["arms"][ARMS.index(arm)]["epsilon"]["value"] for arm in PRIVATE
    }
    assert not account.simulated


def test_every_client_has_a_ledger_of_its_own(federated):
    folder, result, _, _ = federated
    account = read_ledger(folder / "ledger.jsonl")
    spent = account.per_client(0.0005)
    assert list(spent) == [f"{arm}/client-{client}" for arm in PRIVATE for client in (0, 1)]
    for arm in PRIVATE:
        worst = max(spent[f"{arm}/client-{client}"] for client in (0, 1))
        assert result["arms"][ARMS.index(arm)]["epsilon"]["value"] == pytest.approx(worst)
    sizes = result["federation"]["declared_sizes"]
    own = {
        f"{arm}/client-{c}/client-{c}/experience-{e}": sizes[c][e]
        for arm in PRIVATE
        for c in (0, 1)
        for e in (0, 1)
    }
    assert account.sizes == own


def test_all_arms_together_cost_more_epsilon_than_each_arm(either):
    _, result, _, _ = either
    joint = result["epsilon_of_all_arms"]
    own = [arm["epsilon"] for arm in result["arms"] if arm["private"]]
    assert joint["value"] > max(epsilon["value"] for epsilon in own)
    assert joint["value"] <= sum(epsilon["value"] for epsilon in own)
    for epsilon in (joint, *own):
        assert epsilon["text"].startswith(
            f"epsilon {epsilon_number(epsilon['value'])} (record, add/remove, "
        )


def test_only_simulated_noise_is_labelled_as_simulation(secret, federated):
    for (_, result, _, _), simulated in ((secret, False), (federated, True)):
        stated = [
            result["epsilon_of_all_arms"],
            *(arm["epsilon"] for arm in result["arms"] if arm["private"]),
        ]
        assert [epsilon["simulated"] for epsilon in stated] == [simulated] * 3
        assert [("simulation: not a private release" in e["text"]) for e in stated] == [
            simulated
        ] * 3


def test_the_stored_epsilon_never_decreases(either):
    for arm in either[1]["arms"]:
        spent = arm["epsilon_over_time"]
        assert spent is None or (0 < spent[0] <= spent[1] == arm["epsilon"]["value"])


def test_a_plain_arm_states_no_epsilon_and_has_no_ledger(secret):
    folder, result, _, _ = secret
    assert result["arms"][0]["epsilon"] is None
    assert result["arms"][0]["spending"] == []
    assert not list((folder / "arms" / "replay-plain").rglob("ledger*"))


def holders(folder, needles, inside):
    """List files inside (or outside) private folders that contain any of the given bytes."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    chosen = [
        path for path in paths if ("private" in path.relative_to(folder).parts[:-1]) == inside
    ]
    assert chosen
    return {
        path.relative_to(folder)
        for path in chosen
        for needle in needles
        if needle in path.read_bytes()
    }


def test_no_file_outside_private_folders_holds_a_noise_key(secret):
    folder = secret[0]
    keys = [(folder / "arms" / arm / "private" / "key").read_bytes() for arm in PRIVATE]
    assert len(set(keys)) == 2
    assert not holders(folder, [*keys, *(key.hex().encode() for key in keys)], inside=False)
    assert len(holders(folder, keys, inside=True)) == 2


def test_no_file_outside_private_folders_holds_training_records(either):
    rows = [row.numpy().tobytes() for row in load("digits", seed=0).train.inputs]
    folder = either[0]
    assert not holders(folder, rows, inside=False)
    assert holders(folder, rows, inside=True)


def test_private_folders_have_mode_0700(either):
    folders = [path for path in either[0].rglob("private") if path.is_dir()]
    assert folders
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}


# --------------------------------------------------------------------------- the same run again


def test_a_finished_run_is_not_trained_again(either):
    folder, result, _, _ = either
    text = (folder / "config.toml").read_text()
    before = contents(folder)

    def never(point, learner):
        raise AssertionError(point)

    again, told = ran(folder, text, callbacks=[never])
    assert again == result
    assert contents(folder) == before
    assert told == [(arm, 1.0) for arm in ARMS]


def test_a_changed_config_is_refused_and_changes_no_file(secret):
    folder = secret[0]
    before = contents(folder)
    told = r"differs in config.seed \(given 9, stored 0\); give another folder with --out"
    with pytest.raises(RunError, match=told):
        ran(folder, SMALL.replace("[data]", "seed = 9\n[data]", 1))
    assert contents(folder) == before


def test_a_config_that_differs_only_in_layout_continues_the_run(secret):
    folder, result, *_ = secret
    before = contents(folder)
    again, _ = ran(folder, SMALL.replace("\n", "  # a comment\n") + "# another\n")
    assert again == result
    assert contents(folder) == before


def test_a_config_can_change_before_the_first_training_step(tmp_path):
    wrong = SMALL.replace("experiences = 2", "experiences = 3")
    with pytest.raises(ConfigError, match="experiences = 3 is not allowed; allowed: 1, 2, 5, 10"):
        ran(tmp_path, wrong)

    def stop(point, learner):
        raise InterruptedError(point)

    with pytest.raises(InterruptedError):
        ran(tmp_path, SMALL, callbacks=[stop])
    assert (tmp_path / "config.toml").read_text() == SMALL


def test_two_fresh_simulated_runs_differ_only_in_timings(tmp_path, federated):
    text = FEDERATED
    result, _ = ran(tmp_path / "other", text)
    assert result != federated[1]
    assert untimed(result) == untimed(federated[1])
    for name in (
        "metrics.jsonl",
        "ledger.jsonl",
        *(f"checkpoint/{arm}/model.safetensors" for arm in ARMS),
    ):
        assert (tmp_path / "other" / name).read_bytes() == (federated[0] / name).read_bytes()


def test_secret_noise_differs_between_runs(tmp_path, secret):
    ran(tmp_path, SMALL)
    same = {
        arm: (tmp_path / "checkpoint" / arm / "model.safetensors").read_bytes()
        == (secret[0] / "checkpoint" / arm / "model.safetensors").read_bytes()
        for arm in ARMS
    }
    assert same == {"replay-plain": True, "ewc-private": False, "replay-private": False}


def test_the_untimed_function_removes_timings_at_any_depth():
    assert set(TIMINGS) == {"seconds", "findings"}
    assert untimed({"a": [{"seconds": 1, "b": 2}], "seconds": 3}) == {"a": [{"b": 2}]}


def test_the_stored_seconds_add_up_over_resumed_sessions(tmp_path):
    text = SMALL.split('[[arms]]\nstrategy = "ewc"')[0]

    def stop(point, learner):
        if point == "evaluated":
            raise InterruptedError

    with pytest.raises(InterruptedError):
        ran(tmp_path, text, callbacks=[stop])
    clock = tmp_path / "arms" / "replay-plain" / "seconds.json"
    assert json.loads(clock.read_text()) > 0
    clock.write_text("1000.0\n")
    result, _ = ran(tmp_path, text)
    assert result["arms"][0]["seconds"] > 1000


# ----------------------------------------------------------------------- what is told while it goes


def test_progress_rises_from_0_to_1_for_each_arm(either):
    told = either[2]
    assert list(dict.fromkeys(arm for arm, _ in told)) == list(ARMS)
    for arm in ARMS:
        shares = [share for name, share in told if name == arm]
        assert shares[0] == 0.0
        assert shares[-1] == 1.0
        assert shares == sorted(set(shares))
        assert len(shares) >= 6
        assert max(shares[:-1]) <= 0.99


def test_callbacks_are_called_at_every_point_of_every_learner(either):
    points = either[3]
    names = {name for _, name in points}
    assert names >= set(POINTS)
    assert {owner.split("/")[0] for owner, _ in points} == set(ARMS)


# --------------------------------------------------------------------------- what a folder may be


def test_a_run_folder_in_use_is_refused(tmp_path):
    with locked(tmp_path), pytest.raises(RunError, match="is in use by another process"):
        ran(tmp_path, SMALL)
    with locked(tmp_path):
        pass


def test_a_run_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/run cannot be written \(.*\); give another folder"):
        ran(tmp_path / "file" / "run", SMALL)


def test_the_metrics_log_drops_a_truncated_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    row = {"trial": "a", "experience": 0, "accuracy": [1.0]}
    MetricsLog(path).append(row)
    with path.open("a") as file:
        file.write('{"trial": "a", "exper')
    log = MetricsLog(path)
    log.append(row)
    log.append(row | {"experience": 1})
    assert rows_of(tmp_path) == [row, row | {"experience": 1}]


@pytest.mark.parametrize("line", ["not json", "[]", '{"trial": "a"}', "\xff"])
def test_a_damaged_metrics_log_is_refused(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line.encode("latin-1") + b"\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl is damaged"):
        MetricsLog(path)


def test_a_damaged_result_file_is_refused(secret, tmp_path):
    shutil.copytree(secret[0], tmp_path / "copy")
    (tmp_path / "copy" / "result.json").write_text("{}")
    with pytest.raises(RunError, match="schema"):
        ran(tmp_path / "copy", SMALL)
