import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from perdure.auditing.bounds import (
    GUESSED,
    could_be_gaussian,
    epsilon_of,
    guesses,
    log_likelihood_ratio,
    lower_bound,
    one_run_epsilon,
    one_run_p_value,
    separation,
)
from perdure.errors import ConfigError
from perdure.privacy.accounting.calibration import epsilon
from perdure.privacy.accounting.charges import Charge

DELTA = 1e-5
MU_AT_4 = 0.92493
"""mu of Gaussian DP at epsilon 4 and delta 1e-5."""


def game(seed, mu, m=1000):
    """Return scores and inclusion bits of an ideal audit of a mu-GDP mechanism."""
    place = torch.Generator().manual_seed(seed)
    included = torch.rand(m, generator=place) < 0.5
    return torch.randn(m, generator=place) + mu * included, included


def bounds(mu, m, runs, **options):
    options = {"delta": DELTA, "confidence": 0.95} | options
    return torch.tensor([lower_bound(*game(seed, mu, m), **options) for seed in range(runs)])


# ---- scores


@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0])
def test_the_audit_score_is_the_log_ratio_of_two_densities(rate):
    x = torch.linspace(-3, 4, 15, dtype=torch.float64)
    sigma = 0.8
    absent = stats.norm.pdf(x, 0, sigma)
    present = (1 - rate) * absent + rate * stats.norm.pdf(x, 1, sigma)
    got = log_likelihood_ratio(x, rate=rate, noise_multiplier=sigma)
    torch.testing.assert_close(got, torch.log(torch.tensor(present / absent)))


# ---- from mu to epsilon


@pytest.mark.reference
@pytest.mark.parametrize("mu", [0.2, MU_AT_4, 3.0])
def test_epsilon_of_a_gaussian_equals_the_accountants_epsilon(mu):
    assert epsilon_of(mu, DELTA) == pytest.approx(
        epsilon([Charge(1.0, 1 / mu, 1)], delta=DELTA), abs=2e-3
    )


def test_epsilon_grows_from_0_with_the_separation_of_scores():
    assert epsilon_of(0.0, DELTA) == 0.0
    assert epsilon_of(1e-6, DELTA) == 0.0
    assert epsilon_of(math.inf, DELTA) == math.inf
    assert 900 < epsilon_of(40.0, DELTA) < 1000


# ---- two samples of Gaussians


@pytest.mark.statistical
@pytest.mark.parametrize("mu", [0.0, MU_AT_4, 2.5])
def test_the_95_percent_separation_bound_fails_for_5_percent(mu):
    """The nominal error is 5 % of 2,000. The interval is four standard errors, so each case fails
    for one seed in 15,000.
    """
    alarms = 0
    for seed in range(2000):
        scores, included = game(seed, mu)
        alarms += separation(scores[included].double(), scores[~included].double(), 0.95) > mu
    assert 0.030 < alarms / 2000 < 0.070


@pytest.mark.statistical
def test_the_gaussian_audit_bound_nears_epsilon_with_canaries():
    """The seed is fixed. The mean of 50 has standard error 0.05 at 1,000 canaries and 0.015 at
    10,000.
    """
    few = bounds(MU_AT_4, 1000, 50)
    many = bounds(MU_AT_4, 10_000, 50)
    assert few.mean() == pytest.approx(3.49, abs=0.15)
    assert few.std() == pytest.approx(0.30, abs=0.12)
    assert many.mean() == pytest.approx(3.82, abs=0.06)


def test_scores_without_noise_give_an_infinite_epsilon_bound():
    included = torch.tensor([True, False] * 10)
    assert lower_bound(included.double(), included, delta=DELTA, confidence=0.99) == math.inf
    assert lower_bound(torch.zeros(20), included, delta=DELTA, confidence=0.99) == 0.0


def test_reversed_scores_give_a_lower_bound_of_0():
    scores, included = game(0, 3.0)
    for method in ("gaussian", "one-run", "one-run-f-dp"):
        assert lower_bound(-scores, included, delta=DELTA, confidence=0.95, method=method) == 0.0


# ---- one run


def test_canaries_with_high_scores_are_guessed_as_included():
    scores = torch.tensor([0.0, 5.0, 1.0, 4.0, 2.0, 3.0])
    included = torch.tensor([False, True, True, False, True, False])
    assert guesses(scores, included, 1 / 3) == (2, 2)
    assert guesses(scores, included, 2 / 3) == (2, 4)
    assert guesses(scores, included, 1.0) == (2, 6)


@pytest.mark.reference
@pytest.mark.parametrize(
    ("correct", "made", "eps"), [(90, 100, 1.5), (0, 10, 0.0), (10, 10, 3.0), (700, 1000, 0.5)]
)
def test_the_one_run_p_value_equals_the_formula_of_the_theorem(correct, made, eps):
    accuracy = 1 / (1 + math.exp(-eps))
    above = stats.binom.sf(correct - 1, made, accuracy)
    steps = [
        (stats.binom.sf(correct - i - 1, made, accuracy) - above) / i for i in range(1, correct + 1)
    ]
    expected = min(1.0, above + 2 * 1000 * DELTA * max(steps, default=0.0))
    assert one_run_p_value(correct, made, 1000, eps, DELTA) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("eps", [0.3, 1.0, 2.5])
def test_the_one_run_bound_is_exact_for_randomised_response(eps):
    """The number of right guesses is binomial, so the probability of an alarm is computed
    exactly.
    """
    made = 60
    tail = 0.05
    mass = stats.binom.pmf(range(made + 1), made, 1 / (1 + math.exp(-eps)))
    alarm = [one_run_epsilon(v, made, made, delta=1e-12, tail=tail) > eps for v in range(made + 1)]
    chance = sum(p for p, raised in zip(mass, alarm, strict=True) if raised)
    first = alarm.index(True)
    assert chance <= tail < chance + mass[first - 1]


@pytest.mark.parametrize("mu", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("tail", [0.05, 0.001])
def test_f_dp_bound_accepts_a_gaussian_mechanism(mu, tail):
    """A guess by the sign of the canary's coordinate is right with probability Phi(mu/2),
    independently of other guesses.
    """
    made = 400
    for correct in range(made + 1):
        if not could_be_gaussian(correct, made, made, mu, tail):
            assert stats.binom.sf(correct - 1, made, stats.norm.cdf(mu / 2)) < tail
    assert not could_be_gaussian(made, made, made, mu, tail)


@pytest.mark.property
@settings(deadline=None, max_examples=50)
@given(st.integers(1, 60), st.floats(0, 3), st.floats(0, 2), st.data())
def test_the_f_dp_p_value_grows_with_mu(made, mu, more, data):
    correct = data.draw(st.integers(0, made))
    if could_be_gaussian(correct, made, 60, mu, 0.01):
        assert could_be_gaussian(correct, made, 60, mu + more, 0.01)


@pytest.mark.statistical
@pytest.mark.parametrize(("method", "least"), [("one-run", 1.2), ("one-run-f-dp", 1.6)])
def test_one_run_bounds_stay_below_the_true_epsilon(method, least):
    """At most 5 % of correct audits may be flagged. Four guessed shares and a bound above 4 at
    1,000 make this much rarer. The standard error of the mean over 40 is about 0.05.

    The standard error of the mean over 40 is about 0.05.
    """
    found = bounds(MU_AT_4, 2000, 40, method=method)
    assert (found > 4).sum() <= 2
    assert least < found.mean() < 3.0


@pytest.mark.parametrize("method", ["gaussian", "one-run", "one-run-f-dp"])
def test_more_confidence_gives_a_smaller_lower_bound(method):
    weak, strong = (bounds(2.0, 1000, 1, method=method, confidence=c)[0] for c in (0.9, 0.999))
    assert 0 < strong < weak
    assert len(GUESSED) == 4


@pytest.mark.parametrize(
    "change",
    [{"delta": 0.0}, {"delta": 1.0}, {"confidence": 0.0}, {"confidence": 1.0}, {"method": "magic"}],
)
def test_audit_bounds_refuse_invalid_arguments(change):
    scores, included = game(0, 1.0, m=20)
    [field] = change
    with pytest.raises(ConfigError, match=field):
        lower_bound(scores, included, **({"delta": DELTA, "confidence": 0.95} | change))


def test_audit_bounds_refuse_too_few_canaries_inside_or_outside():
    with pytest.raises(ConfigError, match="canaries"):
        lower_bound(torch.zeros(9), torch.ones(9, dtype=torch.bool), delta=DELTA, confidence=0.95)
