"""Tuning uses only the training records of the first experiences."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from perdure.data.scenarios import split
from perdure.errors import ConfigError, PrivacyError
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
        ({"space": {"rate": (0.1, 0.01)}}, "space = "),
        ({"experiences": 2}, "experiences = 2.*1 to 1"),
        ({"trials": 0}, "trials = 0"),
        ({"held_out": 1.0}, "held_out = 1.0"),
    ],
)
def test_tune_refuses_an_invalid_search(stream, make, options, message):
    given = {"space": {"rate": (0.01, 0.1)}, "experiences": 1} | options
    with pytest.raises(ConfigError, match=message):
        tune(make, given.pop("space"), stream, **given)


def test_a_diverging_tuning_trial_scores_0_and_search_goes_on(stream, make):
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
