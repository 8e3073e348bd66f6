"""The sampler of rounded Gaussian noise: tables, both code paths, and draws."""

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from scipy import stats

from perdure.errors import PrivacyError
from perdure.privacy.noise import gaussian
from perdure.privacy.noise.compiled import gaussian_loops
from perdure.privacy.noise.gaussian import (
    COMPILED_FROM,
    PIECE,
    Loops,
    add_rounded_gaussian,
    cells_of,
    first_words,
    keeping,
    settle,
)
from perdure.privacy.noise.table import (
    COLUMN_BITS,
    CUT_BITS,
    DEVIATIONS,
    EARLY_BITS,
    LOG2_ERROR,
    counts_of,
    gaussian_table,
)

SCALES = (64.0, 100.5, 700.0, 1.1 * 2**11, 1.1 * 2**21)
mpmath.mp.prec = 300


def words(seed):
    """Return first and further words of a draw, from a public generator."""
    rng = np.random.default_rng(seed)

    def stream(n_bytes):
        return rng.integers(0, 2**64, n_bytes // 8, dtype=np.uint64).view(np.uint8)

    def blocks(numbers):
        mixed = numbers[:, 0] * np.uint64(2**33 + 1) + numbers[:, 1] + np.uint64(seed)
        own = np.random.Generator(np.random.Philox(key=seed)).integers(
            0, 2**64, (1 << 12, 2), dtype=np.uint64
        )
        return own[(mixed % np.uint64(1 << 12)).astype(np.int64)] ^ (
            mixed[:, None] * np.uint64(0x9E3779B97F4A7C15)
        )

    return stream, blocks


def drawn(n, scale, seed=0):
    total = np.zeros(n, dtype=np.int64)
    add_rounded_gaussian(total, gaussian_table(scale), *words(seed))
    return total


def probability(k, scale):
    """Return P(k) of the rounded Gaussian, by the complementary error function in 300 bits."""
    s = mpmath.mpf(scale) * mpmath.sqrt(2)
    k = abs(int(k))
    return (mpmath.erfc((2 * k - 1) / (2 * s)) - mpmath.erfc((2 * k + 1) / (2 * s))) / 2


# ---- the tables, read back as rational numbers


def outcome_probabilities(table):
    """Return the exact probability of every cell, through all tables, as fractions."""
    capacity = 2**CUT_BITS
    first = [0] * (table.tail + 1)
    for column in range(2**COLUMN_BITS):
        cut = int(table.cut[column])
        if cut:
            first[column] += cut
        if cut < capacity:
            first[int(table.alias[column])] += capacity - cut
    cells = [Fraction(count, 2**64) for count in first[:-1]]
    mass = Fraction(first[-1], 2**64)
    for number, ends in enumerate(table.ends):
        counts = np.diff(np.array([-1, *map(int, ends)], dtype=object))
        later = [mass * Fraction(int(count), 2**64) for count in counts]
        if number < len(table.ends) - 1:
            mass = later.pop()
        cells += later
    return cells


@pytest.mark.reference
@pytest.mark.parametrize("scale", SCALES)
def test_noise_table_probabilities_have_the_stated_error(scale):
    """The first integers of 200 cells, near and far, are compared with 300-bit values."""
    table = gaussian_table(scale)
    cells = outcome_probabilities(table)
    assert sum(cells) == 1
    width = 2**table.offset_bits
    chosen = np.unique(np.linspace(0, len(cells) - 1, 200).astype(int))
    # all draws that are kept, up to one factor: P(cell) / width is P(first integer)
    ratios = [
        mpmath.mpf(cells[j].numerator)
        / cells[j].denominator
        / width
        / probability(j * width, scale)
        for j in chosen
    ]
    spread = max(ratios) / min(ratios) - 1
    assert spread < 2 * mpmath.mpf(2) ** LOG2_ERROR
    assert table.log2_error <= LOG2_ERROR


@pytest.mark.reference
@pytest.mark.parametrize("scale", [700.0, 1.1 * 2**21, 2.0**38])
def test_the_noise_sampler_keeps_integers_with_exact_probability(scale):
    table = gaussian_table(scale)
    width = 2**table.offset_bits
    cells = np.repeat([0, 1, 300, 2000, len(table.slope) - 1], 5)
    offsets = np.tile([0, width // 3, width // 2, width - 2, width - 1], 5)
    kept = keeping(cells, offsets, table.slope[cells], table.offset_bits)
    for cell, offset, value in zip(cells, offsets, kept, strict=True):
        first = int(cell) * width
        exact = probability(first + int(offset), scale) / probability(first, scale)
        assert abs(int(value) / mpmath.mpf(2) ** 63 / exact - 1) < mpmath.mpf(2) ** -47


def test_early_acceptance_agrees_with_the_exact_comparison():
    """An integer that is kept early would be kept by the exact comparison, at every place of the
    cell.
    """
    for scale in SCALES[2:]:
        table = gaussian_table(scale)
        cells = np.arange(table.tail)
        last = np.full(len(cells), 2**table.offset_bits - 1)
        least = keeping(cells, last, table.slope[cells], table.offset_bits)
        assert (table.early[: table.tail].astype(np.uint64) << np.uint64(51) <= least).all()
        assert table.early[table.tail] == 0


def test_noise_table_counts_differ_from_exact_shares_by_below_1():
    weights = [3, 10**40, 7**30, 1, 2**120]
    counts = counts_of(weights)
    assert sum(counts) == 2**64
    assert all(
        abs(c - Fraction(w * 2**64, sum(weights))) < 1 for c, w in zip(counts, weights, strict=True)
    )


@pytest.mark.parametrize("scale", [63.9, 2.0**39 * 1.01, math.nan, math.inf])
def test_a_noise_scale_outside_the_tables_is_refused(scale):
    with pytest.raises(PrivacyError, match="allowed: 64 to 2\\^39"):
        gaussian_table(scale)


# ---- the two paths


@pytest.mark.parametrize("scale", [64.0, 700.0, 1.1 * 2**21, 2.0**38])
def test_the_compiled_sampler_draws_the_integers_of_numpy(scale):
    """The words include all zeros, all ones, and ties of thresholds."""
    table = gaussian_table(scale)
    small = (table.cut >> np.uint64(CUT_BITS - table.cut_bits), table.alias, table.early)
    own = np.random.default_rng(1).integers(0, 2**64, 5000, dtype=np.uint64)
    columns = np.arange(2048, dtype=np.uint64)
    ties = columns | small[0][:2048] << np.uint64(64 - table.cut_bits)
    own = np.concatenate([own, ties, np.array([0, 2**64 - 1], dtype=np.uint64)])
    results = []
    for path in (first_words, Loops(*gaussian_loops()).first_words):
        out = np.arange(len(own))
        open_at = np.empty(PIECE, dtype=np.int64)
        left = path(own, out, open_at, *small, table.offset_bits)
        results.append((out, open_at[:left].copy()))
    (mine, mine_open), (theirs, theirs_open) = results
    assert np.array_equal(mine, theirs) and np.array_equal(mine_open, theirs_open)
    assert set(range(5000, 5000 + 2048)) <= set(mine_open.tolist())


@pytest.mark.parametrize("scale", [64.0, 700.0, 1.1 * 2**21, 2.0**38])
def test_the_compiled_rejection_step_equals_the_numpy_step(scale):
    """Only coordinates left open by the first words are drawn, and both paths reject half of
    them.
    """
    table = gaussian_table(scale)
    first, second, third = np.random.default_rng(3).integers(0, 2**64, (3, 9000), dtype=np.uint64)
    first[:3000] |= np.uint64((2**EARLY_BITS - 1) << (COLUMN_BITS + 1))  # the largest numbers
    first[3000:6000] &= np.uint64(2**COLUMN_BITS - 1)  # the first integer of a cell, once -0
    third[:3000] |= np.uint64(2**64 - 2**54)
    results = []
    for path in (Loops(first_words, cells_of, settle), Loops(*gaussian_loops())):
        total = np.zeros(9000, dtype=np.int64)
        places = np.arange(9000)
        cell = path.cells(first, second, table.cut, table.alias, table.offset_bits)
        slope = table.slope[cell]
        left = path.settle(total, places, first, third, cell, slope, table.offset_bits)
        results.append((cell, total, places[:left]))
    (cells, totals, open_), (their_cells, their_totals, their_open) = results
    assert np.array_equal(cells, their_cells) and np.array_equal(totals, their_totals)
    assert np.array_equal(open_, their_open)
    assert len(open_) > 0 or scale == 64.0


def test_noise_drawn_in_pieces_equals_noise_drawn_at_once(monkeypatch):
    n = COMPILED_FROM - 1
    whole = drawn(n, 1.1 * 2**21)
    monkeypatch.setattr(gaussian, "PIECE", 100)
    assert np.array_equal(drawn(n, 1.1 * 2**21), whole)


# ---- what is drawn. Deterministic; under fresh words each comparison fails with probability 1e-6


@pytest.mark.statistical
@pytest.mark.parametrize(("scale", "bins"), [(64.0, 200), (700.0, 2000)])
def test_every_noise_integer_has_the_gaussian_frequency(scale, bins):
    n = 1_000_000
    k = np.arange(-bins, bins + 1)
    expected = stats.norm.cdf((k + 0.5) / scale) - stats.norm.cdf((k - 0.5) / scale)

    def p_value(p):
        values = drawn(n, scale)
        counts = np.bincount(values[np.abs(values) <= bins] + bins, minlength=len(k))
        observed = np.append(counts, n - counts.sum())
        return stats.chisquare(observed, np.append(p, 1 - p.sum()) * n).pvalue

    assert p_value(expected) > 1e-6
    wrong = np.where(k % 2 == 0, 1.02, 0.98) * expected
    assert p_value(wrong / wrong.sum() * expected.sum()) < 1e-6


@pytest.mark.statistical
def test_noise_moments_and_tails_equal_the_gaussian():
    """A scale off by 1 % or a tail off by a tenth is rejected."""
    z = drawn(1_000_000, 1.1 * 2**21) / (1.1 * 2**21)
    assert abs(z.mean()) < 5e-3 and z.std() == pytest.approx(1, abs=4e-3)
    assert stats.kstest(z[:200_000], "norm").pvalue > 1e-6
    for t in (1, 2, 3, 4):
        beyond = int((np.abs(z) > t).sum())
        p = 2 * stats.norm.sf(t)
        assert stats.binomtest(beyond, len(z), p).pvalue > 1e-6
        if t < 4:
            assert stats.binomtest(beyond, len(z), 1.1 * p).pvalue < 1e-3


def test_the_noise_sampler_can_draw_the_farthest_tail():
    """Words that choose the tail of every table give an integer beyond 15 deviations."""
    table = gaussian_table(1.1 * 2**21)
    places = np.arange(4)
    ones = np.uint64(2**64 - 1)
    cell = gaussian.in_tail(places, 0, table, lambda numbers: np.full_like(numbers, ones))
    assert (cell * 2**table.offset_bits / (1.1 * 2**21) > DEVIATIONS).all()
