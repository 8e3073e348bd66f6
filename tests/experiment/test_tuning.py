"""Tuning uses only the training records of the first experiences."""

import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from perdure.data.scenarios import rotated, split
from perdure.errors import ConfigError, PrivacyError, RunawayError, RunError
from perdure.experiment.tuning import beginning, tune
from perdure.learner.learner import Learner
from perdure.privacy import Privacy
from perdure.strategies import EWC


@pytest.fixture
def stream(toy_data):
    return split(toy_data, scenario="task", experiences=4 // 2)


@pytest.fixture
def make(stream, toy_model):
    def build(values, **options):
        return Learner(
            model=toy_model(stream),
            strategy=EWC(strength=values.get("strength", 1.0)),
            iterations=30,
            batch_size=8,
            optimizer=partial(torch.optim.Adam, lr=values.get("rate", 0.01)),
            **options,
        )

    return build


def test_tuning_holds_out_training_records_only(stream):
    (cut,) = beginning(stream, 1, 0.25, seed=0)
    whole = set(stream[0].train.ids.tolist())
    learnt = set(cut.train.ids.tolist())
    measured = set(cut.test.ids.tolist())
    assert learnt | measured == whole and not learnt & measured and len(measured) == 6
    assert not measured & set(stream[0].test.ids.tolist())


def test_tune_returns_the_best_values_and_its_trials(stream, make):
    found = tune(make, {"rate": (1e-6, 0.05)}, stream, experiences=1, trials=6, seed=1)
    scores = {values["rate"]: score for values, score in found.trials}
    assert len(scores) == 6 and found.score == max(scores.values()) == scores[found.values["rate"]]
    assert min(scores.values()) < found.score
    assert found.row()["tuned_on"].startswith(
        "held-out training records of the first 1 experiences"
    )
    assert tune(make, {"rate": (1e-6, 0.05)}, stream, experiences=1, trials=6, seed=1) == found


def test_tuning_ignores_test_records_and_later_experiences(stream, make):
    blank = [replace(e, test=e.test.take(torch.arange(2))) for e in stream]
    blank[1] = replace(blank[1], train=blank[1].train.take(torch.arange(3)))
    other = replace(stream, experiences=tuple(blank))
    search = partial(tune, make, {"rate": (1e-4, 0.05)}, experiences=1, trials=2)
    assert search(stream) == search(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": {}}, "space = {}"),
        ({"space": {"rate": (0.1, 0.01)}}, r"space\['rate'\] = .*or a list of choices"),
        ({"space": {"rate": []}}, r"space\['rate'\] = \[\]"),
        ({"space": {"rate": (0.1, math.inf)}}, r"space\['rate'\] = "),
        ({"experiences": 2}, "experiences = 2.*1 to 1"),
        ({"trials": 0}, "trials = 0"),
        ({"held_out": 1.0}, "held_out = 1.0"),
    ],
)
def test_tune_refuses_an_invalid_search(stream, make, options, message):
    given = {"space": {"rate": (0.01, 0.1)}, "experiences": 1} | options
    with pytest.raises(ConfigError, match=message):
        tune(make, given.pop("space"), stream, **given)


def test_a_diverging_tuning_trial_scores_0_and_others_run(stream, make):
    def run_away(values):
        learner = make(values)
        if values["rate"] > 0.01:
            learner.optimizer = partial(torch.optim.SGD, lr=math.inf)
        return learner

    chosen = tune(run_away, {"rate": (1e-3, 0.1)}, stream, experiences=1, trials=8)
    lost = [values["rate"] for values, accuracy in chosen.trials if accuracy == 0]
    assert 0 < len(lost) < 8 and chosen.score > 0 and chosen.values["rate"] < 0.01 < min(lost)


def test_tune_refuses_private_training(stream, make):
    private = partial(make, privacy=Privacy(noise_multiplier=1.0, seed=0))
    with pytest.raises(PrivacyError, match="because every trial"):
        tune(private, {"rate": (0.01, 0.1)}, stream, experiences=1, trials=1)


def test_tuning_holds_out_all_copies_of_a_record_together(toy_data):
    stream = rotated(toy_data_as_images(toy_data), angles=(0.0, 90.0, 180.0))
    cut = beginning(stream, 2, 0.25, seed=0)
    learnt = set(torch.cat([each.train.ids for each in cut]).tolist())
    measured = set(torch.cat([each.test.ids for each in cut]).tolist())
    assert measured and not learnt & measured and len(measured) == 12
    assert [len(each.test) for each in cut] == [12, 12]


def toy_data_as_images(data):
    """The toy problem with 24 ids and inputs that can be turned: (1, 2, 2)."""

    def images(records):
        return replace(records, inputs=records.inputs[:, :4].reshape(-1, 1, 2, 2))

    return replace(data, train=images(data.train), test=images(data.test), input_shape=(1, 2, 2))


def test_tuning_refuses_an_experience_of_one_record(stream):
    one = replace(stream[0], train=stream[0].train.take(torch.arange(1)))
    with pytest.raises(ConfigError, match="experience 0 has 1 training records of 1 ids"):
        beginning(replace(stream, experiences=(one, *stream.experiences[1:])), 1, 0.2, seed=0)


def test_tune_searches_whole_numbers_choices_and_zero(stream, make):
    space = {
        "size": (1, 3),
        "momentum": (0.0, 0.9),
        "strength": [0.0, 5.0],
        "kind": ["SGD", "Adam"],
    }

    def build(values):
        learner = make(values)
        learner.iterations = values["size"]
        return learner

    found = tune(build, space, stream, experiences=1, trials=8)
    tried = [values for values, _ in found.trials]
    assert {type(values["size"]) for values in tried} == {int}
    assert {values["size"] for values in tried} == {1, 2, 3}
    assert all(0 <= values["momentum"] <= 0.9 for values in tried)
    assert {values["strength"] for values in tried} == {0.0, 5.0}
    assert {values["kind"] for values in tried} == {"SGD", "Adam"}


def diverging(make):
    def build(values):
        learner = make(values)
        learner.optimizer = partial(torch.optim.SGD, lr=math.inf)
        return learner

    return build


def test_tune_raises_an_error_if_every_trial_diverges(stream, make):
    with pytest.raises(RunawayError, match="all 2 trials diverged"):
        tune(diverging(make), {"rate": (0.01, 0.1)}, stream, experiences=1, trials=2)


def test_tune_refuses_a_learner_of_an_earlier_trial(stream, make, toy_model, tmp_path):
    search = partial(tune, space={"rate": (0.01, 0.1)}, stream=stream, experiences=1, trials=2)
    same = make({})
    with pytest.raises(ConfigError, match="a new model in each trial"):
        search(lambda values: same)
    model = toy_model(stream)
    with pytest.raises(ConfigError, match="a new model in each trial"):
        search(lambda values: replace(make(values, warm_start=True), model=model))
    with pytest.raises(ConfigError, match="a trial would resume another one"):
        search(lambda values: make(values, folder=tmp_path))


SPACE = {"rate": (1e-4, 0.05), "strength": [0.0, 1.0]}


def test_a_stopped_tuning_search_resumes_with_identical_trials(stream, make, tmp_path):
    search = partial(tune, space=SPACE, stream=stream, experiences=1, trials=4)
    file = tmp_path / "study.db"
    began = []

    def stopped(values):
        began.append(values)
        if len(began) == 3:
            raise KeyboardInterrupt
        return make(values)

    with pytest.raises(KeyboardInterrupt):
        search(stopped, study=file)
    more = []
    assert search(lambda values: more.append(values) or make(values), study=file) == search(make)
    assert len(more) == 2 and more[0] == began[2]


def test_tune_refuses_the_file_of_another_search(stream, make, tmp_path):
    search = partial(tune, make, SPACE, stream, experiences=1, study=tmp_path / "study.db")
    search(trials=1)
    with pytest.raises(RunError, match="a search with another held_out, seed; give another file"):
        search(trials=1, seed=3, held_out=0.3)
    (tmp_path / "text.db").write_text("no database, but text that is long enough to be read" * 9)
    with pytest.raises(RunError, match=r"text\.db cannot be read"):
        tune(make, SPACE, stream, experiences=1, trials=1, study=tmp_path / "text.db")


KILLED = """
import os, signal, sys
sys.path[:0] = [sys.argv[2]]
from functools import partial
from pathlib import Path
import torch
from perdure import Learner
from perdure.experiment import tune
from perdure.models import mlp
from perdure.strategies import EWC
from perdure.testing.fixtures import small_stream

stream = small_stream("class")
began = []

def make(values):
    began.append(values)
    if len(sys.argv) > 3 and len(began) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    model = mlp(input_shape=stream.input_shape, num_classes=6, hidden=(4,), seed=0)
    return Learner(model=model, strategy=EWC(strength=values["strength"]), iterations=3,
                   optimizer=partial(torch.optim.SGD, lr=values["rate"]), batch_size=8)

space = {"rate": (0.01, 1.0), "strength": [0.0, 1.0]}
print(tune(make, space, stream, experiences=2, trials=5, study=Path(sys.argv[1])).row())
"""


@pytest.mark.deep(reason="chaos: a search that is killed three times")
def test_a_killed_tuning_search_resumes_with_identical_trials(tmp_path):
    source = str(Path(__file__).parents[2] / "src")

    def search(file, *stop):
        words = [sys.executable, "-c", KILLED, str(tmp_path / file), source, *stop]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    for stop in ("2", "1", "3"):
        assert search("killed.db", stop).returncode == -9
    ended = search("killed.db")
    whole = search("whole.db")
    assert ended.returncode == whole.returncode == 0, ended.stderr + whole.stderr
    assert ended.stdout == whole.stdout != ""
