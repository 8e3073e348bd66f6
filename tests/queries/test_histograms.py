"""Means, counts and selections: scale, noise, values outside of bins, and refusals."""

import math
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

from helpers.curator_harness import GRID, NOISY, SILENT, brightness, has_scale, labels, poisoned
from perdure.errors import ConfigError, DataError, PerdureError, PrivacyError
from perdure.privacy.noise.discrete import Frequency, Quantile
from perdure.privacy.noise.key import NoiseKey
from perdure.queries import releases

# --------------------------------------------------------------------------- means, counts, choices


@pytest.mark.statistical
def test_a_mean_and_its_noise_are_divided_by_the_declared_size(party, toy_stream):
    """The declared size is 96 for 24 records: noise 3 x 0.2 / 96, two-sided (flakiness 4e-8)."""
    stream = toy_stream()
    first = stream[0]
    more = replace(
        stream,
        experiences=(replace(first, train=replace(first.train, declared_size=96)), stream[1]),
    )

    def ones(forward, batch):
        return torch.zeros(len(batch), 4000).index_fill(1, torch.tensor([0]), 1.0)

    released = releases.mean(party(more, **NOISY).curator, ones, clip_norm=0.2, purpose="mean")[
        "value"
    ]
    assert has_scale(released[1:], 0.6 / 96)
    assert not has_scale(released[1:], 0.4 / 96) and not has_scale(released[1:], 0.9 / 96)
    assert float(released[0]) == pytest.approx(24 * 0.2 / 96, abs=5 * 0.6 / 96)
    exact = releases.mean(party(more).curator, ones, clip_norm=0.2, purpose="mean")["value"]
    assert float(exact[0]) == pytest.approx(24 / 96)


@pytest.mark.statistical
def test_a_histogram_has_integer_noise_of_the_stated_scale(party):
    """Two of 5,000 bins are filled; m = 3, two-sided (flakiness 4e-8)."""
    counts = releases.histogram(party(**NOISY).curator, labels, bins=5000, purpose="labels")
    assert counts.dtype == torch.int64 and counts.shape == (5000,)
    noise = counts[2:].double()
    assert has_scale(noise, 3.0) and not has_scale(noise, 2.0) and not has_scale(noise, 4.5)
    assert abs(float(noise.mean())) < 5.5 * 3 / 5000**0.5
    assert all(abs(int(count) - 12) <= 17 for count in counts[:2])


def test_a_record_outside_the_bins_is_skipped_only_under_privacy(party):
    """Under privacy an error would reveal that the record exists."""

    def beyond(batch):
        return 5 * batch.labels - 1

    ask = {
        "histogram": lambda c: releases.histogram(c, beyond, bins=5, purpose="x"),
        "top-k": lambda c: releases.top_k(c, beyond, bins=5, k=1, purpose="x"),
    }
    assert ask["histogram"](party(**SILENT).curator).tolist() == [0, 0, 0, 0, 12]
    assert ask["top-k"](party(**SILENT).curator).tolist() == [4]
    for one in ask.values():
        with pytest.raises(DataError, match="a record is in bin -1; allowed: 0 to 4"):
            one(party().curator)


def test_a_quantile_counts_nan_above_all_only_under_privacy(party, toy_stream):
    stream = toy_stream()
    for place in range(20):
        stream = poisoned(stream, place, math.nan)
    ask = partial(releases.quantile, of=brightness, q=0.5, candidates=[0.0, 5.0], purpose="x")
    # 20 of 24 lie beyond, so the last is nearer than the first
    assert ask(party(stream, **SILENT).curator) == 5.0
    with pytest.raises(DataError, match="20 records have NaN"):
        ask(party(stream).curator)


@pytest.mark.parametrize("q", [0.05, 0.5, 0.9])
def test_private_quantiles_of_many_records_are_accurate(q):
    """1,000 numbers at epsilon 0.5: a rank error of 80 has probability below 1e-6 (with 500
    candidates).
    """
    place = torch.Generator().manual_seed(0)
    values = torch.randn(1000, generator=place)
    grid = torch.linspace(-5, 5, 500)
    utility = Quantile(q=q, candidates=grid)
    from perdure.privacy.noise.discrete import exponential

    uniform = NoiseKey.from_seed(1).uniform(500, purpose="p", entry="e", step=0)
    (chosen,) = exponential(
        utility.scores(values, strict=True), 1, noise_multiplier=2.0, uniform=uniform
    ).tolist()
    assert abs(float((values < grid[chosen]).float().mean()) - q) < 0.08


def test_quantile_and_top_k_choices_depend_on_the_records(party):
    test = party(**(NOISY | {"release_noise": 0.05}))
    chosen = releases.quantile(
        test.curator, brightness, q=0.5, candidates=torch.tensor(GRID), purpose="x"
    )
    exact = releases.quantile(party().curator, brightness, q=0.5, candidates=GRID, purpose="x")
    assert (
        isinstance(chosen, float)
        and chosen == pytest.approx(exact)
        and min(abs(chosen - c) for c in GRID) < 1e-6
    )
    places = releases.top_k(test.curator, lambda b: 7 + 0 * b.labels, bins=50, k=3, purpose="y")
    assert places.dtype == torch.int64 and places[0] == 7 and len(places.unique()) == 3


@pytest.mark.parametrize("privacy", [{}, NOISY])
@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda c: releases.histogram(c, labels, bins=0, purpose="x"), "bins = 0"),
        (
            lambda c: releases.histogram(c, brightness, bins=3, purpose="x"),
            "float32; give whole numbers",
        ),
        (
            lambda c: releases.histogram(c, lambda b: b.inputs, bins=3, purpose="x"),
            r"`of` returns shape .*\(n,\)",
        ),
        (
            lambda c: releases.histogram(c, lambda b: b.labels.sum(), bins=3, purpose="x"),
            r"`of` returns shape \(\)",
        ),
        (lambda c: releases.top_k(c, labels, bins=4, k=5, purpose="x"), "k = 5.*1 to 4"),
        (lambda c: releases.top_k(c, labels, bins=4, k=0, purpose="x"), "k = 0"),
        (
            lambda c: releases.top_k(c, brightness, bins=4, k=1, purpose="x"),
            "float32; give whole numbers",
        ),
        (
            lambda c: releases.quantile(c, brightness, q=1.0, candidates=GRID, purpose="x"),
            "q = 1.0",
        ),
        (
            lambda c: releases.quantile(c, brightness, q=0.5, candidates=[2, 1], purpose="x"),
            "in increasing order",
        ),
        (
            lambda c: releases.quantile(c, brightness, q=0.5, candidates=[], purpose="x"),
            "candidates",
        ),
    ],
)
def test_invalid_queries_are_refused_before_any_charge(party, ask, message, privacy):
    test = party(**privacy)
    with pytest.raises(ConfigError, match=message) as error:
        ask(test.curator)
    assert "\n" not in str(error.value) and isinstance(error.value, PerdureError) and not test.trace


def test_select_refuses_score_classes_of_the_user(party):
    @dataclass
    class Own:
        k = 1

        def scores(self, values, *, strict):
            return 100 * values

    for privacy in ({}, NOISY):
        with pytest.raises(
            PrivacyError,
            match="Own has no known sensitivity; allowed utilities: Frequency, Quantile",
        ):
            party(**privacy).curator.select(labels, Own(), purpose="x")
    assert party().curator.select(labels, Frequency(bins=2), purpose="x").tolist() == [0]
