"""A stopped and resumed run ends with the same bits as an undisturbed run."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from perdure.experiment.config import parse
from perdure.experiment.run import run, untimed
from perdure.learner import POINTS

ARMS = ("replay-plain", "ewc-private")
CONFIG = """
name = "stopped"
[data]
experiences = 2
[model]
hidden = [4]
[training]
learning_rate = 0.01
epochs = 1
[privacy]
noise_multiplier = 1.0
delta = 0.0005
sampling_rate = 0.25
seed = 0
[explain]
method = "kernel_shap"
records = 1
[[arms]]
strategy = "replay"
memory_size = 20
[[arms]]
strategy = "ewc"
strength = 10.0
private = true
"""
FEDERATED = CONFIG + "[federation]\nclients = 2\nrounds = 2\n"


class Stopped(BaseException):
    """An exception in place of the end of the process, which no code catches."""


class Watch:
    """Count the callback points and stop the run at one of them.

    Args:
        point: its name.
        at: how often it may be passed before; None to go on to the end.
    """

    def __init__(self, point=None, at=None):
        self.passed = Counter()
        self._point = point
        self._at = at

    def __call__(self, point, learner):
        if point == self._point and self.passed[point] == self._at:
            raise Stopped(point)
        self.passed[point] += 1


def started(folder, text, watch):
    """Start or resume the run; True if it finished."""
    try:
        run(parse(text), text, folder, callbacks=[watch])
    except Stopped:
        return False
    return True


def outputs(folder):
    """Return all outputs of a run without timings."""
    names = ["metrics.jsonl", "ledger.jsonl", "explanations.safetensors", "config.toml"]
    names += [f"checkpoint/{arm}/model.safetensors" for arm in ARMS]
    files = {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}
    return files | {"result": untimed(json.loads((folder / "result.json").read_text()))}


@pytest.fixture(scope="module", params=["alone", "federated"])
def undisturbed(request, tmp_path_factory):
    """Return the config text, the outputs of the undisturbed run, the number of calls of each
    point, and the folder.
    """
    text = {"alone": CONFIG, "federated": FEDERATED}[request.param]
    folder = tmp_path_factory.mktemp("u")
    watch = Watch()
    assert started(folder, text, watch)
    return text, outputs(folder), watch.passed, folder


# ------------------------------------------------------------------------ stops at the named points

EVERY_POINT = pytest.mark.deep(
    reason="full replay: stops of a whole run at every point, alone and federated"
)
IN_SHORT = {"ledger.appended", "experience.consolidated"}
ONCE_IN_SHORT = IN_SHORT | {"step.done", "checkpoint.begin", "evaluated"}
"""The learner's own tests stop a run of one arm at every point."""


@pytest.mark.slow
@pytest.mark.parametrize("undisturbed", ["alone"], indirect=True)
@pytest.mark.parametrize(
    "point",
    [pytest.param(point, marks=() if point in ONCE_IN_SHORT else EVERY_POINT) for point in POINTS],
)
def test_stopping_at_a_callback_point_changes_no_result(undisturbed, tmp_path, point):
    text, expected, passed, _ = undisturbed
    assert not started(tmp_path, text, Watch(point, passed[point] - 1))
    assert not (tmp_path / "result.json").exists()
    assert started(tmp_path, text, Watch())
    assert outputs(tmp_path) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "point",
    [pytest.param(point, marks=() if point in IN_SHORT else EVERY_POINT) for point in POINTS],
)
def test_several_stops_at_a_callback_point_change_no_result(undisturbed, tmp_path, point):
    text, expected, passed, _ = undisturbed
    for at in (0, passed[point] // 2, passed[point] // 3):
        ended = started(tmp_path, text, Watch(point, at))
        assert not (ended and at == 0)
    assert started(tmp_path, text, Watch())
    assert outputs(tmp_path) == expected


@pytest.mark.slow
def test_a_stop_every_few_checkpoints_changes_no_result(undisturbed, tmp_path):
    text, expected, _, _ = undisturbed
    stops = 0
    # a federated exchange has three checkpoints, so that every session ends one
    while not started(tmp_path, text, Watch("checkpoint.end", 3)):
        stops += 1
        assert stops < 100
    assert stops > 1
    assert outputs(tmp_path) == expected


# --------------------------------------------------------------- stops between the files of the end

LAST_WRITTEN = (
    "result.json",
    "explanations.safetensors",
    "ledger.jsonl",
    "arms/ewc-private/arm.json",
    "checkpoint/ewc-private/model.safetensors",
)


@pytest.mark.parametrize("count", range(1, len(LAST_WRITTEN) + 1))
def test_missing_final_files_are_written_again_on_resume(undisturbed, tmp_path, count):
    text, expected, _, folder = undisturbed
    shutil.copytree(folder, tmp_path / "run")
    for name in LAST_WRITTEN[:count]:
        (tmp_path / "run" / name).unlink()
    watch = Watch()
    assert started(tmp_path / "run", text, watch)
    assert outputs(tmp_path / "run") == expected
    assert not watch.passed["step.done"]


def test_a_truncated_metrics_line_is_written_again_on_resume(undisturbed, tmp_path):
    text, expected, passed, _ = undisturbed
    assert not started(tmp_path, text, Watch("evaluated", passed["evaluated"] - 1))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    assert started(tmp_path, text, Watch())
    assert path.read_bytes() == whole
    assert outputs(tmp_path) == expected


def test_a_resumed_run_ignores_temporary_files(undisturbed, tmp_path):
    text, expected, passed, _ = undisturbed
    assert not started(tmp_path, text, Watch("checkpoint.end", passed["checkpoint.end"] // 2))
    for folder in {path.parent for path in tmp_path.rglob("*") if path.is_file()}:
        for name in (
            ".result.json.draft",
            ".000099.json.draft",
            "ledger.head.json.tmp",
            ".latest.json.draft",
        ):
            (folder / name).write_bytes(b"torn")
    assert started(tmp_path, text, Watch())
    assert outputs(tmp_path) == expected


# --------------------------------------------------------------------------- three real kills

LONG = (
    FEDERATED.replace("epochs = 1", "epochs = 30")
    .replace("rounds = 2", "rounds = 6")
    .replace("[4]", "[32]")
)
EXCHANGES = len(ARMS) * 2 * (6 + 1)


def exchanges(folder):
    """Return the number of completed exchanges on disk, over all arms."""
    found = folder.glob("arms/*/checkpoint/latest.json")
    return sum(json.loads(path.read_text())["number"] for path in found)


def kill(process, folder, target, pause):
    """Kill the process some time after `target` exchanges are on disk, at a moment not tied to a
    file.
    """
    while exchanges(folder) < target:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    time.sleep(pause)
    assert process.poll() is None, "the run ended before it could be killed"
    process.kill()
    assert process.wait() == -signal.SIGKILL


@pytest.mark.deep(reason="chaos: kills the process of a long run three times")
def test_a_federated_run_killed_three_times_has_equal_results(tmp_path):
    config = tmp_path / "config.toml"
    folder = tmp_path / "killed"
    seeded = random.Random(0)
    config.write_text(LONG)
    words = [sys.executable, "-m", "perdure.cli.main", "run", str(config), "--out", str(folder)]
    quarter = EXCHANGES // 4
    for first in (1, 1 + quarter, 1 + 2 * quarter):
        target = max(seeded.randrange(first, first + quarter), exchanges(folder) + 1)
        with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
            kill(process, folder, target, seeded.uniform(0, 0.2))
        assert not (folder / "result.json").exists()
    subprocess.run(words, stdout=subprocess.DEVNULL, check=True)
    assert exchanges(folder) == EXCHANGES

    run(parse(LONG), LONG, tmp_path / "undisturbed")
    assert outputs(folder) == outputs(tmp_path / "undisturbed")
