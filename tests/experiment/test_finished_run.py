"""A finished run is compared, read as a table, loaded, and asked for predictions."""

import sys
import warnings

import numpy as np
import pytest
import torch

import perdure
from perdure.errors import ConfigError, PrivacyError, RunError
from perdure.experiment import compare, parse, read_result, run, to_pandas

with warnings.catch_warnings():
    # typer takes names from click that click is about to move
    warnings.filterwarnings("ignore", message="'click", category=DeprecationWarning)
    from perdure.cli import main as cli

CONFIG = """
name = "small"
seeds = [3, 5]
[data]
experiences = 2
[model]
hidden = [4]
[training]
optimizer = "SGD"
learning_rate = 0.1
iterations = 2
[private_training]
optimizer = "SGD"
iterations = 1
[privacy]
noise_multiplier = 1.0
delta = 0.0005
sampling_rate = 0.1
seed = 0
[[arms]]
strategy = "icarl"
memory_size = 20
[[arms]]
strategy = "naive"
private = true
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    run(parse(CONFIG), CONFIG, folder)
    return folder


@pytest.fixture(scope="module")
def icarl(folder):
    return perdure.load(str(folder), "icarl-plain", seed=5)


@pytest.fixture
def predict(monkeypatch, capfd, tmp_path, folder):
    """Call `perdure predict` with inputs in a file: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)

    def call(inputs, *words):
        np.save("inputs.npy", inputs)
        files = ["--input", "inputs.npy", "--output", "answer.npy"]
        monkeypatch.setattr(sys, "argv", ["perdure", "predict", str(folder), *words, *files])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capfd.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return call


def trial(folder, arm, seed):
    [found] = [a for a in read_result(folder)["arms"] if a["name"] == arm]
    [row] = [row for row in found["seeds"] if row["seed"] == seed]
    return row


def test_compare_reads_the_accuracies_that_a_run_stored(folder):
    found = compare(folder)
    assert set(found.arms) == {"icarl-plain", "naive-private"}
    for seed, value in found.values("average_accuracy")["icarl-plain"].items():
        assert value == trial(folder, "icarl-plain", seed)["average_accuracy"]
    assert found.values("epsilon")["naive-private"].keys() == {3, 5}
    [difference] = found.differences("forgetting")
    assert difference.estimate.low < difference.estimate.mean < difference.estimate.high


def test_to_pandas_gives_one_row_per_arm_and_seed(folder):
    table = to_pandas(read_result(folder)).set_index(["arm", "seed"])
    assert len(table) == 4
    row = trial(folder, "icarl-plain", 5)
    assert table.loc[("icarl-plain", 5), "forgetting"] == row["forgetting"]
    assert table["epsilon"].isna().sum() == 2


def test_a_result_has_the_accuracy_of_each_class(folder, icarl):
    row = trial(folder, "icarl-plain", 5)
    counts = icarl.stream[0].test.labels.bincount()
    for accuracy, measured in zip(row["accuracy_matrix"][-1], row["by_class"], strict=True):
        confusion = measured["confusion"]
        right = sum(each.get(label, 0) for label, each in confusion.items())
        total = sum(sum(each.values()) for each in confusion.values())
        assert 100 * right / total == pytest.approx(accuracy)
    first = row["by_class"][0]["confusion"]
    assert {int(c): sum(each.values()) for c, each in first.items()} == dict(
        enumerate(counts.tolist())
    )


def test_a_loaded_model_has_the_scores_that_its_run_stored(folder, icarl):
    found = [icarl.score(e.test) for e in icarl.stream]
    assert found == pytest.approx(trial(folder, "icarl-plain", 5)["accuracy_matrix"][-1])


def test_a_loaded_private_model_refuses_its_training_records(folder):
    learner = perdure.load(folder, "naive-private-seed-3")
    assert 0 <= learner.score(learner.stream[1].test) <= 100
    with pytest.raises(PrivacyError, match="training records of a model with privacy"):
        learner.score(learner.stream[1].train)


@pytest.mark.parametrize(
    ("arm", "seed", "message"),
    [
        (None, None, "has 4 models; give one of icarl-plain-seed-3, naive-"),
        ("naive-private", None, "has 2 models for arm 'naive-private'; give one of naive-private-"),
        ("ewc-plain", 3, "has no arm 'ewc-plain' with seed 3; give one of icarl-plain-seed-3"),
        ("naive-private", 4, "has no arm 'naive-private' with seed 4"),
    ],
)
def test_load_refuses_an_unclear_arm_and_names_all_models(folder, arm, seed, message):
    with pytest.raises(RunError, match=message):
        perdure.load(folder, arm, seed=seed)


def test_the_predict_command_writes_the_predicted_classes(predict, icarl, tmp_path):
    inputs = icarl.stream[0].test.inputs
    code, out, err = predict(inputs.double().numpy(), "icarl-plain", "--seed", "5")
    assert (code, err) == (0, "")
    assert out == f"written: answer.npy, {len(inputs)} predictions\n"
    found = torch.from_numpy(np.load(tmp_path / "answer.npy"))
    features = torch.nn.functional.normalize(icarl.model.features(inputs), dim=1)
    assert torch.equal(found, torch.cdist(features, icarl.state["means"]).argmin(1))
    assert predict(inputs.numpy(), "icarl-plain-seed-5", "--outputs")[0] == 0
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "answer.npy")), icarl.predict(inputs))


@pytest.mark.parametrize(
    ("inputs", "words", "message"),
    [
        (np.zeros((2, 8, 8), dtype=np.uint8), [], "torch.uint8"),
        (np.zeros((2, 3), dtype=np.float32), [], "shape (n, "),
        (np.array(["a"]), [], "inputs.npy has no array of numbers"),
        (np.full((1, 1, 8, 8), np.nan), [], "NaN or infinite for 1 of 1 records"),
        (np.zeros((1, 1, 8, 8)), ["--experience", "0"], "experience = 0 is not allowed"),
    ],
)
def test_the_predict_command_refuses_invalid_inputs_in_one_line(
    predict, tmp_path, inputs, words, message
):
    code, out, err = predict(inputs, "icarl-plain", "--seed", "5", *words)
    assert (code, out) == (2, "")
    assert err.startswith("perdure: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "answer.npy").exists()


def test_predict_refuses_nan_or_infinite_outputs(icarl):
    bad = torch.full_like(icarl.stream[0].test.inputs[:2], torch.inf)
    with pytest.raises(ConfigError, match="NaN or infinite for 2 of 2 records"):
        icarl.predict(bad)
