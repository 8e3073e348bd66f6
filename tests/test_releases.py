"""What may be asked of private records: exact without privacy, bounded, charged and noised with it."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from perdure import releases
from perdure.budget import planned
from perdure.combine import Combine
from perdure.curator import Curator
from perdure.errors import BudgetError, ConfigError, DataError, PerdureError, PrivacyError
from perdure.facts import contexts
from perdure.learner import Learner
from perdure.models import mlp
from perdure.privacy.accounting import Charge, merged
from perdure.privacy.clipping import Clip, clip_rows
from perdure.privacy.discrete import Frequency, Quantile
from perdure.privacy.ledger import Ledger
from perdure.privacy.mechanism import Mechanism, Schedule
from perdure.privacy.noise import NoiseKey
from perdure.privacy.policy import Privacy
from perdure.queries import Gram, bounded_sum, svec, unsvec
from perdure.records import Batch, Records
from perdure.strategies import EWC
from perdure.strategy import Asks, Forward, Plan, Strategy

ROUNDING = 1 + 1e-5
NOISY = {"noise_multiplier": 1.0, "release_noise": 3.0, "seed": 0}
SILENT = {"noise_multiplier": 1e-3, "release_noise": 1e-3, "seed": 0}
GRID = [0.1 * i for i in range(11)]


class Listening(Mechanism):
    """Keeps what it is about to put noise on."""

    def __init__(self, **parts):
        super().__init__(**parts)
        self.heard = []

    def release(self, clipped, **facts):
        def kept(clip):
            self.heard.append(clipped(clip))
            return self.heard[-1]

        return super().release(kept, **facts)

    def count(self, counts, **facts):
        self.heard.append({"counts": counts})
        return super().count(counts, **facts)

    def select(self, scores, **facts):
        self.heard.append({"scores": scores})
        return super().select(scores, **facts)


class Party:
    """A curator on the toy stream's first experience, and the ledger behind it."""

    def __init__(self, stream, model, *, trace=None, **privacy):
        self.trace, self.mechanism = [], None
        if privacy:
            key = NoiseKey.from_seed(0)
            self.ledger = Ledger.open(None, key=key, trace=self.trace.append)
            for e in stream:
                self.ledger.declare(e.train.partition, e.train.declared_size)
            asked = Privacy(**privacy)
            schedule = Schedule(noise=(asked.noise_multiplier,))
            self.mechanism = Listening(privacy=asked, schedule=schedule, ledger=self.ledger, key=key)
            self.trace.clear()
        self.stream, self.model = stream, model
        self.curator = Curator(seed=0, batch_size=8, mechanism=self.mechanism)
        self.open()

    def open(self):
        at = contexts(self.stream, "cpu")(0)
        self.curator.open(self.stream.experiences[:1], Plan(), at, Forward(self.model))
        return self.curator


@pytest.fixture
def party(toy_stream, toy_model):
    def make(stream=None, model=None, **privacy):
        stream = stream or toy_stream()
        return Party(stream, model or toy_model(stream).eval(), **privacy)

    return make


def changed(stream, change):
    """The stream with other records in its first experience; what is declared stays."""
    first = stream[0]
    records = replace(change(first.train), declared_size=first.train.declared_size)
    return replace(stream, experiences=(replace(first, train=records), *stream.experiences[1:]))


def without(stream, place):
    return changed(stream, lambda records: records.take(torch.arange(len(records)) != place))


def nobody(stream):
    return changed(stream, lambda records: records.take(torch.zeros(0, dtype=torch.int64)))


def labels(batch):
    return batch.labels


def brightness(batch):
    return batch.inputs.mean(1)


def features(forward, batch):
    return forward.features(batch.inputs)


def one_hot(forward, batch):
    return F.one_hot(batch.labels, 4).float()


JOINT = Gram(features, one_hot, weight=2.0, totals=0.5)
ASKED = {
    "sum": lambda c: c.release(lambda f, b: b.inputs, clip_norm=0.7, purpose="sum"),
    "mean": lambda c: releases.mean(c, lambda f, b: b.inputs, clip_norm=0.7, purpose="mean"),
    "gram": lambda c: c.release(JOINT, clip_norm=1.0, purpose="gram"),
    "histogram": lambda c: releases.histogram(c, labels, bins=4, purpose="labels"),
    "quantile": lambda c: releases.quantile(c, brightness, q=0.3, candidates=GRID, purpose="brightness"),
    "top-k": lambda c: releases.top_k(c, labels, bins=4, k=2, purpose="frequent"),
}
COSTS = {  # multiplier, mechanism, how often
    "sum": (3.0, "gaussian", 1), "mean": (3.0, "gaussian", 1), "gram": (3.0, "gaussian", 1),
    "histogram": (3.0, "discrete-gaussian", 1), "quantile": (1.5, "exponential", 1), "top-k": (1.5, "exponential", 2),
}  # fmt: skip
every = pytest.mark.parametrize("asked", ASKED)


def flat(answer):
    parts = answer.values() if isinstance(answer, dict) else [torch.as_tensor(answer)]
    return torch.cat([part.detach().double().flatten() for part in parts])


# --------------------------------------------------------------------------- every release


@every
def test_a_release_is_charged_once_and_before_its_noise_is_drawn(party, asked):
    test = party(**NOISY)
    ASKED[asked](test.curator)
    assert test.trace == ["ledger.before-append", "ledger.appended", "ledger.head-written", "noise.drawn"]
    (entry,), (multiplier, mechanism, times) = test.ledger.entries, COSTS[asked]
    assert (entry.mechanism, entry.noise_multiplier, entry.steps) == (mechanism, multiplier, times)
    assert (entry.sampling, entry.scope, entry.first_step) == ("none", {"experience-0": 1.0}, 0)
    assert entry.purpose.startswith("release:") and entry.simulated


@every
def test_without_privacy_it_is_exact(party, asked):
    test = party()
    records = test.stream[0].train
    rows = test.model.features(records.inputs).detach()
    y = F.one_hot(records.labels, 4).float()
    expected = {
        "sum": records.inputs.sum(0), "mean": records.inputs.mean(0),
        "gram": {"gram": rows.T @ rows, "cross": rows.T @ y, "totals": y.sum(0)},
        "histogram": torch.tensor([12, 12, 0, 0]), "top-k": torch.tensor([0, 1]),
        "quantile": min(GRID, key=lambda c: abs(float((records.inputs.mean(1) < c).sum()) - 0.3 * 24)),
    }  # fmt: skip
    torch.testing.assert_close(flat(ASKED[asked](test.curator)), flat(expected[asked]), rtol=1e-5, atol=1e-6)


@every
def test_with_next_to_no_noise_it_is_the_clipped_answer(party, asked):
    """Noise of 1e-6; the same as without privacy where nothing is clipped."""
    test, exact = party(**SILENT), party()
    ask = {
        "sum": lambda c: c.release(lambda f, b: b.inputs, clip_norm=10.0, purpose="sum"),
        "mean": lambda c: releases.mean(c, lambda f, b: b.inputs, clip_norm=10.0, purpose="mean"),
        "gram": lambda c: c.release(JOINT, clip_norm=JOINT.norm(6**0.5), purpose="gram"),
    }.get(asked, ASKED[asked])
    torch.testing.assert_close(flat(ask(test.curator)), flat(ask(exact.curator)), rtol=1e-5, atol=5e-4)


@every
def test_nobody_gets_an_answer_too(party, toy_stream, asked):
    test, full = party(nobody(toy_stream()), **NOISY), party(**NOISY)
    answer = ASKED[asked](test.curator)
    assert flat(answer).shape == flat(ASKED[asked](full.curator)).shape and bool(flat(answer).isfinite().all())
    assert len(test.ledger.entries) == 1
    if asked in ("sum", "mean", "gram"):
        assert bool((flat(answer) != 0).all())


@every
def test_two_of_one_purpose_differ_and_a_restart_repeats_them(party, asked):
    noisier = NOISY | {"noise_multiplier": 20.0}
    ask = {
        "quantile": lambda c: releases.quantile(
            c, brightness, q=0.5, candidates=torch.arange(10_000) / 1e4, purpose="x"
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
def test_another_question_after_a_restart_is_another_entry(party, asked):
    """Under one name and number, but of other records' values: never the same noise on another answer."""
    other = {
        "histogram": lambda c: releases.histogram(c, lambda b: 3 - b.labels, bins=4, purpose="labels"),
        "quantile": lambda c: releases.quantile(c, brightness, q=0.6, candidates=GRID, purpose="brightness"),
        "top-k": lambda c: releases.top_k(c, lambda b: 3 - b.labels, bins=4, k=2, purpose="frequent"),
    }
    test = party(**NOISY)
    first = ASKED[asked](test.curator)
    second = other[asked](test.open())
    assert len(test.ledger.entries) == 2 and test.trace.count("noise.drawn") == 2
    if asked == "histogram":
        noise = first - torch.tensor([12, 12, 0, 0]), second - torch.tensor([0, 0, 12, 12])
        assert not torch.equal(*noise)


# --------------------------------------------------------------------------- one record more or less


def moved(party, stream, place, ask, **privacy):
    """How far dropping one record moves what is summed, name by name, before noise."""
    heard = []
    for each in (stream, without(stream, place)):
        test = party(each, **(SILENT | privacy))
        ask(test.curator)
        heard.append(test.mechanism.heard[-1])
    return {name: heard[0][name].double() - heard[1][name].double() for name in heard[0]}


def poisoned(stream, place, value):
    def change(records):
        inputs = records.inputs.clone()
        inputs[place, :2] = value
        return replace(records, inputs=inputs)

    return changed(stream, change)


BOUNDS = {"sum": 0.7, "mean": 0.7, "gram": 1.0}


@every
@pytest.mark.parametrize("value", [0.5, 1e20, math.nan, math.inf, -math.inf])
def test_one_record_moves_what_is_summed_by_its_bound_at_most(party, toy_stream, asked, value):
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
    "by the first": lambda forward, batch: batch.inputs * (batch.inputs[:1] > batch.inputs[:1].mean()),
    "by the mean": lambda forward, batch: (batch.inputs > batch.inputs.mean(0)).float().roll(len(batch), 1),
}


@pytest.mark.parametrize("couple", COUPLED)
@pytest.mark.parametrize("targets", [None, one_hot])
def test_features_that_would_couple_records_see_one_at_a_time(party, toy_stream, couple, targets):
    query, stream = Gram(COUPLED[couple], targets), toy_stream()
    change = moved(party, stream, 0, lambda c: c.release(query, clip_norm=1.0, purpose="gram"))
    assert float(flat(change).norm()) <= ROUNDING
    # the same rows taken from the whole batch: clipped as well, yet one record moves them by far more
    whole, fewer = (Batch.current(s[0].train, 0) for s in (stream, without(stream, 0)))
    sums = [clip_rows(query(Forward(nn.Identity()), rows), Clip(norm=1.0)) for rows in (whole, fewer)]
    gap = flat({n: rows.double().sum(0) - sums[1][n].double().sum(0) for n, rows in sums[0].items()})
    assert float(gap.norm()) > 1.5


@pytest.mark.parametrize(
    "of",
    [lambda b: b.inputs[:, 0].argsort().argsort() % 4, lambda b: (b.labels + len(b)) % 4, lambda b: b.labels.roll(1)],
)
def test_bins_that_would_couple_records_see_one_at_a_time(party, toy_stream, of):
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
def test_what_cannot_be_asked_about_one_record_is_refused(party, of):
    test = party(**NOISY)
    with pytest.raises(PrivacyError, match=r"one|alone.*torch.where \(vmap") as error:
        releases.histogram(test.curator, of, bins=4, purpose="x")
    assert "\n" not in str(error.value) and not test.trace
    query = Gram(lambda f, b: b.inputs * of(b)[:, None])
    with pytest.raises(PrivacyError, match=r"torch.where \(vmap"):
        test.curator.release(query, clip_norm=1.0, purpose="x")


def test_a_foreign_error_inside_a_question_stays_what_it_is(party):
    def broken(batch):
        raise RuntimeError("my own")

    with pytest.raises(RuntimeError, match="my own"):
        releases.histogram(party(**NOISY).curator, broken, bins=4, purpose="x")


# --------------------------------------------------------------------------- Gram matrices


entries = st.floats(width=32, allow_nan=True, allow_infinity=True)


@pytest.mark.property
@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.lists(entries, min_size=5, max_size=5), min_size=1, max_size=5), st.floats(1e-3, 1e3),
    st.sampled_from([0.01, 1.0, 30.0]), st.sampled_from([0.0, 2.0]),
)  # fmt: skip
def test_no_record_exceeds_the_bound_whatever_it_holds(values, bound, weight, totals):
    """Of one record, the clipped vector itself; of several, the difference that the last one makes."""
    table = torch.tensor(values, dtype=torch.float32)
    query = Gram(lambda f, b: b.inputs[:, :3], lambda f, b: b.inputs[:, 3:], weight=weight, totals=totals)
    sums = []
    for rows in (table, table[:-1], table[-1:]):
        batch = Batch.current(Records(inputs=rows, labels=torch.zeros(len(rows), dtype=torch.int64)), 0)
        sums.append(query.clipped(nn.Identity(), {}, batch.tensors(), Clip(norm=bound)))
    assert float(flat(sums[2]).norm()) <= bound * ROUNDING
    less = flat(sums[1]) if sums[1] else torch.zeros_like(flat(sums[0]))
    assert float((flat(sums[0]) - less).norm()) <= bound * ROUNDING + 1e-6 * float(less.abs().max())


@pytest.mark.reference
@pytest.mark.parametrize("clip_norm", [0.4, 3.0, 100.0])
@pytest.mark.parametrize("query", [Gram(features), Gram(features, one_hot), JOINT])
def test_the_fast_sum_is_the_sum_of_clipped_rows(toy_stream, toy_model, query, clip_norm):
    """Against rows of all d (d + 1) / 2 + d c + c numbers, clipped by the function that clips everything."""
    stream = toy_stream()
    model, batch = toy_model(stream).eval(), Batch.current(stream[0].train, 0)
    params = {name: value.detach() for name, value in model.named_parameters()}
    fast = bounded_sum(query, model, params, batch.tensors(), Clip(norm=clip_norm))
    rows = {name: value.detach() for name, value in query(Forward(model), batch).items()}
    slow = {name: value.sum(0) for name, value in clip_rows(rows, Clip(norm=clip_norm)).items()}
    assert list(fast) == list(slow) == list(query.shapes(Forward(model), batch))
    for name, value in slow.items():
        torch.testing.assert_close(fast[name], value, rtol=1e-4, atol=1e-5)
        assert query.shapes(Forward(model), batch)[name] == value.shape
    lengths = flat({n: v.square().flatten(1).sum(1) for n, v in rows.items()}).view(len(rows), -1).sum(0).sqrt()
    norms = torch.tensor([query.norm(float(f.norm())) for f in model.features(batch.inputs).detach()])
    torch.testing.assert_close(lengths.float(), norms, rtol=1e-4, atol=1e-5)


@pytest.mark.property
@settings(deadline=None)
@given(st.integers(1, 7), st.integers(0, 99))
def test_svec_keeps_norms_and_comes_back(d, seed):
    half = torch.randn(d, d, generator=torch.Generator().manual_seed(seed))
    matrix = half + half.T
    packed = svec(matrix)
    assert packed.shape == (d * (d + 1) // 2,)
    torch.testing.assert_close(packed.norm(), matrix.norm())
    torch.testing.assert_close(unsvec(packed), matrix)
    torch.testing.assert_close(svec(torch.stack([matrix, 2 * matrix]))[1], 2 * packed)


def wide(d):
    return mlp(input_shape=(5,), num_classes=4, hidden=(d,), seed=0).eval()


def has_scale(noise, scale):
    """Whether the standard deviation of the normals is `scale`, within 5.5 standard errors (4e-8)."""
    return abs(float(noise.std()) / scale - 1) < 5.5 / math.sqrt(2 * noise.numel())


@pytest.mark.statistical
def test_the_noise_of_a_gram_matrix_is_symmetric_and_of_the_stated_scales(party, toy_stream):
    """On nobody's records, d = 300, C = 0.2, m = 3: 0.6 on the diagonal, 0.6 / sqrt(2) off it, 0.6 / w, 0.6 / v."""
    test = party(nobody(toy_stream()), wide(300), **NOISY)
    query = Gram(features, lambda f, b: b.inputs.new_zeros(len(b), 500), weight=2.0, totals=0.5)
    noise = test.curator.release(query, clip_norm=0.2, purpose="gram")
    gram, upper = noise["gram"], torch.ones(300, 300, dtype=torch.bool).triu(1)
    assert torch.equal(gram, gram.T)
    scales = {0.6: gram.diagonal(), 0.6 / 2**0.5: gram[upper], 0.3: noise["cross"], 1.2: noise["totals"]}
    for scale, values in scales.items():
        assert has_scale(values, scale), scale
        assert not has_scale(values, scale * 2 / 3) and not has_scale(values, scale * 3 / 2)
    largest = float(torch.linalg.eigvalsh(gram).abs().max())
    assert 0.93 < largest / (0.6 * (2 * 300) ** 0.5) < 1.07  # what a ridge has to stand up to


def test_gram_sums_of_private_records_are_those_of_their_clipped_vectors(party):
    """End to end, with next to no noise: features and targets of each record times its factor."""
    test = party(**SILENT)
    records = test.stream[0].train
    rows, y = test.model.features(records.inputs).detach(), F.one_hot(records.labels, 4).float()
    factors = torch.tensor([min(1.0, 1.0 / JOINT.norm(float(f.norm()))) for f in rows])
    assert int((factors < 1).sum()) > 12
    released = test.curator.release(JOINT, clip_norm=1.0, purpose="gram")
    expected = {"gram": (factors * rows.T) @ rows, "cross": (factors * rows.T) @ y, "totals": factors @ y}
    assert list(released) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(released[name], value, rtol=1e-4, atol=2e-5)


def test_ridge_regression_from_the_release_is_that_from_the_rows(party):
    """What analytic heads do with it: exact without privacy."""
    test = party()
    records = test.stream[0].train
    sums = test.curator.release(Gram(features, one_hot), clip_norm=1.0, purpose="gram")
    rows, y = test.model.features(records.inputs).detach(), F.one_hot(records.labels, 4).float()
    eye = 0.1 * torch.eye(rows.shape[1])
    head = torch.linalg.solve(sums["gram"] + eye, sums["cross"])
    by_rows = torch.linalg.lstsq(
        torch.cat([rows, eye * 10 * 0.1**0.5]), torch.cat([y, torch.zeros(len(eye), 4)])
    ).solution
    torch.testing.assert_close(head, by_rows, rtol=1e-3, atol=1e-3)


class Widest(TorchDispatchMode):
    """Remembers the greatest number of numbers in any tensor."""

    most = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            self.most = max(self.most, one.numel() if isinstance(one, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("privacy", [{}, NOISY])
def test_no_rows_of_d_squared_numbers_are_formed(party, privacy):
    """24 records at d = 200: the largest tensor is one matrix (its indices, or its bytes), not 24 of them."""
    test = party(model=wide(200), **privacy)
    with Widest() as widest:
        test.curator.release(Gram(features, one_hot), clip_norm=1.0, purpose="gram")
    assert 200**2 <= widest.most <= 4 * 200**2


def test_a_class_of_the_users_cannot_clip_for_itself(party, toy_stream):
    """Its rows are clipped like anyone's; only `Gram` itself takes the short way."""

    class Loose(Gram):
        def clipped(self, module, params, tensors, clip):
            return super().clipped(module, params, tensors, Clip(norm=1e6))

    change = moved(party, toy_stream(), 2, lambda c: c.release(Loose(features), clip_norm=0.1, purpose="x"))
    assert float(flat(change).norm()) <= 0.1 * ROUNDING
    fair = moved(party, toy_stream(), 2, lambda c: c.release(Gram(features), clip_norm=0.1, purpose="x"))
    torch.testing.assert_close(flat(change), flat(fair), rtol=1e-3, atol=1e-5)


def test_targets_longer_than_one_are_scaled_or_refused(party):
    long = Gram(features, lambda f, b: 3.0 * F.one_hot(b.labels, 4))
    unit = Gram(features, one_hot)
    answers = [party(**SILENT).curator.release(query, clip_norm=1e3, purpose="x") for query in (long, unit)]
    torch.testing.assert_close(flat(answers[0]), flat(answers[1]), rtol=1e-4, atol=2e-2)
    with pytest.raises(DataError, match=r"norm above 1.*declared bound"):
        party().curator.release(long, clip_norm=1e3, purpose="x")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (lambda: Gram(features, weight=0.0), "weight = 0.0"),
        (lambda: Gram(features, one_hot, weight=math.inf), "weight = inf"),
        (lambda: Gram(features, totals=1.0), "totals = 1.0.*with targets"),
        (lambda: Gram(features, one_hot, totals=-1.0), "totals = -1.0"),
    ],
)
def test_weights_that_are_none_are_refused(query, message):
    with pytest.raises(ConfigError, match=message):
        query()


@pytest.mark.parametrize("privacy", [{}, NOISY])
def test_features_of_another_shape_are_refused(party, privacy):
    for query in (
        Gram(lambda f, b: b.inputs.sum(1)), Gram(lambda f, b: b.inputs[:, :, None]),
        Gram(features, lambda f, b: b.labels), Gram(features, lambda f, b: torch.zeros(7, 3)),
    ):  # fmt: skip
        with pytest.raises(DataError, match=r"(features|targets) of \d+ records have shape .*\(n, width\)"):
            party(**privacy).curator.release(query, clip_norm=1.0, purpose="x")


# --------------------------------------------------------------------------- means, counts, choices


@pytest.mark.statistical
def test_a_mean_divides_by_the_declared_number_and_so_does_its_noise(party, toy_stream):
    """Declared 96 of 24: noise 3 x 0.2 / 96, two-sided (flakiness 4e-8)."""
    stream = toy_stream()
    first = stream[0]
    more = replace(stream, experiences=(replace(first, train=replace(first.train, declared_size=96)), stream[1]))

    def ones(forward, batch):
        return torch.zeros(len(batch), 4000).index_fill(1, torch.tensor([0]), 1.0)

    released = releases.mean(party(more, **NOISY).curator, ones, clip_norm=0.2, purpose="mean")["value"]
    assert has_scale(released[1:], 0.6 / 96)
    assert not has_scale(released[1:], 0.4 / 96) and not has_scale(released[1:], 0.9 / 96)
    assert float(released[0]) == pytest.approx(24 * 0.2 / 96, abs=5 * 0.6 / 96)
    exact = releases.mean(party(more).curator, ones, clip_norm=0.2, purpose="mean")["value"]
    assert float(exact[0]) == pytest.approx(24 / 96)


@pytest.mark.statistical
def test_a_histogram_has_integer_noise_of_the_stated_scale(party):
    """5,000 bins of which two are filled; m = 3, two-sided (flakiness 4e-8)."""
    counts = releases.histogram(party(**NOISY).curator, labels, bins=5000, purpose="labels")
    assert counts.dtype == torch.int64 and counts.shape == (5000,)
    noise = counts[2:].double()
    assert has_scale(noise, 3.0) and not has_scale(noise, 2.0) and not has_scale(noise, 4.5)
    assert abs(float(noise.mean())) < 5.5 * 3 / 5000**0.5
    assert all(abs(int(count) - 12) <= 17 for count in counts[:2])


def test_a_record_in_no_bin_counts_nowhere_under_privacy_and_is_refused_without(party):
    """With privacy an error would tell that there is such a record."""

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


def test_numbers_that_are_none_lie_above_all_under_privacy_and_are_refused_without(party, toy_stream):
    stream = toy_stream()
    for place in range(20):
        stream = poisoned(stream, place, math.nan)
    ask = partial(releases.quantile, of=brightness, q=0.5, candidates=[0.0, 5.0], purpose="x")
    assert ask(party(stream, **SILENT).curator) == 5.0  # 20 of 24 lie beyond, so the last is nearer than the first
    with pytest.raises(DataError, match="20 records have NaN"):
        ask(party(stream).curator)


@pytest.mark.parametrize("q", [0.05, 0.5, 0.9])
def test_quantiles_of_many_records_are_near(q):
    """1,000 numbers, epsilon 0.5: a rank 80 off has probability below 1e-6 (with 500 candidates)."""
    place = torch.Generator().manual_seed(0)
    values = torch.randn(1000, generator=place)
    grid = torch.linspace(-5, 5, 500)
    utility = Quantile(q=q, candidates=grid)
    from perdure.privacy.discrete import exponential

    uniform = NoiseKey.from_seed(1).uniform(500, purpose="p", entry="e", step=0)
    (chosen,) = exponential(utility.scores(values, strict=True), 1, noise_multiplier=2.0, uniform=uniform).tolist()
    assert abs(float((values < grid[chosen]).float().mean()) - q) < 0.08


def test_choices_are_among_what_was_offered_and_follow_the_records(party):
    test = party(**(NOISY | {"release_noise": 0.05}))
    chosen = releases.quantile(test.curator, brightness, q=0.5, candidates=torch.tensor(GRID), purpose="x")
    exact = releases.quantile(party().curator, brightness, q=0.5, candidates=GRID, purpose="x")
    assert isinstance(chosen, float) and chosen == pytest.approx(exact) and min(abs(chosen - c) for c in GRID) < 1e-6
    places = releases.top_k(test.curator, lambda b: 7 + 0 * b.labels, bins=50, k=3, purpose="y")
    assert places.dtype == torch.int64 and places[0] == 7 and len(places.unique()) == 3


@pytest.mark.parametrize("privacy", [{}, NOISY])
@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda c: releases.histogram(c, labels, bins=0, purpose="x"), "bins = 0"),
        (lambda c: releases.histogram(c, brightness, bins=3, purpose="x"), "float32; give whole numbers"),
        (lambda c: releases.histogram(c, lambda b: b.inputs, bins=3, purpose="x"), r"`of` gives shape .*\(n,\)"),
        (lambda c: releases.histogram(c, lambda b: b.labels.sum(), bins=3, purpose="x"), r"`of` gives shape \(\)"),
        (lambda c: releases.top_k(c, labels, bins=4, k=5, purpose="x"), "k = 5.*1 to 4"),
        (lambda c: releases.top_k(c, labels, bins=4, k=0, purpose="x"), "k = 0"),
        (lambda c: releases.top_k(c, brightness, bins=4, k=1, purpose="x"), "float32; give whole numbers"),
        (lambda c: releases.quantile(c, brightness, q=1.0, candidates=GRID, purpose="x"), "q = 1.0"),
        (lambda c: releases.quantile(c, brightness, q=0.5, candidates=[2, 1], purpose="x"), "each above the last"),
        (lambda c: releases.quantile(c, brightness, q=0.5, candidates=[], purpose="x"), "candidates"),
    ],
)
def test_what_is_not_allowed_is_said_in_one_line_and_costs_nothing(party, ask, message, privacy):
    test = party(**privacy)
    with pytest.raises(ConfigError, match=message) as error:
        ask(test.curator)
    assert "\n" not in str(error.value) and isinstance(error.value, PerdureError) and not test.trace


def test_scores_of_the_users_own_are_refused(party):
    @dataclass
    class Own:
        k = 1

        def scores(self, values, *, strict):
            return 100 * values

    for privacy in ({}, NOISY):
        with pytest.raises(PrivacyError, match="Own has no known sensitivity; allowed: Frequency, Quantile"):
            party(**privacy).curator.select(labels, Own(), purpose="x")
    assert party().curator.select(labels, Frequency(bins=2), purpose="x").tolist() == [0]


# --------------------------------------------------------------------------- planned and granted


@dataclass(frozen=True, kw_only=True)
class Curious(Strategy):
    """Asks for one of everything after every experience, and for `more` besides."""

    more: str = ""
    asks: ClassVar[Asks] = Asks(releases=2, histograms=1, selections=3)

    def after_experience(self, curator, params, state):
        for asked in ("mean", "gram", "histogram", "quantile", "top-k", self.more):
            if asked:
                ASKED[asked](curator)
        return state


def learner(stream, model, strategy, **privacy):
    made = Learner(
        model=model(stream), strategy=strategy, optimizer=partial(torch.optim.SGD, lr=0.1), iterations=2, batch_size=8,
        privacy=Privacy(**({"seed": 0, "delta": 1e-2} | privacy)),
    )  # fmt: skip
    made.prepare(stream)
    return made


@pytest.mark.slow
def test_what_is_declared_is_planned_granted_and_spent_to_the_last(toy_stream, toy_model):
    made = learner(toy_stream(), toy_model, Curious(), epsilon=8.0)
    made.fit(toy_stream())
    ledger, noise = made.mechanism.ledger, made.mechanism.schedule.noise[0]
    for partition, history in planned(made, Schedule(noise=(noise,))).items():
        assert merged(ledger.charges(partition)) == merged(history)
        for charge in (
            Charge(1.0, 4 * noise, 2), Charge(1.0, 4 * noise, 1, "discrete-gaussian"),
            Charge(1.0, 2 * noise, 3, "exponential"),
        ):  # fmt: skip
            assert charge in history
    assert 7.0 < ledger.epsilon(delta=1e-2) <= 8.0


@pytest.mark.parametrize(
    ("more", "refused"),
    [
        ("sum", "1 steps of gaussian noise"), ("histogram", "1 steps of discrete-gaussian noise"),
        ("quantile", "1 steps of exponential noise"), ("top-k", "2 steps of exponential noise"),
    ],
)  # fmt: skip
def test_what_was_not_declared_is_refused(toy_stream, toy_model, more, refused):
    made = learner(toy_stream(), toy_model, Curious(more=more), epsilon=8.0)
    with pytest.raises(BudgetError, match=f"{refused}.*allowed 0 by the grant"):
        made.fit(toy_stream())


def test_a_combination_asks_for_what_its_parts_ask(toy_stream, toy_model):
    both = Combine(Curious(), EWC(strength=1.0), Curious())
    assert both.asks == Asks(releases=5, histograms=2, selections=6)
    made = learner(toy_stream(), toy_model, both, noise_multiplier=1.0)
    made.fit(toy_stream())
    ledger = made.mechanism.ledger
    for partition, history in planned(made, Schedule(noise=(1.0,))).items():
        assert merged(ledger.charges(partition)) == merged(history)
