"""Loggers of a configured run: one run for each training, and the epsilon of clients."""

import pytest

from helpers.logged_runs import tensorboard_curves
from perdure.errors import RunError
from perdure.experiment.config import parse
from perdure.experiment.run import keep_config, run

LOGGED = """
name = "small"
[data]
experiences = 2
[model]
hidden = [4]
[training]
optimizer = "SGD"
learning_rate = 0.1
iterations = 2
[[loggers]]
name = "tensorboard"
every = 1
[[arms]]
strategy = "naive"
"""
OF_CLIENTS = """
[[arms]]
strategy = "naive"
private = true
[privacy]
noise_multiplier = 1.0
sampling_rate = 0.01
seed = 3
[federation]
clients = 2
rounds = 1
"""


def test_each_training_of_a_run_has_a_run_of_its_loggers(tmp_path):
    text = LOGGED.replace("[data]", "seeds = [0, 1]\n[data]")
    run(parse(text), text, tmp_path)
    for trial in ("naive-plain-seed-0", "naive-plain-seed-1"):
        curves = tensorboard_curves(tmp_path / "loggers" / "small" / trial)
        assert [step for step, _ in curves["loss"]] == [1, 2, 3, 4]
        assert [step for step, _ in curves["average_accuracy"]] == [2, 4]


def test_a_federated_run_logs_the_epsilon_of_its_clients(tmp_path):
    text = LOGGED + OF_CLIENTS
    private = run(parse(text), text, tmp_path)["arms"][1]
    curves = tensorboard_curves(tmp_path / "loggers" / "small" / private["name"])
    logged = [value for _, value in curves["simulated/epsilon"]]
    assert logged == pytest.approx(private["epsilon_over_time"])
    assert len(curves["average_accuracy"]) == 2 and "loss" not in curves


def test_a_stopped_run_continues_with_other_loggers(tmp_path):
    (tmp_path / "arms").mkdir()
    (tmp_path / "config.toml").write_text(LOGGED)
    keep_config(tmp_path, parse(LOGGED.replace("every = 1", "every = 2")), LOGGED + "#")
    with pytest.raises(RunError, match=r"differs in config\.training\.iterations"):
        keep_config(tmp_path, parse(LOGGED.replace("iterations = 2", "iterations = 3")), "")
