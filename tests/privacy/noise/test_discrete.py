import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from perdure.errors import ConfigError, DataError
from perdure.privacy.accounting.calibration import epsilon
from perdure.privacy.accounting.charges import Charge
from perdure.privacy.noise.discrete import (
    Frequency,
    Integers,
    bernoulli_exp,
    counted,
    discrete_gaussian,
)
from perdure.privacy.noise.key import NoiseKey

PLACE = {"purpose": "release:test", "entry": "e0"}


def stream(step=0, seed=0):
    return NoiseKey.from_seed(seed).stream(**PLACE, step=step)


def words(*values):
    """Return a stream of the 64-bit words `values`, repeated (a buffer is read from its end)."""
    return lambda n: np.resize(np.array(values, dtype="<u8"), n // 8)[::-1].tobytes()


# --------------------------------------------------------------------------- uniform integers


def test_random_integers_reject_numbers_above_the_limit():
    top = [value << 61 for value in (7, 5, 2)]  # three leading bits
    assert [Integers(words(*top)).below(n) for n in (8, 7, 5)] == [7, 5, 2]
    one = Integers(words(*top))
    assert [one.below(6), one.below(6), one.below(6)] == [5, 2, 5]
    assert one.below(1) == 0


def test_random_integers_wider_than_a_word_join_words():
    wide = Integers(words(1 << 63, 3))
    assert wide.below(1 << 128) == (1 << 127) + 3
    assert wide.below(1 << 65) == 1 << 64  # the 65 leading bits of the same two


@pytest.mark.statistical
@pytest.mark.parametrize("n", [2, 3, 7, 10, 3 * 2**70])
def test_random_integers_are_uniform(n):
    """Each has flakiness 1e-6; a lower half that is a tenth more likely is rejected."""
    draws = 20_000
    source = Integers(stream(seed=n % 97))
    bins = min(n, 12)
    got = np.bincount([source.below(n) * bins // n for _ in range(draws)], minlength=bins)
    assert got.sum() == draws and len(got) == bins
    assert stats.chisquare(got).pvalue > 1e-6
    tilted = np.where(np.arange(bins) < bins / 2, 1.1, 1.0)
    assert stats.chisquare(got, draws * tilted / tilted.sum()).pvalue < 1e-3


@pytest.mark.statistical
@pytest.mark.parametrize(
    "rate", [Fraction(0), Fraction(1, 7), Fraction(1), Fraction(5, 2), Fraction(10**38, 3**80)]
)
def test_bernoulli_exp_is_true_with_the_exact_probability(rate):
    """Each has flakiness 1e-6; a probability a fifth higher or lower is rejected."""
    n = 20_000
    source = Integers(stream(seed=1))
    hits = sum(bernoulli_exp(rate.numerator, rate.denominator, source) for _ in range(n))
    p = math.exp(-rate)
    assert stats.binomtest(hits, n, p).pvalue > 1e-6
    for wrong in (p * 0.8, min(p * 1.2, 1 - 1e-9)):
        assert p == 1 or stats.binomtest(hits, n, wrong).pvalue < 1e-9


# --------------------------------------------------------------------------- the discrete Gaussian


def mass(sigma, reach=None):
    """Return the support and the exact probabilities, far beyond possible draws."""
    reach = reach or math.ceil(40 * sigma) + 2
    z = np.arange(-reach, reach + 1)
    weights = np.exp(-((z / sigma) ** 2) / 2)
    return z, weights / weights.sum()


def fit(draws, sigma):
    """Return the p-value of the draws under the exact law, with rare values pooled."""
    z, p = mass(sigma, math.ceil(40 * max(sigma, 1)))
    limit = int(z[p * len(draws) > 5].max())
    got = np.bincount(np.clip(draws, -limit - 1, limit + 1) + limit + 1, minlength=2 * limit + 3)
    expected = np.array([p[z < -limit].sum(), *p[abs(z) <= limit], p[z > limit].sum()]) * len(draws)
    if expected[0] < 1e-3:  # nothing can be said of tails that thin
        assert got[0] == got[-1] == 0
        got = got[1:-1]
        expected = expected[1:-1]
    return stats.chisquare(got, expected * got.sum() / expected.sum()).pvalue


@pytest.mark.statistical
@pytest.mark.parametrize("sigma", [0.4, 1.0, 4.4, 30.0])
def test_discrete_gaussian_draws_follow_the_exact_distribution(sigma):
    """Chi-square with flakiness 1e-6 each; the wrong scales are rejected at 1e-12."""
    draws = discrete_gaussian(10_000, sigma, stream(seed=3)).numpy()
    assert draws.dtype == np.int64
    assert fit(draws, sigma) > 1e-6
    assert fit(draws, sigma * 3 / 2) < 1e-12 and fit(draws, sigma * 2 / 3) < 1e-12


@pytest.mark.statistical
def test_the_discrete_gaussian_is_not_a_rounded_gaussian():
    """At s = 0.4 the discrete law gives 0 in 92 of 100 draws and a rounded normal in 79; rejected
    at 1e-12.
    """
    zeros = int((discrete_gaussian(10_000, 0.4, stream(seed=4)) == 0).sum())
    z, p = mass(0.4)
    assert stats.binomtest(zeros, 10_000, float(p[z == 0][0])).pvalue > 1e-6
    assert stats.binomtest(zeros, 10_000, 2 * stats.norm.cdf(0.5 / 0.4) - 1).pvalue < 1e-12


@pytest.mark.statistical
@pytest.mark.parametrize(("sigma", "n"), [(0.7, 40_000), (4.4, 40_000)])
def test_discrete_gaussian_has_the_exact_parities_and_tails(sigma, n):
    """Each share is binomial with flakiness 1e-6; a share a fifth higher or lower (in the tail,
    half) is rejected.
    """
    draws = discrete_gaussian(n, sigma, stream(seed=5)).numpy()
    z, p = mass(sigma)
    events = {
        "odd": lambda v: v % 2 == 1,
        "odd and positive": lambda v: (v % 2 == 1) & (v > 0),
        "even and negative": lambda v: (v % 2 == 0) & (v < 0),
        "tail": lambda v: abs(v) > 2.5 * sigma,
        "zero": lambda v: v == 0,
    }
    for name, event in events.items():
        share = float(p[event(z)].sum())
        hits = int(event(draws).sum())
        assert stats.binomtest(hits, n, share).pvalue > 1e-6, name
        for factor in (0.5, 2.0) if name == "tail" else (0.8, 1.2):
            assert stats.binomtest(hits, n, share * factor).pvalue < 1e-3, name
    assert abs(int((draws > 0).sum()) - int((draws < 0).sum())) < 5 * math.sqrt((draws != 0).sum())


@pytest.mark.statistical
@pytest.mark.parametrize("sigma", [1e6 + 0.1, 12345.678])
def test_wide_discrete_gaussian_noise_is_close_to_normal(sigma):
    """Flakiness 1e-6; a scale of 1.2 is rejected."""
    draws = discrete_gaussian(10_000, sigma, stream(seed=6)).numpy() / sigma
    assert stats.kstest(draws, "norm").pvalue > 1e-6 > stats.kstest(1.2 * draws, "norm").pvalue


def test_the_discrete_gaussian_with_tiny_sigma_gives_zeros():
    assert discrete_gaussian(2000, 1e-6, stream()).abs().max() == 0
    assert discrete_gaussian(0, 1.0, stream()).shape == (0,)


def test_discrete_gaussian_noise_depends_only_on_its_stream():
    first, again, other = (discrete_gaussian(50, 9.0, stream(step)) for step in (0, 0, 1))
    assert torch.equal(first, again) and (first == other).sum() < 15
    assert discrete_gaussian(8, 4.0, stream()).tolist() == PINNED


PINNED = [-2, -7, 6, 4, 0, 5, -4, 9]
"""A simulated run stays reproducible from one version to the next."""


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.inf, math.nan])
def test_the_discrete_gaussian_refuses_an_invalid_sigma(sigma):
    with pytest.raises(ConfigError, match="sigma"):
        discrete_gaussian(1, sigma, stream())


def test_the_noise_stream_continues_and_differs_per_purpose():
    """Two calls continue one keystream, which differs from coins, normals and other places."""
    key = NoiseKey.from_seed(0)
    whole = stream()(96)
    parts = stream()
    assert parts(1) + parts(32) + parts(63) == whole
    changes = [{"purpose": "x"}, {"entry": "e1"}, {"step": 1}]
    others = [key.stream(**({**PLACE, "step": 0} | change))(96) for change in changes]
    assert len({whole, *others, NoiseKey.from_seed(1).stream(**PLACE, step=0)(96)}) == 5
    coins = key.uniform(12, **PLACE, step=0)
    mine = torch.from_numpy(
        (np.frombuffer(whole, "<u8") >> np.uint64(11)).astype(np.float64) * 2.0**-53
    )
    assert not (coins == mine).any()


def hockey_stick(sigma, times, eps):
    """Return delta of `times` counts with noise, by summing max(0, P - exp(eps) Q) over all joint
    losses.
    """
    z, p = mass(sigma, math.ceil(12 * sigma) + 4)
    up = np.exp(((z - 1) / sigma) ** 2 / -2) / np.exp(-((z / sigma) ** 2) / 2).sum()
    # the joint loss is a function of the sum of the draws: loss = sum (1 - 2 z) / (2 s^2)
    joint_p = p
    joint_q = up
    for _ in range(times - 1):
        joint_p = np.convolve(joint_p, p)
        joint_q = np.convolve(joint_q, up)
    forth = np.maximum(joint_p - math.exp(eps) * joint_q, 0).sum()
    return max(forth, np.maximum(joint_q - math.exp(eps) * joint_p, 0).sum())


@pytest.mark.reference
@pytest.mark.parametrize(("sigma", "times"), [(1.0, 1), (1.0, 3), (4.4, 1), (4.4, 5), (20.0, 2)])
def test_epsilon_of_noisy_counts_equals_the_exact_law(sigma, times):
    """PLD is an upper bound within half a percent, and RDP lies above it; 2/3 of the noise costs
    more.
    """
    delta = 1e-5
    low = 0.0
    high = 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if hockey_stick(sigma, times, middle) > delta else (low, middle)
    charge = [Charge(1.0, sigma, times, "discrete-gaussian")]
    pld = epsilon(charge, delta=delta)
    assert high * (1 - 1e-9) <= pld <= high * 1.005 + 1e-3
    assert epsilon(charge, delta=delta, accountant="rdp") >= pld
    assert (
        epsilon([Charge(1.0, sigma * 2 / 3, times, "discrete-gaussian")], delta=delta) > 1.2 * high
    )


# --------------------------------------------------------------------------- counts


def test_values_outside_the_bins_are_skipped_or_refused():
    values = torch.tensor([0, 2, 2, 5, -1, 3])
    assert counted(values, 4, strict=False).tolist() == [1, 0, 2, 1]
    assert counted(torch.zeros(0, dtype=torch.int64), 3, strict=True).tolist() == [0, 0, 0]
    assert counted(torch.tensor([True, False, True]), 2, strict=True).tolist() == [1, 2]
    for wrong in (values[:4], values[4:]):
        with pytest.raises(DataError, match=r"a record is in bin (5|-1); allowed: 0 to 3"):
            counted(wrong, 4, strict=True)


@pytest.mark.parametrize("bins", [0, -3])
def test_a_histogram_with_less_than_one_bin_is_refused(bins):
    with pytest.raises(ConfigError, match="bins"):
        counted(torch.zeros(1, dtype=torch.int64), bins, strict=False)
    with pytest.raises(ConfigError, match="bins"):
        Frequency(bins=bins)


def test_bin_numbers_that_are_not_integers_are_refused():
    with pytest.raises(DataError, match=r"torch.float32; give whole numbers from 0 to 3"):
        counted(torch.zeros(3), 4, strict=False)


@pytest.mark.property
@settings(deadline=None)
@given(st.lists(st.integers(-3, 8), max_size=12), st.integers(-3, 8))
def test_one_record_changes_one_bin_count_by_1(values, more):
    before, after = (
        counted(torch.tensor(v, dtype=torch.int64), 5, strict=False)
        for v in (values, [*values, more])
    )
    moved = (after - before).tolist()
    assert sorted(moved) == ([0, 0, 0, 0, 1] if 0 <= more < 5 else [0] * 5)
