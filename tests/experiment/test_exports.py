"""Exports of a finished run: the arm's predictor, its metrics and its statement."""

import json
import sys
import warnings

import pytest
import torch
from safetensors.torch import save_file

from perdure.errors import ConfigError, PrivacyError, RunError
from perdure.experiment import export_run, load, parse, run

with warnings.catch_warnings():
    # typer takes names from click that click is about to move
    warnings.filterwarnings("ignore", message="'click", category=DeprecationWarning)
    from perdure.cli import main as cli

CONFIG = """
name = "small"
[data]
name = "breast-cancer"
experiences = 2
[model]
hidden = [6]
[training]
optimizer = "SGD"
learning_rate = 0.1
iterations = 2
[privacy]
noise_multiplier = 2.0
delta = 1e-4
sampling_rate = 0.1
seed = 0
[[arms]]
strategy = "ncm"
[[arms]]
strategy = "naive"
private = true
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    run(parse(CONFIG), CONFIG, folder)
    return folder


def test_an_exported_arm_has_the_metrics_of_the_run(finished):
    done = export_run(finished, "ncm-plain", to="safetensors")
    row = json.loads((finished / "arms" / "ncm-plain" / "arm.json").read_text())
    assert done.folder == finished / "exports" / "ncm-plain-safetensors"
    assert done.card.metrics["matrix"] == row["accuracy_matrix"]
    assert list(done.card.metrics["artifact_by_experience"]) == row["accuracy_matrix"][-1]
    assert done.card.title == "small, ncm-plain" and not done.card.privacy["private"]


def test_a_private_arm_is_exported_with_its_statement(finished, monkeypatch, capfd, tmp_path):
    row = json.loads((finished / "arms" / "naive-private" / "arm.json").read_text())
    words = ["export", finished, "naive-private", "--to", "safetensors", "--output", tmp_path]
    monkeypatch.setattr(sys, "argv", ["perdure", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert "as trained: accuracy in %" in capfd.readouterr().out
    card = json.loads((tmp_path / "model_card.json").read_text())
    assert card["privacy"]["text"] == row["epsilon"]["text"]
    assert card["privacy"]["simulated"] and "simulation" in (tmp_path / "model_card.md").read_text()


def test_a_student_of_a_private_arm_needs_public_inputs(finished, tmp_path):
    options = {"to": "safetensors", "student": "hidden = [3]"}
    with pytest.raises(PrivacyError, match="--public-inputs"):
        export_run(finished, "naive-private", tmp_path, **options)
    public = tmp_path / "public.safetensors"
    save_file({"inputs": torch.rand(40, *load(finished, "ncm-plain").stream.input_shape)}, public)
    done = export_run(finished, "naive-private", tmp_path, public_inputs=public, **options)
    assert done.card.model["parameters"] < 30 * 6


@pytest.mark.parametrize(
    ("arm", "options", "error", "message"),
    [
        ("lwf-plain", {}, RunError, "has no arm 'lwf-plain'; give one of ncm-plain"),
        ("ncm-plain", {"student": "hidden = ["}, ConfigError, r"student = 'hidden = \['"),
        ("ncm-plain", {"student": "wide = 3"}, ConfigError, "student.wide = 3"),
        (
            "ncm-plain",
            {"public_inputs": "x"},
            ConfigError,
            "public_inputs = 'x'.* together with a student",
        ),
    ],
)
def test_export_of_a_run_refuses_invalid_arguments(finished, arm, options, error, message):
    with pytest.raises(error, match=message):
        export_run(finished, arm, to="safetensors", **options)


def test_a_private_arm_without_its_ledger_is_refused(finished, tmp_path):
    ledger = finished / "arms" / "naive-private" / "ledger.jsonl"
    kept = ledger.rename(tmp_path / "kept.jsonl")
    try:
        with pytest.raises((RunError, PrivacyError), match="ledger"):
            export_run(finished, "naive-private", tmp_path / "out", to="safetensors")
    finally:
        kept.rename(ledger)
