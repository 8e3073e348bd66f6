"""The learning-rate range test: a suggestion from public losses, refused under privacy."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from helpers.learners import SIMULATED, learner_of  # noqa: F401
from perdure.errors import ConfigError, PrivacyError, RunawayError
from perdure.experiment import lr_range_test
from perdure.learner import Validation


@pytest.fixture
def made(learner_of):  # noqa: F811
    return partial(learner_of, optimizer=partial(torch.optim.SGD, lr=0.123))


@pytest.fixture
def measured(made, toy_stream):
    return lr_range_test(lambda: made(validation=Validation()), toy_stream(), lowest=1e-4, steps=60)


def test_the_range_test_raises_the_rate_by_one_factor(measured):
    rates = measured.rates
    assert rates[0] == 1e-4 and rates[-1] <= 10.0
    factors = [later / earlier for earlier, later in pairwise(rates)]
    assert factors == pytest.approx([1e5 ** (1 / 59)] * len(factors))


def test_the_suggested_rate_is_a_tenth_of_the_best(measured):
    best = measured.losses.index(min(measured.losses))
    assert measured.suggestion == measured.rates[best] / 10
    assert 1e-3 < measured.suggestion < 1.0


def test_the_suggested_rate_trains(measured, made, toy_stream):
    def end(rate):
        learner = made(optimizer=partial(torch.optim.SGD, lr=rate), iterations=30)
        return float(learner.fit(toy_stream())[0, 0])

    assert end(measured.suggestion) > end(measured.rates[0])


def test_the_range_test_has_a_picture(measured):
    (axes,) = measured.plot().axes
    assert (
        axes.get_xscale() == "log" and "suggestion" in axes.get_legend().get_texts()[0].get_text()
    )


def test_a_range_test_of_a_private_learner_is_refused(made, toy_stream):
    with pytest.raises(PrivacyError, match="reads the losses of private records"):
        lr_range_test(lambda: made(privacy=SIMULATED), toy_stream())


def test_a_range_test_where_no_loss_falls_is_refused(made, toy_stream):
    with pytest.raises(RunawayError, match="never falls below its first value"):
        lr_range_test(made, toy_stream(), lowest=1e6, highest=1e9, steps=10)


def test_a_diverging_step_ends_the_range_test(made, toy_stream):
    """The rate grows by a factor of 10^16 in one step, so its loss is infinite or NaN."""
    found = lr_range_test(made, toy_stream(), lowest=1e-80, highest=1e80, steps=11)
    assert len(found.rates) < 11 and all(map(math.isfinite, found.losses))


@pytest.mark.parametrize(
    ("name", "wrong"), [("lowest", 0.0), ("highest", 1e-9), ("steps", 9), ("steps", 20.0)]
)
def test_wrong_arguments_of_a_range_test_are_refused(made, toy_stream, name, wrong):
    with pytest.raises(ConfigError, match=rf"{name} = .* is not allowed"):
        lr_range_test(made, toy_stream(), **{name: wrong})


def test_a_trained_learner_is_refused_by_the_range_test(made, toy_stream):
    learner = made(iterations=1)
    learner.fit(toy_stream())
    with pytest.raises(ConfigError, match="a new learner with a new"):
        lr_range_test(lambda: learner, toy_stream())


@pytest.mark.parametrize("changes", [{"lowest": "a"}, {"highest": "b"}, {"make": lambda: None}])
def test_the_range_test_refuses_other_values_by_name(made, toy_stream, changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        lr_range_test(**{"make": made, "stream": toy_stream(), **changes})
