"""Runs of several seeds and arms: means, trainings that diverged, and runs that were stopped."""

import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import own_data
from perdure.errors import RunError
from perdure.experiment.config import parse
from perdure.experiment.overrides import overridden
from perdure.experiment.run import load, run, untimed
from perdure.report.sections import answer, arms_table
from perdure.report.statement import statement

HEAD = """
name = "seeds"
seeds = [3, 1]
[data]
name = "helpers.own_data:blobs"
experiences = 2
[model]
hidden = [4]
[training]
optimizer = "SGD"
learning_rate = 0.1
iterations = 4
batch_size = 12
blocks = 2
"""
PRIVACY = """
[privacy]
noise_multiplier = 2.0
delta = 0.001
sampling_rate = 0.5
seed = 0
"""
ARMS = """
[[arms]]
strategy = "naive"
[[arms]]
name = "wild"
strategy = "ewc"
strength = 1e30
[[arms]]
name = "both"
strategy = "combine"
parts = [{strategy = "si", strength = 0.1}, {strategy = "replay", memory_size = 8}]
"""
PRIVATE_ARM = '[[arms]]\nstrategy = "replay"\nmemory_size = 8\nprivate = true\n'
TEXT = HEAD + PRIVACY + ARMS + PRIVATE_ARM
TRIALS = [f"{arm}-seed-{s}" for s in (3, 1) for arm in ("naive-plain", "wild", "both")]


def files(folder):
    """What a run leaves that must not depend on stops."""
    result = untimed(json.loads((folder / "result.json").read_text()))
    names = [*folder.glob("checkpoint/*/*"), folder / "metrics.jsonl"]
    return result, {path.relative_to(folder): path.read_bytes() for path in sorted(names)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder and result of a run."""
    folder = tmp_path_factory.mktemp("seeds") / "run"
    return folder, run(parse(TEXT), TEXT, folder)


def test_each_arm_has_a_row_for_every_seed(finished):
    folder, result = finished
    assert result["seeds"] == [3, 1]
    assert [arm["name"] for arm in result["arms"]] == [
        "naive-plain",
        "wild",
        "both",
        "replay-private",
    ]
    for arm in result["arms"]:
        assert [(row["seed"], row["trial"]) for row in arm["seeds"]] == [
            (seed, f"{arm['name']}-seed-{seed}") for seed in (3, 1)
        ]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {(row["arm"], row["seed"]) for row in lines} >= {("both", 3), ("both", 1)}


def test_numbers_of_an_arm_are_means_over_its_seeds(finished):
    for arm in finished[1]["arms"]:
        if arm["failures"]:
            continue
        values = [row["forgetting"] for row in arm["seeds"]]
        assert arm["forgetting"] == pytest.approx(statistics.mean(values))
        expected = statistics.stdev(values) / math.sqrt(2)
        assert arm["standard_error"]["forgetting"] == pytest.approx(expected)
        last = [row["accuracy_matrix"][1][0] for row in arm["seeds"]]
        assert arm["accuracy_matrix"][1][0] == pytest.approx(sum(last) / 2)


def test_a_seed_among_several_equals_a_run_with_that_seed_alone(finished, tmp_path):
    text = (HEAD + ARMS.split('[[arms]]\nname = "wild"')[0]).replace("seeds = [3, 1]", "seed = 1")
    alone = run(parse(text), text, tmp_path)["arms"][0]
    assert alone["seeds"][0]["trial"] == "naive-plain"
    row = finished[1]["arms"][0]["seeds"][1]
    same = {"accuracy_matrix", "average_accuracy", "forgetting", "calibration_error"}
    assert {name: alone[name] for name in same} == {name: row[name] for name in same}
    assert alone["standard_error"]["forgetting"] is None


def test_a_training_that_diverges_is_reported_and_others_run(finished):
    folder, result = finished
    wild = result["arms"][1]
    assert [each["trial"] for each in wild["failures"]] == ["wild-seed-3", "wild-seed-1"]
    # other processors round to infinity one step later
    reason = wild["failures"][0]["failure"]
    assert re.search(r"the loss is NaN or infinite in step \d of experience 1", reason)
    assert wild["average_accuracy"] is None and wild["accuracy_matrix"] == []
    assert result["arms"][2]["average_accuracy"] > 0
    assert "wild-seed-3: EWC: " in answer(result)
    assert "wild (diverged)" in arms_table(result) and " ± " in arms_table(result)
    with pytest.raises(RunError, match="has no model, because its training failed: EWC"):
        load(folder, "wild", seed=3)


def test_the_stored_model_of_a_seed_has_its_stored_accuracy(finished):
    folder, result = finished
    learner = load(folder, "both", seed=1)
    row = result["arms"][2]["seeds"][1]
    assert learner.evaluate(learner.stream) == row["accuracy_matrix"][-1]


def test_the_joint_epsilon_covers_the_models_of_all_seeds(finished):
    _, result = finished
    arm = result["arms"][3]
    own = [row["epsilon"]["value"] for row in arm["seeds"]]
    assert arm["epsilon"]["value"] == max(own)
    assert max(own) < result["epsilon_of_all_arms"]["value"] <= sum(own)
    told = statement(result)
    assert "This arm has 2 models, one for each seed." in told
    assert "6 models were trained without privacy" in told


def test_epsilons_of_seeds_with_other_partitions_add_up(finished, tmp_path):
    """Another order of classes may put a record into another partition."""
    shuffled = "experiences = 2\nshuffle_classes = true"
    text = HEAD.replace("experiences = 2", shuffled) + PRIVACY + PRIVATE_ARM
    result = run(parse(text), text, tmp_path)
    (arm,) = result["arms"]
    joint = result["epsilon_of_all_arms"]["value"]
    assert joint > sum(row["epsilon"]["value"] for row in arm["seeds"])
    assert joint > finished[1]["epsilon_of_all_arms"]["value"]


def test_seeds_and_arms_can_be_added_to_a_finished_run(finished, tmp_path):
    first = "[[arms]]" + ARMS.split("[[arms]]")[1]
    short = HEAD.replace("[3, 1]", "[3]") + PRIVACY + first
    run(parse(short), short, tmp_path)
    model = tmp_path / "checkpoint" / TRIALS[0] / "model.safetensors"
    before = model.stat().st_mtime_ns
    shown = []
    run(parse(TEXT), TEXT, tmp_path, callbacks=[lambda _, learner: shown.append(learner.owner)])
    assert f"{TRIALS[0]}/client-0" not in shown and model.stat().st_mtime_ns == before
    result, kept = files(tmp_path)
    expected, whole = files(finished[0])
    lines = Path("metrics.jsonl")  # its lines have the order of the trainings
    assert sorted(kept.pop(lines).splitlines()) == sorted(whole[lines].splitlines())
    assert kept == {name: value for name, value in whole.items() if name != lines}
    assert result == expected


@pytest.mark.parametrize(
    ("old", "new"), [("seeds = [3]", "seeds = [1, 3]"), ("iterations = 4", "iterations = 5")]
)
def test_other_changes_of_a_run_are_refused(old, new, tmp_path):
    short = HEAD.replace("[3, 1]", "[3]") + ARMS.split('[[arms]]\nname = "wild"')[0]
    run(parse(short), short, tmp_path)
    changed = short.replace(old, new)
    with pytest.raises(RunError, match=old.split(" =")[0]):
        run(parse(changed), changed, tmp_path)
    assert (tmp_path / "result.json").exists()


class StoppedError(Exception):
    """Stands for a kill."""


def test_a_stopped_run_of_several_seeds_resumes_bit_identically(finished, tmp_path):
    """Within an experience, after one, and in the second seed."""
    stops = [
        (f"{TRIALS[0]}/client-0", "step.done", 2),
        (f"{TRIALS[2]}/client-0", "experience.end", 1),
        (f"{TRIALS[5]}/client-0", "block.end", 1),
    ]
    for owner, point, count in stops:
        seen = []

        def stop(now, learner, owner=owner, point=point, count=count, seen=seen):
            seen.append((learner.owner, now))
            if seen.count((owner, point)) == count:
                raise StoppedError

        with pytest.raises(StoppedError):
            run(parse(TEXT), TEXT, tmp_path, callbacks=[stop])
    run(parse(TEXT), TEXT, tmp_path)
    assert files(tmp_path) == files(finished[0])


def test_a_resumed_run_continues_from_the_last_block(tmp_path):
    text = (HEAD + ARMS.split('[[arms]]\nname = "wild"')[0]).replace("seeds = [3, 1]", "seed = 1")
    steps = []

    def stop(point, learner):
        if point == "step.done":
            steps.append(learner.position.step)
            if len(steps) == 3:
                raise StoppedError

    with pytest.raises(StoppedError):
        run(parse(text), text, tmp_path, callbacks=[stop])
    steps.clear()
    run(parse(text), text, tmp_path, callbacks=[lambda p, w: steps.append(p)])
    # two of the four steps of the first experience, then all of the second
    assert steps.count("step.done") == 6


# --------------------------------------------------------------------------- the command line


def test_invalid_command_line_overrides_are_refused_by_option():
    for words, told in (
        ({"seeds": "1,x"}, "--seeds = '1,x' is not allowed; allowed: whole numbers with commas"),
        (
            {"engine": "ray"},
            "--engine = 'ray' is not allowed; allowed: a config with a [federation",
        ),
    ):
        with pytest.raises(Exception, match="is not allowed") as caught:
            overridden(TEXT, source="mine.toml", **words)
        assert str(caught.value).startswith(told)


def test_an_overridden_config_differs_only_in_overridden_keys():
    more = '[federation]\nclients = 2\n[training.schedule]\nname = "StepLR"\nstep_size = 0.5\n'
    text = f"{TEXT}{more}".replace('name = "seeds"', 'name = "seeds"\nthreads = 1 # "\\u0001"')
    written = overridden(text.replace("blocks = 2\n", ""), source="x", engine="ray", seeds="2")
    again = parse(written)
    assert again.federation.engine == "ray" and again.seeds == (2,)
    assert again.arms == parse(TEXT).arms and again.training.schedule.options == {"step_size": 0.5}


@pytest.mark.deep(reason="chaos: kills a run of three seeds and four strategies three times")
def test_a_run_killed_three_times_resumes_bit_identically(tmp_path):
    """In the second, sixth and tenth of twelve trainings."""
    text = TEXT.replace("seeds = [3, 1]", "seeds = [0, 1, 2]").replace("1e30", "1.0")
    text = text.replace("iterations = 4", "iterations = 60").replace("blocks = 2", "blocks = 6")
    (tmp_path / "mine.toml").write_text(text.replace("helpers.own_data", "own_data"))
    shutil.copy(own_data.__file__, tmp_path / "own_data.py")
    words = [sys.executable, "-m", "perdure.cli.main", "run", "mine.toml", "--out"]
    for trainings in (2, 6, 10):
        process = subprocess.Popen([*words, "killed"], cwd=tmp_path, stdout=subprocess.DEVNULL)
        try:
            while len([*tmp_path.glob("killed/arms/*")]) < trainings:
                assert process.poll() is None
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()
    for folder in ("killed", "whole"):
        subprocess.run([*words, folder], cwd=tmp_path, check=True, capture_output=True)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
