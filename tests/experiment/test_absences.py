"""Clients that did not take part in a federated run: rows, result, terminal and page."""

import json

import pytest

import perdure.federated  # noqa: F401 - first, because it knows which warnings to let pass
from perdure.errors import RunError
from perdure.experiment.arm import ArmRun, open_stream
from perdure.experiment.config import parse
from perdure.experiment.metrics_log import MetricsLog
from perdure.experiment.run import run
from perdure.report.absences import absence_lines, absences_section

CONFIG = """
name = "absent"
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
rounds = 1
[[arms]]
strategy = "naive"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("absent")


@pytest.fixture(scope="module")
def row(folder):
    """Return the row of an arm whose client 1 fails in every round of the second experience."""

    def failing(point, learner):
        if point == "block.begin" and learner.client == 1 and learner.position.experience == 1:
            raise RunError("the disk of this client is full")

    config = parse(CONFIG)
    log = MetricsLog(folder / "metrics.jsonl")
    arm = ArmRun(config, config.arms[0], open_stream(config), folder, log, callbacks=[failing])
    return arm.run()


def test_a_missing_client_is_in_the_metrics_and_the_result(row, folder):
    lines = list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))
    absent = {"experience": 1, "round": 0, "client": 1, "cause": "failed", "field": ""}
    assert [line.get("absences") for line in lines] == [None, [absent]]
    assert row["absences"] == [absent]
    assert row["failure"] is None


def test_the_report_lists_missing_clients(row, tmp_path):
    result = run(parse(CONFIG), CONFIG, tmp_path)
    assert absence_lines(result) == [] and absences_section(result) == ""
    result["arms"][0]["seeds"][0]["absences"] = row["absences"] * 2
    assert absence_lines(result) == ["naive-plain: replies are missing: client 1 failed 2x"]
    assert "<td>2</td><td>1</td><td>1</td><td>failed</td>" in absences_section(result)
