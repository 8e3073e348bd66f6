"""Runs on inputs of other kinds, with attack, adversary and explainer chosen by name."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from helpers.small_runs import EXPLAIN, SMALL, ran
from perdure.adversarial import FGSM
from perdure.errors import ConfigError
from perdure.experiment.arm import ArmRun, open_stream
from perdure.experiment.config import parse
from perdure.experiment.metrics_log import MetricsLog
from perdure.report import write_report


def breast(explained):
    text = SMALL.replace("[data]\n", '[data]\nname = "breast-cancer"\n')
    text = text if explained else text.replace(EXPLAIN, "")
    return text.split('[[arms]]\nstrategy = "ewc"')[0]


def test_explanations_of_inputs_that_are_not_images_are_refused(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"explain.method = 'kernel_shap' is not allowed; allowed: drift = true, or no "
        r"\[explain\] table, because inputs of shape \(30,\) are not images",
    ):
        ran(tmp_path, breast(explained=True))


def test_inputs_without_a_range_are_attacked_without_bounds(tmp_path):
    config = parse(breast(explained=False))
    assert config.attack.on(open_stream(config)).bounds is None
    assert config.attack.on(open_stream(parse(SMALL))).bounds == (0.0, 1.0)
    result, _ = ran(tmp_path, breast(explained=False))
    arm = result["arms"][0]
    assert 0 <= arm["robust_accuracy"] <= arm["average_accuracy"]
    assert Path(write_report(tmp_path)).exists()


def test_attack_bounds_in_a_config_are_kept():
    text = SMALL.replace("epsilon = 0.1", "epsilon = 0.1\nbounds = [-1, 2.5]")
    assert parse(text).attack.on(open_stream(parse(text))).bounds == (-1.0, 2.5)


OTHERS = """
name = "others"
[data]
experiences = 2
[model]
hidden = [6]
[training]
optimizer = "SGD"
learning_rate = 0.1
epochs = 1
[training.adversary]
name = "perdure.adversarial.fgsm:FGSM"
epsilon = 0.1
[attack]
name = "fgsm"
epsilon = 0.1
[explain]
method = "lime"
samples = 130
records = 2
[[arms]]
strategy = "perdure.strategies.naive:Naive"
"""


def test_adversary_attack_and_explainer_are_chosen_by_name(tmp_path):
    config = parse(OTHERS)
    [arm] = config.arms
    log = MetricsLog(tmp_path / "unused.jsonl")
    learner = ArmRun(config, arm, open_stream(config), tmp_path / "unused", log).learner(
        open_stream(config)
    )
    assert learner.adversary == FGSM(epsilon=0.1, bounds=(0.0, 1.0))
    result, _ = ran(tmp_path / "run", OTHERS)
    name = "perdure.strategies.naive.Naive-plain"
    assert (tmp_path / "run" / "checkpoint" / name / "model.safetensors").exists()
    assert result["attack"] == {
        "name": "fgsm",
        "epsilon": 0.1,
        "norm": "linf",
        "objectives": ["rescaled_cross_entropy", "margin"],
    }
    assert result["arms"][0]["strategy"] == "perdure.strategies.naive:Naive"
    assert result["explanations"]["method"] == "lime"
    values = load_file(tmp_path / "run" / "explanations.safetensors")["values"]
    assert values.shape == (2, 2, 1, 8, 8)
    page = Path(write_report(tmp_path / "run")).read_text(encoding="utf-8")
    assert "local linear models (LIME)" in page
    assert "fgsm, L∞ 0.1" in page or "fgsm,<br>L∞ 0.1" in page


def test_training_with_an_adversary_changes_the_accuracies(tmp_path):
    plain = OTHERS.replace(
        '[training.adversary]\nname = "perdure.adversarial.fgsm:FGSM"\nepsilon = 0.1\n', ""
    ).replace('[explain]\nmethod = "lime"\nsamples = 130\nrecords = 2\n', "")
    hardened = plain.replace(
        "epochs = 1\n", 'epochs = 1\n[training.adversary]\nname = "fgsm"\nepsilon = 0.3\n'
    )
    results = [
        ran(tmp_path / name, text)[0]["arms"][0] for name, text in (("a", plain), ("b", hardened))
    ]
    assert results[0]["accuracy_matrix"] != results[1]["accuracy_matrix"]
    assert "explanations.safetensors" not in {path.name for path in (tmp_path / "a").iterdir()}
