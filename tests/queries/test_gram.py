"""Gram matrices: bounded per record, exact without privacy, symmetric noise, and no rows in
memory.
"""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.curator_harness import (
    JOINT,
    NOISY,
    ROUNDING,
    SILENT,
    features,
    flat,
    has_scale,
    moved,
    nobody,
    one_hot,
)
from perdure.contract.forward import Forward
from perdure.data.records import Batch, Records
from perdure.errors import ConfigError, DataError, PrivacyError
from perdure.models.classifiers import mlp
from perdure.privacy.clipping.clip import Clip, clip_rows
from perdure.queries.evaluation import SummedQuery, bounded_sum
from perdure.queries.gram import Gram, svec, unsvec

# --------------------------------------------------------------------------- Gram matrices


entries = st.floats(width=32, allow_nan=True, allow_infinity=True)


@pytest.mark.property
@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.lists(entries, min_size=5, max_size=5), min_size=1, max_size=5),
    st.floats(1e-3, 1e3),
    st.sampled_from([0.01, 1.0, 30.0]),
    st.sampled_from([0.0, 2.0]),
)
def test_no_clipped_row_of_a_gram_query_exceeds_the_clip_norm(values, bound, weight, totals):
    """The sum of one record is its clipped vector; of several records, the last one's difference is
    compared.
    """
    table = torch.tensor(values, dtype=torch.float32)
    query = Gram(
        lambda f, b: b.inputs[:, :3], lambda f, b: b.inputs[:, 3:], weight=weight, totals=totals
    )
    sums = []
    for rows in (table, table[:-1], table[-1:]):
        batch = Batch.current(
            Records(inputs=rows, labels=torch.zeros(len(rows), dtype=torch.int64)), 0
        )
        sums.append(query.clipped_sum(nn.Identity(), {}, batch.tensors(), Clip(norm=bound)))
    assert float(flat(sums[2]).norm()) <= bound * ROUNDING
    less = flat(sums[1]) if sums[1] else torch.zeros_like(flat(sums[0]))
    assert float((flat(sums[0]) - less).norm()) <= bound * ROUNDING + 1e-6 * float(less.abs().max())


@pytest.mark.reference
@pytest.mark.parametrize("clip_norm", [0.4, 3.0, 100.0])
@pytest.mark.parametrize("query", [Gram(features), Gram(features, one_hot), JOINT])
def test_the_fast_gram_sum_equals_the_sum_of_clipped_rows(toy_stream, toy_model, query, clip_norm):
    """The reference is the sum of clipped rows of all d (d + 1) / 2 + d c + c numbers."""
    stream = toy_stream()
    model = toy_model(stream).eval()
    batch = Batch.current(stream[0].train, 0)
    params = {name: value.detach() for name, value in model.named_parameters()}
    fast = bounded_sum(query, model, params, batch.tensors(), Clip(norm=clip_norm))
    rows = {name: value.detach() for name, value in query(Forward(model), batch).items()}
    slow = {name: value.sum(0) for name, value in clip_rows(rows, Clip(norm=clip_norm)).items()}
    assert list(fast) == list(slow) == list(query.shapes(Forward(model), batch))
    for name, value in slow.items():
        torch.testing.assert_close(fast[name].float(), value, rtol=1e-4, atol=1e-5)
        assert query.shapes(Forward(model), batch)[name] == value.shape
    lengths = (
        flat({n: v.square().flatten(1).sum(1) for n, v in rows.items()})
        .view(len(rows), -1)
        .sum(0)
        .sqrt()
    )
    norms = torch.tensor(
        [query.norm(float(f.norm())) for f in model.features(batch.inputs).detach()]
    )
    torch.testing.assert_close(lengths.float(), norms, rtol=1e-4, atol=1e-5)


@pytest.mark.property
@settings(deadline=None)
@given(st.integers(1, 7), st.integers(0, 99))
def test_svec_keeps_norms_and_unsvec_inverts_svec(d, seed):
    half = torch.randn(d, d, generator=torch.Generator().manual_seed(seed))
    matrix = half + half.T
    packed = svec(matrix)
    assert packed.shape == (d * (d + 1) // 2,)
    torch.testing.assert_close(packed.norm(), matrix.norm())
    torch.testing.assert_close(unsvec(packed), matrix)
    torch.testing.assert_close(svec(torch.stack([matrix, 2 * matrix]))[1], 2 * packed)


def wide(d):
    return mlp(input_shape=(5,), num_classes=4, hidden=(d,), seed=0).eval()


@pytest.mark.statistical
def test_gram_noise_is_symmetric_and_has_the_stated_scales(party, toy_stream):
    """Without records, d = 300, C = 0.2, m = 3: 0.6 on the diagonal, 0.6 / sqrt(2) off it, 0.6 / w,
    0.6 / v.
    """
    test = party(nobody(toy_stream()), wide(300), **NOISY)
    query = Gram(features, lambda f, b: b.inputs.new_zeros(len(b), 500), weight=2.0, totals=0.5)
    noise = test.curator.release(query, clip_norm=0.2, purpose="gram")
    gram = noise["gram"]
    upper = torch.ones(300, 300, dtype=torch.bool).triu(1)
    assert torch.equal(gram, gram.T)
    scales = {
        0.6: gram.diagonal(),
        0.6 / 2**0.5: gram[upper],
        0.3: noise["cross"],
        1.2: noise["totals"],
    }
    for scale, values in scales.items():
        assert has_scale(values, scale), scale
        assert not has_scale(values, scale * 2 / 3) and not has_scale(values, scale * 3 / 2)
    largest = float(torch.linalg.eigvalsh(gram).abs().max())
    assert 0.93 < largest / (0.6 * (2 * 300) ** 0.5) < 1.07  # what a ridge has to stand up to


def test_private_gram_sums_use_clipped_feature_vectors(party):
    """With nearly no noise, the sums are features and targets of each record times its clip
    factor.
    """
    test = party(**SILENT)
    records = test.stream[0].train
    rows = test.model.features(records.inputs).detach()
    y = F.one_hot(records.labels, 4).float()
    factors = torch.tensor([min(1.0, 1.0 / JOINT.norm(float(f.norm()))) for f in rows])
    assert int((factors < 1).sum()) > 12
    released = test.curator.release(JOINT, clip_norm=1.0, purpose="gram")
    expected = {
        "gram": (factors * rows.T) @ rows,
        "cross": (factors * rows.T) @ y,
        "totals": factors @ y,
    }
    assert list(released) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(released[name], value, rtol=1e-4, atol=2e-5)


def test_ridge_weights_from_a_gram_release_equal_those_from_rows(party):
    """Analytic heads use the release this way; without privacy it is exact."""
    test = party()
    records = test.stream[0].train
    sums = test.curator.release(Gram(features, one_hot), clip_norm=1.0, purpose="gram")
    rows = test.model.features(records.inputs).detach()
    y = F.one_hot(records.labels, 4).float()
    eye = 0.1 * torch.eye(rows.shape[1])
    head = torch.linalg.solve(sums["gram"] + eye, sums["cross"])
    by_rows = torch.linalg.lstsq(
        torch.cat([rows, eye * 10 * 0.1**0.5]), torch.cat([y, torch.zeros(len(eye), 4)])
    ).solution
    torch.testing.assert_close(head, by_rows, rtol=1e-3, atol=1e-3)


class Widest(TorchDispatchMode):
    """Record the largest size of any tensor."""

    most = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            self.most = max(self.most, one.numel() if isinstance(one, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("privacy", [{}, NOISY])
def test_a_gram_release_forms_no_matrix_per_record(party, privacy):
    """24 records at d = 200: the largest tensor is one matrix (its indices, or its bytes, 8 for
    each float64 number), not 24 of them.
    """
    test = party(model=wide(200), **privacy)
    with Widest() as widest:
        test.curator.release(Gram(features, one_hot), clip_norm=1.0, purpose="gram")
    assert 200**2 <= widest.most <= 9 * 200**2


def test_a_users_gram_subclass_cannot_change_the_clipping(party, toy_stream):
    """The subclass is clipped row by row; only `Gram` itself uses the fast sum."""

    class Loose(Gram):
        def clipped_sum(self, module, params, tensors, clip):
            return super().clipped_sum(module, params, tensors, Clip(norm=1e6))

    change = moved(
        party, toy_stream(), 2, lambda c: c.release(Loose(features), clip_norm=0.1, purpose="x")
    )
    assert float(flat(change).norm()) <= 0.1 * ROUNDING
    fair = moved(
        party, toy_stream(), 2, lambda c: c.release(Gram(features), clip_norm=0.1, purpose="x")
    )
    torch.testing.assert_close(flat(change), flat(fair), rtol=1e-3, atol=1e-5)


class Named:
    """A user's query that is not a `SummedQuery` but has methods of the same names."""

    def __call__(self, forward, batch):
        return {"value": forward.features(batch.inputs)}

    def clipped_sum(self, module, params, tensors, clip):
        return {"value": 1e6 * module.features(tensors["inputs"]).sum(0)}

    summed = clipped_sum


class Derived(Named, SummedQuery):
    """A user's query below the library's base class."""


@functools.wraps(Gram, updated=())
class Disguised(Named, SummedQuery):
    """A user's query with the name and module of a library class."""


@pytest.mark.parametrize("kind", [Named, Derived, Disguised])
def test_the_clipped_sum_method_of_a_users_query_is_not_called(kind, party, toy_stream):
    def plain(forward, batch):
        return {"value": forward.features(batch.inputs)}

    change, fair = (
        moved(party, toy_stream(), 2, lambda c, q=q: c.release(q, clip_norm=0.1, purpose="x"))
        for q in (kind(), plain)
    )
    assert float(flat(change).norm()) <= 0.1 * ROUNDING
    torch.testing.assert_close(flat(change), flat(fair), rtol=1e-3, atol=1e-5)


def test_an_attribute_cannot_replace_the_clipping_of_a_query(toy_stream, toy_model):
    stream = toy_stream()
    model = toy_model(stream).eval()
    tensors = Batch.current(stream[0].train, 0).tensors()
    params = {name: value.detach() for name, value in model.named_parameters()}
    query = Gram(features)
    expected = bounded_sum(query, model, params, tensors, Clip(norm=0.1))
    object.__setattr__(query, "clipped_sum", Named().clipped_sum)
    torch.testing.assert_close(
        bounded_sum(query, model, params, tensors, Clip(norm=0.1)), expected, rtol=0, atol=0
    )


class OneShape(Derived):
    """A query that claims rows of single numbers, so that one noise value would cover the whole
    sum.
    """

    def shapes(self, forward, batch):
        return {"value": torch.Size([1])}


def test_a_query_sum_with_other_shapes_than_its_rows_is_refused(party):
    with pytest.raises(
        PrivacyError, match=r"has shapes .*allowed: the shapes of the query's rows.*1"
    ):
        party(**NOISY).curator.release(OneShape(), clip_norm=1.0, purpose="x")


class Doubled(Derived):
    """A query with its own exact sum that returns half of the release."""

    def exact_sum(self, forward, batch, chunk):
        return {"value": 3 * forward.features(batch.inputs).detach().sum(0)}

    def unpacked(self, released):
        return {name: value / 2 for name, value in released.items()}


def test_a_gram_subclass_can_change_exact_sums_and_scaling(party):
    test = party()
    rows = test.model.features(test.stream[0].train.inputs).detach()
    exact = test.curator.release(Doubled(), clip_norm=1e3, purpose="x")["value"]
    torch.testing.assert_close(exact, 3 * rows.sum(0))
    noised = party(**SILENT).curator.release(Doubled(), clip_norm=1e3, purpose="x")["value"]
    torch.testing.assert_close(noised, rows.sum(0) / 2, rtol=1e-3, atol=2e-2)


def test_gram_targets_above_norm_1_are_scaled_or_refused(party):
    long = Gram(features, lambda f, b: 3.0 * F.one_hot(b.labels, 4))
    unit = Gram(features, one_hot)
    answers = [
        party(**SILENT).curator.release(query, clip_norm=1e3, purpose="x") for query in (long, unit)
    ]
    torch.testing.assert_close(flat(answers[0]), flat(answers[1]), rtol=1e-4, atol=2e-2)
    with pytest.raises(DataError, match=r"norm above 1.*a bound declared in advance"):
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
def test_a_gram_query_refuses_invalid_weights(query, message):
    with pytest.raises(ConfigError, match=message):
        query()


@pytest.mark.parametrize("privacy", [{}, NOISY])
def test_a_gram_query_refuses_features_not_shaped_n_by_width(party, privacy):
    for query in (
        Gram(lambda f, b: b.inputs.sum(1)),
        Gram(lambda f, b: b.inputs[:, :, None]),
        Gram(features, lambda f, b: b.labels),
        Gram(features, lambda f, b: torch.zeros(7, 3)),
    ):
        with pytest.raises(
            DataError, match=r"(features|targets) of \d+ records have shape .*\(n, width\)"
        ):
            party(**privacy).curator.release(query, clip_norm=1.0, purpose="x")
