"""Drift of reasons over time: matrices in result, log and report, beside the accuracy matrix."""

import json

import pytest
import torch
from safetensors.torch import load_file

from perdure.errors import ConfigError
from perdure.experiment import parse, run
from perdure.experiment.run import load
from perdure.explain import Attribution, KernelSHAP, grid_groups, rank_correlation
from perdure.report import write_report
from perdure.utils.seeding import generator

TEXT = """
name = "explained"
seeds = [0, 1]
[data]
name = "digits"
experiences = 5
[model]
hidden = [16]
[training]
iterations = 6
[explain]
method = "kernel_shap"
samples = 40
cells = 4
records = 4
drift = true
[[arms]]
strategy = "naive"
"""


@pytest.fixture(scope="module")
def explained(tmp_path_factory):
    """Return the result and the folder of a finished run."""
    folder = tmp_path_factory.mktemp("explained")
    return run(parse(TEXT), TEXT, folder), folder


def test_the_reason_matrix_begins_at_1_and_drifts(explained):
    result, _ = explained
    [arm] = result["arms"]
    for each in (arm, *arm["seeds"]):
        for name in ("reason_matrix", "reason_overlap_matrix"):
            matrix = each[name]
            assert [matrix[i][i] for i in range(5)] == [1.0] * 5
            later = [matrix[i][j] for i in range(5) for j in range(i)]
            assert all(-1 <= value <= 1 for value in later) and min(later) < 0.99
            assert all(value is None or value != value for value in matrix[0][1:])
        assert each["reason_correlation"] == pytest.approx(sum(each["reason_matrix"][4][:4]) / 4)
    assert arm["standard_error"]["reason_correlation"] > 0


def test_the_last_reasons_equal_an_explanation_of_the_model(explained):
    result, folder = explained
    learner = load(folder, "naive-plain-seed-1")
    test = learner.stream[0].test
    probes = test.take(torch.arange(4) * len(test) // 4)
    found = KernelSHAP(samples=40, cells=4).explain(
        learner.predictor(0, after=4),
        probes.inputs,
        torch.zeros_like(probes.inputs[:1]),
        targets=probes.labels,
        generator=generator(1, "reasons", 0),
    )
    groups = grid_groups(probes.inputs.shape[1:], 4)
    stored = load_file(folder / "arms" / "naive-plain-seed-1" / "reasons-0.safetensors")["values"]
    pair = [
        Attribution(values=values, base=found.base, targets=found.targets)
        for values in (found.by_group(groups), stored)
    ]
    matrix = result["arms"][0]["seeds"][1]["reason_matrix"]
    assert float(rank_correlation(*pair).mean()) == pytest.approx(matrix[4][0], abs=1e-6)


def test_the_log_and_the_report_have_the_reasons(explained):
    result, folder = explained
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [row["reasons"]["correlation"] for row in rows if row["seed"] == 0]
    matrix = result["arms"][0]["seeds"][0]["reason_matrix"]
    assert found == [line[: i + 1] for i, line in enumerate(matrix)]
    page = write_report(folder).read_text()
    assert "Reasons kept and lost over time" in page
    assert "Explanations before and after" in page


def test_without_drift_the_measures_of_reasons_are_null(tmp_path):
    text = TEXT.replace("drift = true", "").replace("seeds = [0, 1]", "")
    [arm] = run(parse(text), text, tmp_path)["arms"]
    assert arm["reason_matrix"] is None and arm["reason_correlation"] is None


def test_tables_have_a_drift_of_reasons_but_no_pictures(tmp_path):
    text = TEXT.replace('"digits"', '"breast_cancer"').replace("cells = 4", "")
    text = text.replace("experiences = 5", "experiences = 1").replace("40", "80")
    with pytest.raises(ConfigError, match=r"drift = true, or no \[explain\] table"):
        run(parse(text.replace("drift = true", "")), text, tmp_path / "pictures")
    result = run(parse(text), text, tmp_path / "drift")
    [arm] = result["arms"]
    assert arm["reason_matrix"] == [[1.0]] and arm["reason_correlation"] is None
    assert result["explanations"] is None and write_report(tmp_path / "drift").exists()


def test_kept_tokens_have_no_part_in_the_reasons(tmp_path):
    """Every text begins with the token 1; see `helpers.own_data.moods`."""
    changes = {
        '"digits"': '"helpers.own_data:moods"',
        "experiences = 5": "experiences = 2",
        "hidden = [16]": 'name = "lstm"\nvocabulary = 9\nhidden = 4\nembedding = 4',
        "cells = 4": "baseline = 8\nkept = [1]",
        "seeds = [0, 1]": "",
    }
    text = TEXT
    for old, new in changes.items():
        text = text.replace(old, new)
    [arm] = run(parse(text), text, tmp_path)["arms"]
    assert arm["reason_matrix"][0][0] == 1.0 and -1 <= arm["reason_matrix"][1][0] <= 1
    [stored] = tmp_path.glob("arms/*/reasons-0.safetensors")
    values = load_file(stored)["values"]
    assert values.shape == (4, 5)
    assert (values[:, 0] == 0).all() and values[:, 1:].abs().max() > 0
