"""Robust accuracy over time: the twin of the accuracy matrix in result, log and report."""

import json

import pytest

from perdure.errors import ConfigError
from perdure.experiment import parse, run
from perdure.report import write_report

TEXT = """
name = "attacked"
seeds = [0, 1]
[data]
name = "digits"
experiences = 5
[model]
hidden = [16]
[training]
iterations = 25
[attack]
name = "pgd"
epsilon = 0.05
steps = 3
[[arms]]
strategy = "naive"
"""


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """Return the result and the folder of a finished run."""
    folder = tmp_path_factory.mktemp("attacked")
    return run(parse(TEXT), TEXT, folder), folder


def test_the_robust_matrix_lies_below_the_accuracy_matrix(attacked):
    result, _ = attacked
    [arm] = result["arms"]
    for each in (arm, *arm["seeds"]):
        robust = each["robust_matrix"]
        for i, (row, plain) in enumerate(zip(robust, each["accuracy_matrix"], strict=True)):
            assert all(0 <= row[j] <= plain[j] + 1e-9 for j in range(i + 1))
            assert all(value is None or value != value for value in row[i + 1 :])
        assert robust[0][0] > 0
    for each in arm["seeds"]:
        robust = each["robust_matrix"]
        assert each["robust_accuracy"] == pytest.approx(sum(robust[-1]) / 5)
        changes = [robust[4][j] - robust[j][j] for j in range(4)]
        assert each["robust_backward_transfer"] == pytest.approx(sum(changes) / 4)
    assert arm["robust_forgetting"] > 0
    assert arm["standard_error"]["robust_forgetting"] >= 0


def test_the_monitor_takes_the_accuracies_of_the_attack(attacked):
    result, folder = attacked
    [arm] = result["arms"]
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[4])["robustness"]
    found = [each for each in arm["seeds"][0]["findings"] if each["rule"] == "fragile to attacks"]
    shares = [sum(last["robust"]) / sum(last["clean"])]
    assert [each["measured"] for each in found] == pytest.approx(
        [share for share in shares if share < 0.7]
    )


def test_the_log_and_the_report_have_the_robust_rows(attacked):
    result, folder = attacked
    [arm] = result["arms"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first = [row["robustness"] for row in rows if row["seed"] == 0]
    robust = arm["seeds"][0]["robust_matrix"]
    assert [row["robust"] for row in first] == [line[: i + 1] for i, line in enumerate(robust)]
    assert all(
        low <= high for row in first for low, high in zip(row["robust"], row["clean"], strict=True)
    )
    page = write_report(folder).read_text()
    assert "Robustness kept and lost over time" in page
    assert "rescaled_cross_entropy and margin" in page
    assert "test records without a gradient" in page


CERTIFIED = """
name = "certified"
[data]
name = "digits"
experiences = 2
[model]
hidden = [16]
[training]
iterations = 60
learning_rate = 0.01
defence = {name = "interval_bounds", epsilon = 0.03}
[attack]
name = "pgd"
epsilon = 0.03
steps = 5
[certificate]
method = "interval_bounds"
epsilon = 0.03
records = 10000
[[arms]]
strategy = "naive"
"""


def test_the_certified_matrix_lies_below_the_robust_matrix(tmp_path):
    result = run(parse(CERTIFIED), CERTIFIED, tmp_path)
    [arm] = result["arms"]
    certified = arm["certified_matrix"]
    assert certified[0][0] > 20 and certified[0][1] is None
    for i, (row, robust) in enumerate(zip(certified, arm["robust_matrix"], strict=True)):
        assert all(row[j] <= robust[j] + 1e-9 for j in range(i + 1))
    assert arm["certified_accuracy"] == pytest.approx(sum(certified[1]) / 2)
    assert arm["certified_forgetting"] == pytest.approx(certified[0][0] - certified[1][0])
    page = write_report(tmp_path).read_text()
    assert "Certified accuracy kept and lost over time" in page
    assert "certified accuracy<small>%, interval bounds,<br>L∞ 0.03" in page
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["certified"] == certified[1]


def test_interval_training_is_refused_for_private_arms():
    text = CERTIFIED.replace("[attack]", "[privacy]\nepsilon = 3.0\n[attack]") + "private = true\n"
    with pytest.raises(ConfigError, match=r"training\.defence.*norm of a record's gradient"):
        parse(text)


@pytest.mark.parametrize(
    ("table", "setting", "told"),
    [
        ("attack", "epsilon = [0.1, 0.2]", "length of epsilon = 2 .* 64, one number per feature"),
        ("attack", "bounds = [[0.0], [0.5, 1.0]]", "length of bounds = 1 .* 64, one number per"),
        ("certificate", "bounds = [[0.0, 0.0], 1.0]", "length of bounds = 2 .* 64, one number per"),
        ("certificate", "bounds = [0.0, 0.5]", r"all inputs \(0 to 1\)"),
    ],
)
def test_bounds_that_do_not_fit_are_refused_before_training(tmp_path, table, setting, told):
    text = CERTIFIED.replace(f"[{table}]\n", f"[{table}]\n{setting}\n")
    if setting.startswith("epsilon"):
        text = text.replace("epsilon = 0.03\nsteps", "steps")
    with pytest.raises(ConfigError, match=told):
        run(parse(text), text, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
