"""Loggers: what they write, read back by the packages that they write for."""

import sys
import warnings
from math import isnan

import pytest

from helpers.learners import SIMULATED
from helpers.logged_runs import tensorboard_curves, tensorboard_text, wandb_curves
from perdure.errors import ConfigError, RunError
from perdure.loggers import MLflow, TensorBoard, WandB, find, names, run_log
from perdure.privacy import Privacy

STEPS = [2, 4, 6, 8]
"""Steps at which two experiences of four steps are logged, every two steps."""


class StoppedError(Exception):
    """Stop of a training."""


def stop(point, learner):
    """Stop in the last step of the second experience, after a checkpoint in its middle."""
    if point == "step.done" and (learner.position.experience, learner.position.step) == (1, 4):
        raise StoppedError


def steps(curves, name):
    return [step for step, _ in curves[name]]


def checked(curves):
    """Assert that the curves of two experiences without privacy are complete."""
    assert steps(curves, "loss") == steps(curves, "learning_rate") == STEPS
    assert all(0 < value < 3 for _, value in curves["loss"])
    assert {round(value, 6) for _, value in curves["learning_rate"]} == {0.02}
    assert steps(curves, "accuracy/stage_000") == steps(curves, "average_accuracy") == [4, 8]
    assert steps(curves, "accuracy/stage_001") == [8]


def test_tensorboard_reads_curves_that_a_stop_did_not_repeat(learner_of, toy_stream, tmp_path):
    whole = tmp_path / "whole"
    options = {"blocks": 2, "callbacks": [TensorBoard(folder=whole, run="a", every=2)]}
    matrix = learner_of(folder=tmp_path / "run", **options).fit(toy_stream())
    expected = tensorboard_curves(whole / "perdure" / "a")
    checked(expected)
    assert [value for _, value in expected["accuracy/stage_000"]] == pytest.approx(matrix[:, 0])
    assert "Naive()" in tensorboard_text(whole / "perdure" / "a", "settings")

    resumed = {"folder": tmp_path / "stopped", "blocks": 2}
    for callbacks in ([TensorBoard(every=2), stop], [TensorBoard(every=2)]):
        try:
            learner_of(callbacks=callbacks, **resumed).fit(toy_stream())
        except StoppedError:
            assert len(callbacks) == 2
    found = tensorboard_curves(tmp_path / "stopped" / "loggers" / "perdure" / "stopped")
    assert found == expected


def test_a_private_run_writes_releases_and_its_statement_only(learner_of, toy_stream, tmp_path):
    logger = TensorBoard(folder=tmp_path, run="a", every=2)
    learner_of(privacy=SIMULATED, callbacks=[logger]).fit(toy_stream())
    curves = tensorboard_curves(tmp_path / "perdure" / "a")
    assert steps(curves, "signal_to_noise") == steps(curves, "clip_norm") == STEPS
    assert steps(curves, "simulated/epsilon") == [4, 8]
    assert not any("loss" in name or "raw" in name or name == "epsilon" for name in curves)
    said = tensorboard_text(tmp_path / "perdure" / "a", "privacy")
    assert "delta 1e-5" in said and "simulation: not a private release" in said


@pytest.mark.parametrize(
    ("privacy", "written"),
    [(None, [False, True]), (SIMULATED, [False, False])],
    ids=["plain", "private"],
)
def test_private_values_wait_for_the_end_of_their_block(
    learner_of, toy_stream, tmp_path, monkeypatch, privacy, written
):
    monkeypatch.setattr(run_log, "PAUSE", -1.0)
    seen = []

    def look(point, learner):
        if point == "step.sampled" and learner.position.experience == 0:
            seen.append((tmp_path / "perdure" / "a.tensorboard.json").exists())

    logger = TensorBoard(folder=tmp_path, run="a", every=1)
    learner_of(privacy=privacy, callbacks=[logger, look], iterations=2).fit(toy_stream())
    assert seen == written


def test_raw_diagnostics_are_written_under_their_own_names(learner_of, toy_stream, tmp_path):
    privacy = Privacy(noise_multiplier=1.0, seed=0, diagnostics="raw")
    logger = TensorBoard(folder=tmp_path, run="a", every=2)
    learner_of(privacy=privacy, callbacks=[logger]).fit(toy_stream())
    curves = tensorboard_curves(tmp_path / "perdure" / "a")
    assert steps(curves, "raw/loss") == steps(curves, "raw/clipped") == STEPS
    assert "loss" not in curves
    said = tensorboard_text(tmp_path / "perdure" / "a", "privacy")
    assert said.endswith("raw diagnostics were shown: not private")


def test_a_logger_writes_values_of_its_user(learner_of, toy_stream, tmp_path):
    logger = TensorBoard(folder=tmp_path, run="a")

    def note(point, learner):
        if point == "experience.end":
            logger.log({"rows": float(learner.curator.stored)}, learner)

    learner_of(callbacks=[note, logger]).fit(toy_stream())
    assert tensorboard_curves(tmp_path / "perdure" / "a")["rows"] == [(4, 0.0), (8, 0.0)]


# ------------------------------------------------------------------ which run is continued


def test_a_run_of_a_learner_without_folder_is_not_continued(learner_of, toy_stream, tmp_path):
    for _ in range(2):
        learner_of(callbacks=[TensorBoard(folder=tmp_path)]).fit(toy_stream())
    runs = [path for path in (tmp_path / "perdure").iterdir() if path.is_dir()]
    assert [steps(tensorboard_curves(run), "loss") for run in runs] == [[4, 8]] * 2

    logger = TensorBoard(folder=tmp_path, run="a")
    learner_of(callbacks=[logger]).fit(toy_stream())
    with pytest.raises(ConfigError, match="run = 'a' is not allowed; allowed: a run without val"):
        learner_of(callbacks=[logger]).fit(toy_stream())


def test_a_run_with_other_settings_is_refused(learner_of, toy_stream, tmp_path):
    logger = TensorBoard(folder=tmp_path / "curves", run="a")
    learner_of(folder=tmp_path / "one", callbacks=[logger]).fit(toy_stream())
    with pytest.raises(RunError, match=r"differs in iterations .given 3, stored 4.; give the log"):
        learner_of(folder=tmp_path / "two", iterations=3, callbacks=[logger]).fit(toy_stream())


def test_a_damaged_record_of_a_run_is_refused(learner_of, toy_stream, tmp_path):
    (tmp_path / "perdure").mkdir()
    (tmp_path / "perdure" / "a.tensorboard.json").write_text("{")
    with pytest.raises(RunError, match=r"a\.tensorboard\.json cannot be read"):
        learner_of(callbacks=[TensorBoard(folder=tmp_path, run="a")]).fit(toy_stream())


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every = 0 is not allowed; allowed: a whole number, 1 or more"),
        ({"run": "a/b"}, "run = 'a/b' is not allowed; allowed: letters"),
        ({"project": ".."}, "project = '..' is not allowed; allowed: letters"),
        ({"folder": 3}, "tensorboard.folder = 3 is not allowed; allowed: a path or text or None"),
    ],
)
def test_a_logger_refuses_a_setting(options, message):
    with pytest.raises(ConfigError) as error:
        TensorBoard(**options)
    assert str(error.value).startswith(message)


def test_a_logger_needs_a_folder(learner_of, toy_stream):
    with pytest.raises(ConfigError, match="folder = None is not allowed; allowed: a path"):
        learner_of(callbacks=[TensorBoard()]).fit(toy_stream())


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_package_is_named_in_one_line(
    learner_of, toy_stream, tmp_path, monkeypatch, name
):
    for module in [key for key in sys.modules if key.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError) as error:
        learner_of(callbacks=[find(name)(folder=tmp_path)]).fit(toy_stream())
    message = str(error.value)
    assert message.startswith(f"the logger {name} needs the package {name}")
    assert message.endswith(f"; pip install 'perdure[{name}]'")


def test_loggers_are_found_by_name():
    assert names() == ("mlflow", "tensorboard", "wandb")
    assert [find(name) for name in names()] == [MLflow, TensorBoard, WandB]


# ------------------------------------------------------------------ the heavy packages


def stopped_and_resumed(logger, learner_of, stream, folder):
    for callbacks in ([logger, stop], [logger]):
        try:
            learner_of(callbacks=callbacks, folder=folder / "run", blocks=2).fit(stream)
        except StoppedError:
            assert len(callbacks) == 2


@pytest.mark.deep(reason="deployment: MLflow lays out its whole database")
def test_mlflow_reads_curves_that_a_stop_did_not_repeat(learner_of, toy_stream, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MLflow about the packages that it uses
        logger = MLflow(folder=tmp_path, project="toys", run="a", every=2)
        stopped_and_resumed(logger, learner_of, toy_stream(), tmp_path)
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
        (run,) = client.search_runs([client.get_experiment_by_name("toys").experiment_id])
        curves = {
            name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics
        }
    checked(curves)
    assert not any(isnan(value) for curve in curves.values() for _, value in curve)
    assert (run.info.run_name, run.info.status) == ("a", "FINISHED")
    assert run.data.params["strategy"] == "Naive()"


@pytest.mark.deep(reason="deployment: starts the service of Weights & Biases")
def test_wandb_has_curves_that_a_stop_did_not_repeat(learner_of, toy_stream, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the package about those that it uses
        logger = WandB(folder=tmp_path, run="a", every=2)
        stopped_and_resumed(logger, learner_of, toy_stream(), tmp_path)
    curves, keys = wandb_curves(tmp_path)
    checked(curves)
    assert len(keys) == 1
