"""Means, paired differences and ranks over seeds, against scipy."""

import numpy as np
import pytest
from scipy import stats

from perdure.experiment.paired_statistics import (
    common_seeds,
    estimate,
    mean_ranks,
    paired_difference,
)


def measured(count, seed, shift=0.0):
    """Numbers like accuracies, by seed."""
    drawn = np.random.default_rng(seed).normal(70 + shift, 3, count)
    return dict(enumerate(drawn.tolist()))


@pytest.mark.reference
@pytest.mark.parametrize("count", [2, 3, 10, 50])
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_the_paired_interval_equals_that_of_scipy(count, confidence):
    one, two = measured(count, 0, shift=1.0), measured(count, 1)
    found = paired_difference(one, two, confidence)
    theirs = stats.ttest_rel(list(one.values()), list(two.values()))
    low, high = theirs.confidence_interval(confidence)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    assert found.mean / found.standard_error == pytest.approx(theirs.statistic, rel=1e-12)


@pytest.mark.reference
def test_the_standard_error_equals_that_of_scipy():
    values = measured(7, 2)
    found = estimate(values, 0.95)
    assert found.mean == pytest.approx(np.mean(list(values.values())))
    assert found.standard_error == pytest.approx(stats.sem(list(values.values())))
    assert found.seeds == tuple(range(7))


def test_the_paired_difference_uses_only_common_seeds():
    found = paired_difference({0: 5.0, 1: 7.0, 9: 100.0}, {1: 4.0, 0: 3.0, 8: -50.0}, 0.95)
    assert found.seeds == (0, 1)
    assert found.mean == 2.5
    assert paired_difference({0: 5.0}, {1: 4.0}, 0.95) is None


def test_an_estimate_from_one_seed_has_no_interval():
    found = estimate({4: 71.5}, 0.95)
    assert (found.mean, found.standard_error, found.low, found.high) == (71.5, None, None, None)


@pytest.mark.reference
@pytest.mark.parametrize("higher_is_better", [True, False])
def test_mean_ranks_equal_those_of_scipy(higher_is_better):
    drawn = np.random.default_rng(3).integers(0, 4, (6, 5)).astype(float)
    arms = {f"arm {i}": dict(enumerate(column.tolist())) for i, column in enumerate(drawn.T)}
    found = mean_ranks(arms, higher_is_better=higher_is_better)
    sign = -1 if higher_is_better else 1
    theirs = stats.rankdata(sign * drawn, axis=1).mean(axis=0)
    assert list(found.values()) == pytest.approx(theirs.tolist())


def test_mean_ranks_use_only_seeds_common_to_all_arms():
    arms = {"one": {0: 1.0, 1: 5.0}, "two": {1: 4.0, 2: 9.0}}
    assert mean_ranks(arms, higher_is_better=True) == {"one": 1.0, "two": 2.0}
    assert mean_ranks({"one": {0: 1.0}, "two": {1: 1.0}}, higher_is_better=True) == {}
    assert common_seeds(list(arms.values())) == (1,)
    assert common_seeds([]) == ()
