"""Releases about private records: exact without privacy; bounded, charged and noisy under
privacy.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.curator_harness import (
    GRID,
    JOINT,
    NOISY,
    ROUNDING,
    SILENT,
    brightness,
    flat,
    labels,
    moved,
    nobody,
    one_hot,
    poisoned,
    without,
)
from perdure.contract.combine import Combine
from perdure.contract.forward import Forward
from perdure.contract.plan import PrivacyCost
from perdure.contract.strategy import Strategy
from perdure.data.records import Batch
from perdure.errors import BudgetError, PrivacyError
from perdure.learner.learner import Learner
from perdure.planning.budget import planned
from perdure.privacy.accounting.charges import Charge, merged
from perdure.privacy.clipping.clip import Clip, clip_rows
from perdure.privacy.private_sum import Schedule
from perdure.privacy.settings import Privacy
from perdure.queries import releases
from perdure.queries.gram import Gram
from perdure.strategies import EWC

ASKED = {
    "sum": lambda c: c.release(lambda f, b: b.inputs, clip_norm=0.7, purpose="sum"),
    "mean": lambda c: releases.mean(c, lambda f, b: b.inputs, clip_norm=0.7, purpose="mean"),
    "gram": lambda c: c.release(JOINT, clip_norm=1.0, purpose="gram"),
    "histogram": lambda c: releases.histogram(c, labels, bins=4, purpose="labels"),
    "quantile": lambda c: releases.quantile(
        c, brightness, q=0.3, candidates=GRID, purpose="brightness"
    ),
    "top-k": lambda c: releases.top_k(c, labels, bins=4, k=2, purpose="frequent"),
}
COSTS = {  # multiplier, mechanism, how often
    "sum": (3.0, "gaussian", 1),
    "mean": (3.0, "gaussian", 1),
    "gram": (3.0, "gaussian", 1),
    "histogram": (3.0, "discrete-gaussian", 1),
    "quantile": (1.5, "exponential", 1),
    "top-k": (1.5, "exponential", 2),
}
every = pytest.mark.parametrize("asked", ASKED)


# --------------------------------------------------------------------------- every release


@every
def test_a_release_is_charged_once_before_its_noise_is_drawn(party, asked):
    test = party(**NOISY)
    ASKED[asked](test.curator)
    assert test.trace == [
        "ledger.before-append",
        "ledger.appended",
        "ledger.head-written",
        "noise.drawn",
    ]
    (entry,) = test.ledger.entries
    multiplier, mechanism, times = COSTS[asked]
    assert (entry.mechanism, entry.noise_multiplier, entry.steps) == (mechanism, multiplier, times)
    assert (entry.sampling, entry.scope, entry.first_step) == ("none", {"experience-0": 1.0}, 0)
    assert entry.purpose.startswith("release:") and entry.simulated


@every
def test_a_release_without_privacy_is_exact(party, asked):
    test = party()
    records = test.stream[0].train
    rows = test.model.features(records.inputs).detach()
    y = F.one_hot(records.labels, 4).float()
    expected = {
        "sum": records.inputs.sum(0),
        "mean": records.inputs.mean(0),
        "gram": {"gram": rows.T @ rows, "cross": rows.T @ y, "totals": y.sum(0)},
        "histogram": torch.tensor([12, 12, 0, 0]),
        "top-k": torch.tensor([0, 1]),
        "quantile": min(
            GRID, key=lambda c: abs(float((records.inputs.mean(1) < c).sum()) - 0.3 * 24)
        ),
    }
    torch.testing.assert_close(
        flat(ASKED[asked](test.curator)), flat(expected[asked]), rtol=1e-5, atol=1e-6
    )


@every
def test_a_release_with_very_small_noise_is_the_clipped_sum(party, asked):
    """The noise is 1e-6; without clipping the result equals that without privacy."""
    test = party(**SILENT)
    exact = party()
    ask = {
        "sum": lambda c: c.release(lambda f, b: b.inputs, clip_norm=10.0, purpose="sum"),
        "mean": lambda c: releases.mean(c, lambda f, b: b.inputs, clip_norm=10.0, purpose="mean"),
        "gram": lambda c: c.release(JOINT, clip_norm=JOINT.norm(6**0.5), purpose="gram"),
        # both bins hold 12 records: noise says which comes first
        "top-k": lambda c: ASKED["top-k"](c).sort().values,
    }.get(asked, ASKED[asked])
    torch.testing.assert_close(
        flat(ask(test.curator)), flat(ask(exact.curator)), rtol=1e-5, atol=5e-4
    )


@every
def test_a_release_without_records_is_only_noise(party, toy_stream, asked):
    test = party(nobody(toy_stream()), **NOISY)
    full = party(**NOISY)
    answer = ASKED[asked](test.curator)
    assert flat(answer).shape == flat(ASKED[asked](full.curator)).shape and bool(
        flat(answer).isfinite().all()
    )
    assert len(test.ledger.entries) == 1
    if asked in ("sum", "mean", "gram"):
        assert bool((flat(answer) != 0).all())


@every
def test_equal_releases_have_separate_noise_repeated_on_restart(party, asked):
    noisier = NOISY | {"noise_multiplier": 20.0}
    ask = {
        "quantile": lambda c: releases.quantile(
            c, brightness, q=0.5, candidates=torch.arange(100_000) / 1e5, purpose="x"
        ),
        "top-k": lambda c: releases.top_k(c, labels, bins=10_000, k=5, purpose="x"),
    }.get(asked, ASKED[asked])
    test = party(**noisier)
    first, second = (flat(ask(test.curator)) for _ in "ab")
    assert (first != second).any()
    entries = test.ledger.entries
    assert len(entries) == 2 and entries[0].purpose == entries[1].purpose
    assert entries[1].first_step == entries[0].first_step + entries[0].steps
    test.open()
    again = [flat(ask(test.curator)) for _ in "ab"]
    assert torch.equal(first, again[0]) and torch.equal(second, again[1]) and len(entries) == 2


@pytest.mark.parametrize("asked", ["histogram", "top-k", "quantile"])
def test_a_changed_release_after_a_restart_is_a_new_entry(party, asked):
    """The name and number are the same, but the values differ, so the noise must differ."""
    other = {
        "histogram": lambda c: releases.histogram(
            c, lambda b: 3 - b.labels, bins=4, purpose="labels"
        ),
        "quantile": lambda c: releases.quantile(
            c, brightness, q=0.6, candidates=GRID, purpose="brightness"
        ),
        "top-k": lambda c: releases.top_k(
            c, lambda b: 3 - b.labels, bins=4, k=2, purpose="frequent"
        ),
    }
    test = party(**NOISY)
    first = ASKED[asked](test.curator)
    second = other[asked](test.open())
    assert len(test.ledger.entries) == 2 and test.trace.count("noise.drawn") == 2
    if asked == "histogram":
        noise = first - torch.tensor([12, 12, 0, 0]), second - torch.tensor([0, 0, 12, 12])
        assert not torch.equal(*noise)


# -------------------------------------------------------------------------- one record more or less


BOUNDS = {"sum": 0.7, "mean": 0.7, "gram": 1.0}


@every
@pytest.mark.parametrize("value", [0.5, 1e20, math.nan, math.inf, -math.inf])
def test_one_record_changes_an_exact_sum_within_its_bound(party, toy_stream, asked, value):
    stream = poisoned(toy_stream(), 3, value)
    change = flat(moved(party, stream, 3, ASKED[asked]))
    assert bool(change.isfinite().all())
    if asked in BOUNDS:
        assert float(change.norm()) <= BOUNDS[asked] * ROUNDING
        assert float(change.norm()) > 0.4 * BOUNDS[asked] or not math.isfinite(value) or value > 1
    elif asked == "histogram":
        assert sorted(change.tolist()) == [0, 0, 0, 1]
    else:
        assert float(change.max() - change.min()) <= 1 + 1e-9 and float(change.abs().max()) > 0.1


COUPLED = {
    "by their number": lambda forward, batch: batch.inputs.roll(len(batch), 1),
    "by the first": lambda forward, batch: (
        batch.inputs * (batch.inputs[:1] > batch.inputs[:1].mean())
    ),
    "by the mean": lambda forward, batch: (
        (batch.inputs > batch.inputs.mean(0)).float().roll(len(batch), 1)
    ),
}


@pytest.mark.parametrize("couple", COUPLED)
@pytest.mark.parametrize("targets", [None, one_hot])
def test_gram_features_are_computed_on_each_record_alone(party, toy_stream, couple, targets):
    query = Gram(COUPLED[couple], targets)
    stream = toy_stream()
    change = moved(party, stream, 0, lambda c: c.release(query, clip_norm=1.0, purpose="gram"))
    assert float(flat(change).norm()) <= ROUNDING
    # the same rows taken from the whole batch: clipped as well, yet one record moves them by far
    # more
    whole, fewer = (Batch.current(s[0].train, 0) for s in (stream, without(stream, 0)))
    sums = [
        clip_rows(query(Forward(nn.Identity()), rows), Clip(norm=1.0)) for rows in (whole, fewer)
    ]
    gap = flat(
        {n: rows.double().sum(0) - sums[1][n].double().sum(0) for n, rows in sums[0].items()}
    )
    assert float(gap.norm()) > 1.5


@pytest.mark.parametrize(
    "of",
    [
        lambda b: b.inputs[:, 0].argsort().argsort() % 4,
        lambda b: (b.labels + len(b)) % 4,
        lambda b: b.labels.roll(1),
    ],
)
def test_histogram_bins_are_computed_on_each_record_alone(party, toy_stream, of):
    for ask in (
        lambda c: releases.histogram(c, of, bins=4, purpose="x"),
        lambda c: releases.top_k(c, of, bins=4, k=1, purpose="x"),
    ):
        change = flat(moved(party, toy_stream(), 0, ask))
        assert sorted(change.tolist()) == [0, 0, 0, 1]


@pytest.mark.parametrize(
    "of",
    [
        lambda b: torch.rand(len(b)),
        lambda b: b.labels * b.labels[0].item(),
        lambda b: b.labels if b.labels[0] else 1 - b.labels,
    ],
)
def test_a_release_refuses_queries_that_need_several_records(party, of):
    test = party(**NOISY)
    with pytest.raises(PrivacyError, match=r"one|alone.*torch.where \(vmap") as error:
        releases.histogram(test.curator, of, bins=4, purpose="x")
    assert "\n" not in str(error.value) and not test.trace
    query = Gram(lambda f, b: b.inputs * of(b)[:, None])
    with pytest.raises(PrivacyError, match=r"torch.where \(vmap"):
        test.curator.release(query, clip_norm=1.0, purpose="x")


def test_an_error_of_user_code_in_a_query_is_raised_unchanged(party):
    def broken(batch):
        raise RuntimeError("my own")

    with pytest.raises(RuntimeError, match="my own"):
        releases.histogram(party(**NOISY).curator, broken, bins=4, purpose="x")


# --------------------------------------------------------------------------- planned and granted


@dataclass(frozen=True, kw_only=True)
class Curious(Strategy):
    """A strategy that asks for one release of each kind, and for `more`, after every experience."""

    more: str = ""
    privacy_cost: ClassVar[PrivacyCost] = PrivacyCost(releases=2, histograms=1, selections=3)

    def after_experience(self, curator, params, state):
        for asked in ("mean", "gram", "histogram", "quantile", "top-k", self.more):
            if asked:
                ASKED[asked](curator)
        return state


def learner(stream, model, strategy, **privacy):
    made = Learner(
        model=model(stream),
        strategy=strategy,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        iterations=2,
        batch_size=8,
        privacy=Privacy(**({"seed": 0, "delta": 1e-2} | privacy)),
    )
    made.prepare(stream)
    return made


@pytest.mark.slow
def test_declared_releases_are_planned_granted_and_charged(toy_stream, toy_model):
    made = learner(toy_stream(), toy_model, Curious(), epsilon=8.0)
    made.fit(toy_stream())
    ledger = made.private_sum.ledger
    noise = made.private_sum.schedule.noise[0]
    for partition, history in planned(made.training, Schedule(noise=(noise,))).items():
        assert merged(ledger.charges(partition)) == merged(history)
        for charge in (
            Charge(1.0, 4 * noise, 2, "grid-gaussian"),
            Charge(1.0, 4 * noise, 1, "discrete-gaussian"),
            Charge(1.0, 2 * noise, 3, "exponential"),
        ):
            assert charge in history
    assert 7.0 < ledger.epsilon(delta=1e-2) <= 8.0


@pytest.mark.parametrize(
    ("more", "refused"),
    [
        ("sum", "1 steps of grid-gaussian noise"),
        ("histogram", "1 steps of discrete-gaussian noise"),
        ("quantile", "1 steps of exponential noise"),
        ("top-k", "2 steps of exponential noise"),
    ],
)
def test_an_undeclared_release_is_refused(toy_stream, toy_model, more, refused):
    made = learner(toy_stream(), toy_model, Curious(more=more), epsilon=8.0)
    with pytest.raises(BudgetError, match=f"{refused}.*the grant allows 0 such steps"):
        made.fit(toy_stream())


def test_combine_makes_the_releases_of_all_its_parts(toy_stream, toy_model):
    both = Combine(Curious(), EWC(strength=1.0), Curious())
    assert both.privacy_cost == PrivacyCost(releases=5, histograms=2, selections=6)
    made = learner(toy_stream(), toy_model, both, noise_multiplier=1.0)
    made.fit(toy_stream())
    ledger = made.private_sum.ledger
    for partition, history in planned(made.training, Schedule(noise=(1.0,))).items():
        assert merged(ledger.charges(partition)) == merged(history)
