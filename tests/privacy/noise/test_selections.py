import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from perdure.errors import ConfigError, DataError
from perdure.privacy.noise.discrete import Frequency, Quantile, best, exponential
from perdure.privacy.noise.key import NoiseKey

PLACE = {"purpose": "release:test", "entry": "e0"}


def chances(scores, k, noise_multiplier):
    """Return the exact probability of every ordered choice of k without repetition."""
    weights = torch.softmax(scores / noise_multiplier, 0).tolist()
    found = {}
    for order in itertools.permutations(range(len(weights)), k):
        left = 1.0
        chance = 1.0
        for place in order:
            chance *= weights[place] / left
            left -= weights[place]
        found[order] = chance
    return found


def neighbours(universe, largest):
    """Return all data sets of up to `largest` records, each with one record more, as ordered
    tuples.
    """
    for n in range(largest + 1):
        for values in itertools.combinations_with_replacement(universe, n):
            for more in universe:
                yield values, tuple(sorted((*values, more), key=universe.index))


def of_tuples(scores):
    """Cache the scores of each data set by its tuple."""
    return functools.cache(lambda values: scores(torch.tensor(values, dtype=torch.float64)))


def worst_ratio(pairs, scores, k, noise_multiplier):
    """Return the largest |log P(output | D) / P(output | D')|, in units of epsilon = 1 / noise
    multiplier.
    """
    likely = functools.cache(lambda data: chances(scores(data), k, noise_multiplier))
    worst = 0.0
    for without, within in pairs:
        mine, theirs = (likely(data) for data in (without, within))
        worst = max(worst, *(abs(math.log(mine[order] / theirs[order])) for order in mine))
    return worst * noise_multiplier


@pytest.mark.parametrize("noise_multiplier", [0.4, 2.0])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_one_record_changes_top_k_likelihood_by_k_epsilon(k, noise_multiplier):
    """Exact over all data sets of up to 4 records, some of them in no bin; nearly a whole epsilon
    is used.
    """

    @of_tuples
    def scores(values):
        return Frequency(bins=4, k=k).scores(values.long(), strict=False)

    worst = worst_ratio(neighbours((0, 1, 2, 3, 9), 4), scores, k, noise_multiplier)
    assert worst <= k * (1 + 1e-9)
    assert worst > 0.5 * k
    sharper = worst_ratio(
        neighbours((0, 1, 2, 3, 9), 4), lambda v: 2 * scores(v), k, noise_multiplier
    )
    assert sharper > k  # at twice the scores the bound would be broken


@pytest.mark.parametrize("noise_multiplier", [0.3, 2.0])
@pytest.mark.parametrize("q", [0.1, 0.5, 0.75])
def test_one_record_changes_quantile_likelihood_by_epsilon(q, noise_multiplier):
    """Exact over all data sets of up to 5 records: on candidates, between them, beyond them and
    NaN.
    """
    universe = (-1.0, 1.0, 2.0, 2.5, 9.0, math.nan)
    grid = torch.tensor([0.0, 1.0, 2.0, 4.0])
    utility = Quantile(q=q, candidates=grid)

    @of_tuples
    def scores(values):
        return utility.scores(values, strict=False)

    worst = worst_ratio(neighbours(universe, 5), scores, 1, noise_multiplier)
    assert worst <= 1 + 1e-9
    doubled = worst_ratio(neighbours(universe, 5), lambda v: 2 * scores(v), 1, noise_multiplier)
    assert doubled > 1  # without the half of a score that is not monotone, it would be broken
    moves = [scores(more) - scores(less) for less, more in neighbours(universe, 5)]
    assert max(float(move.abs().max()) for move in moves) <= 0.5 + 1e-12
    # not monotone
    assert any(float(move.max()) > 0.01 and float(move.min()) < -0.01 for move in moves)


@pytest.mark.property
@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.floats(-5, 5) | st.just(math.nan), max_size=9),
    st.floats(-5, 5),
    st.floats(0.02, 0.98),
    st.lists(st.floats(-6, 6), min_size=1, max_size=6, unique=True),
)
def test_one_record_changes_quantile_scores_by_at_most_half(values, more, q, grid):
    utility = Quantile(q=q, candidates=torch.tensor(sorted(grid), dtype=torch.float64))
    before, after = (
        utility.scores(torch.tensor(v, dtype=torch.float64), strict=False)
        for v in (values, [*values, more])
    )
    assert float((after - before).abs().max()) <= 0.5 + 1e-9


def test_a_quantile_score_is_the_distance_from_the_rank():
    values = torch.tensor([1.5, 2.5, 2.6, 7.0])
    grid = [0.0, 2.0, 3.0, 9.0]
    below = torch.tensor([0.0, 1.0, 3.0, 4.0])  # no record equals a candidate
    for q in (0.25, 0.5, 0.9):
        scores = Quantile(q=q, candidates=torch.tensor(grid)).scores(values, strict=True)
        torch.testing.assert_close(scores, -(below - 4 * q).abs().double() / (2 * max(q, 1 - q)))


def test_quantile_finds_a_value_shared_by_many_records():
    """100 records are at 5, so the median is 5, which #{x < c} alone would not show."""
    utility = Quantile(q=0.5, candidates=torch.arange(11.0))
    scores = utility.scores(torch.full((100,), 5.0), strict=True)
    assert scores.tolist() == [-50.0] * 5 + [0.0] + [-50.0] * 5
    numbers = torch.cat([torch.full((30,), 1.0), torch.full((50,), 4.0), torch.full((20,), 9.0)])
    chosen = [
        int(Quantile(q=q, candidates=torch.arange(11.0)).scores(numbers, strict=True).argmax())
        for q in (0.1, 0.5, 0.79, 0.9)
    ]
    assert chosen == [1, 4, 4, 9]


def test_quantile_counts_nan_above_all_candidates_or_refuses():
    values = torch.tensor([math.nan, 0.0, math.inf])
    utility = Quantile(q=0.5, candidates=torch.tensor([1.0, 2.0]))
    assert torch.equal(
        utility.scores(values, strict=False),
        utility.scores(torch.tensor([math.inf, 0.0, 5.0]), strict=True),
    )
    with pytest.raises(DataError, match="1 records have NaN"):
        utility.scores(values, strict=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": 0.0}, "q = 0.0"),
        ({"q": 1.0}, "q = 1.0"),
        ({"q": math.nan}, "q = nan"),
        ({"candidates": torch.tensor([1.0, 1.0])}, "candidates"),
        ({"candidates": torch.tensor([2.0, 1.0])}, "in increasing order"),
        ({"candidates": torch.tensor([])}, "candidates"),
        ({"candidates": torch.tensor([[1.0]])}, "one row"),
        ({"candidates": torch.tensor([0.0, math.inf])}, "finite"),
    ],
)
def test_quantile_refuses_invalid_arguments_in_one_line(change, message):
    with pytest.raises(ConfigError, match=message) as error:
        Quantile(**{"q": 0.5, "candidates": torch.tensor([0.0, 1.0])} | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("k", [0, 5, -1])
def test_top_k_refuses_k_above_the_number_of_bins(k):
    with pytest.raises(ConfigError, match=r"k = .*1 to 4, the number of bins"):
        Frequency(bins=4, k=k)


def test_the_highest_scores_are_selected_in_falling_order():
    assert best(torch.tensor([1.0, 3.0, 3.0, 0.0]), 3).tolist() == [1, 2, 0]


@pytest.mark.statistical
@pytest.mark.parametrize("k", [1, 2])
def test_selections_have_exponential_mechanism_probabilities(k):
    """Chi-square over 10,000 draws with flakiness 1e-6; noise of 2/3 and 3/2 is rejected at
    1e-6.
    """
    key = NoiseKey.from_seed(8)
    n = 10_000
    scores = torch.tensor([0.0, 2.0, 3.0, 1.0], dtype=torch.float64)
    noise = 1.5
    drawn = [
        tuple(exponential(scores, k, noise_multiplier=noise, uniform=own).tolist())
        for own in key.uniform(4 * n, **PLACE, step=0).view(n, 4)
    ]

    def p_value(multiplier):
        law = chances(scores, k, multiplier)
        return stats.chisquare(
            [drawn.count(order) for order in law], [n * p for p in law.values()]
        ).pvalue

    assert p_value(noise) > 1e-6
    assert p_value(noise * 2 / 3) < 1e-6 > p_value(noise * 3 / 2)


def test_gumbel_noise_is_finite_at_both_ends():
    ends = torch.tensor([0.0, 1 - 2.0**-53, 0.5], dtype=torch.float64)
    for far in (33.0, 41.2):
        chosen = exponential(
            torch.tensor([far, 0.0, -99.0]).double(), 1, noise_multiplier=1.0, uniform=ends
        )
        # -3.60 is the least there is, 37.43 the greatest
        assert chosen.tolist() == [1 if far < 41 else 0]
