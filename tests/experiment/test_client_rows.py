"""Clients of a federated run: metrics, result, loggers, terminal and page."""

import json

import pytest

import perdure.federated  # noqa: F401 - first, because it knows which warnings to let pass
from perdure.errors import RunError
from perdure.experiment.config import parse
from perdure.experiment.result_schema import checked
from perdure.experiment.run import run
from perdure.report.clients import client_lines, clients_section

CONFIG = """
name = "clients"
[data]
experiences = 2
[model]
hidden = [4]
[training]
optimizer = "SGD"
learning_rate = 0.1
epochs = 1
batch_size = 256
[federation]
clients = 3
rounds = 2
[[arms]]
strategy = "naive"
"""
PRIVATE = """
private = true
[privacy]
epsilon = 8.0
seed = 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clients")


@pytest.fixture(scope="module")
def result(folder):
    return run(parse(CONFIG), CONFIG, folder)


def test_clients_are_in_the_metrics_and_the_result(result, folder):
    lines = list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))
    assert [[row["accepted"] for row in line["clients"]] for line in lines] == [[3] * 3, [6] * 3]
    assert all("seconds" not in row for line in lines for row in line["clients"])
    (trial,) = result["arms"][0]["seeds"]
    untimed = [
        {name: value for name, value in row.items() if name != "seconds"}
        for row in trial["clients"]
    ]
    assert untimed == lines[-1]["clients"]
    assert trial["accuracy_over_clients"] == lines[-1]["accuracy_over_clients"]
    assert trial["accuracy_over_clients"]["mean"] == pytest.approx(trial["average_accuracy"])
    assert all(row["seconds"] > 0 for row in trial["clients"])
    assert not any("robust_accuracy" in row for row in trial["clients"])


def test_the_report_shows_the_clients(result):
    (line,) = client_lines(result)
    over = result["arms"][0]["seeds"][0]["accuracy_over_clients"]
    assert f"over 3 clients: mean {over['mean']:.2f}%, worst {over['worst']:.2f}%" in line
    assert clients_section(result).count("<td>6 of 6</td>") == 3


def test_accuracy_under_attack_of_each_client_is_in_the_result(tmp_path):
    text = CONFIG + '[attack]\nname = "fgsm"\nepsilon = 0.1\n'
    result = run(parse(text), text, tmp_path)
    (trial,) = result["arms"][0]["seeds"]
    over = trial["robust_accuracy_over_clients"]
    assert over["mean"] == pytest.approx(trial["robust_accuracy"])
    assert over["mean"] == pytest.approx(sum(r["robust_accuracy"] for r in trial["clients"]) / 3)
    assert over["mean"] < trial["accuracy_over_clients"]["mean"]
    lines = list(map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()))
    assert lines[-1]["robust_accuracy_over_clients"] == over
    assert f"under attack: mean {over['mean']:.2f}%, worst" in client_lines(result)[0]
    assert "accuracy under attack (%)" in clients_section(result)


def test_a_result_with_a_damaged_row_of_a_client_is_refused(result):
    damaged = json.loads(json.dumps(result))
    del damaged["arms"][0]["seeds"][0]["clients"][1]["accepted"]
    with pytest.raises(RunError, match=r"seeds\[0\].clients has no accepted"):
        checked(damaged)


def test_seconds_of_private_clients_are_left_out(tmp_path):
    text = CONFIG + PRIVATE
    result = run(parse(text), text, tmp_path)
    (trial,) = result["arms"][0]["seeds"]
    assert result["arms"][0]["private"]
    assert [row["seconds"] for row in trial["clients"]] == [None] * 3
    assert "<td></td>" in clients_section(result)
