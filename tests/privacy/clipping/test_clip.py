from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.contract.forward import Forward
from perdure.data.records import Batch, Records
from perdure.models.classifiers import cnn, mlp, resnet18
from perdure.privacy.clipping import clip as clipping
from perdure.privacy.clipping.bookkeeping import clipped_gradient_sum
from perdure.privacy.clipping.clip import (
    WITHIN,
    Clip,
    NotFiniteError,
    clip_factors,
    clip_rows,
    clipped_sum,
    per_pass,
    squared_norms,
)
from perdure.queries.batch_gradients import clipped_gradient
from perdure.queries.per_record import gradient_rows
from perdure.utils.chunking import chunks

ROUNDING = 1 + 1e-5
entries = st.floats(width=32, allow_nan=True, allow_infinity=True)


def norms(rows):
    return (
        torch.stack(
            [row.double().unsqueeze(-1).flatten(1).square().sum(1) for row in rows.values()]
        )
        .sum(0)
        .sqrt()
    )


@pytest.mark.property
@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.lists(entries, min_size=7, max_size=7), min_size=1, max_size=6),
    st.floats(1e-4, 1e4),
)
def test_no_clipped_row_exceeds_the_clip_norm(values, bound):
    table = torch.tensor(values, dtype=torch.float32)
    rows = {"weight": table[:, :6].reshape(-1, 2, 3), "scale": table[:, 6]}
    clipped = clip_rows(rows, Clip(norm=bound))
    assert float(norms(clipped).max()) <= bound * ROUNDING
    assert all(
        value.shape == rows[name].shape and bool(value.isfinite().all())
        for name, value in clipped.items()
    )
    inside = norms(rows) <= bound / ROUNDING  # NaN is not
    for name, value in clipped.items():
        assert torch.equal(value[inside], rows[name][inside])


def test_a_clipped_row_keeps_its_direction_over_all_parameters():
    clipped = clip_rows(
        {"a": torch.tensor([[3.0, 0.0]]), "b": torch.tensor([[0.0, 4.0]])}, Clip(norm=1.0)
    )
    torch.testing.assert_close(clipped["a"], torch.tensor([[0.6, 0.0]]))
    torch.testing.assert_close(clipped["b"], torch.tensor([[0.0, 0.8]]))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_row_with_nan_or_infinity_is_clipped_to_zero(poison):
    rows = {"value": torch.tensor([[poison, 1.0], [0.3, 0.4]])}
    assert clip_rows(rows, Clip(norm=1.0))["value"].tolist() == [
        [0.0, 0.0],
        pytest.approx([0.3, 0.4]),
    ]
    assert clip_factors(torch.tensor([poison**2, 0.0]), 1.0).tolist() == [0.0, 1.0]


def test_norms_of_half_precision_rows_are_in_float32():
    """65,536 entries of 1/64 have norm 4; bfloat16 would lose the sum of squares at 256 equal
    terms.
    """
    rows = torch.full((1, 65_536), 1 / 64, dtype=torch.bfloat16)
    assert float(
        norms({"value": clip_rows({"value": rows}, Clip(norm=1.0))["value"].float()})
    ) == pytest.approx(1.0, rel=1e-2)


# --------------------------------------------------------------------------- sums over records


def given_rows(params, tensors):
    return {"value": tensors["value"] * params["one"]}


@pytest.mark.property
@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(entries, min_size=3, max_size=3), min_size=1, max_size=9),
    st.integers(1, 10),
    st.data(),
)
def test_clipping_in_chunks_keeps_the_sum_and_the_bound(values, size, data):
    table = torch.tensor(values, dtype=torch.float32)
    one = {"one": torch.ones(())}
    whole = clipped_sum(given_rows, one, {"value": table}, Clip(norm=2.0), 100)["value"]
    torch.testing.assert_close(
        clipped_sum(given_rows, one, {"value": table}, Clip(norm=2.0), size)["value"], whole
    )
    dropped = data.draw(st.integers(0, len(table) - 1))
    kept = table[torch.arange(len(table)) != dropped]
    neighbour = clipped_sum(given_rows, one, {"value": kept}, Clip(norm=2.0), size)
    assert float((whole - (neighbour["value"] if neighbour else 0)).norm()) <= 2.0 * ROUNDING + 1e-5


def test_the_clipped_sum_without_records_is_none():
    assert (
        clipped_sum(
            given_rows, {"one": torch.ones(())}, {"value": torch.zeros(0, 3)}, Clip(norm=1.0), 4
        )
        is None
    )


def test_chunks_contain_every_row_once_and_in_order():
    pieces = list(chunks({"a": torch.arange(7), "b": torch.zeros(7, 2)}, 3))
    assert [len(piece["b"]) for piece in pieces] == [3, 3, 1]
    assert torch.cat([piece["a"] for piece in pieces]).tolist() == list(range(7))


def test_a_pass_holds_fewer_records_of_a_larger_model(monkeypatch):
    assert per_pass({"w": torch.zeros(1000)}) == clipping.LARGEST_PASS
    monkeypatch.setattr(clipping, "PASS_NUMBERS", 5000)  # small, so that small models reach it
    assert per_pass({"w": torch.zeros(30, 30), "b": torch.zeros(100)}) == 5
    assert per_pass({"w": torch.zeros(6000)}) == 1


# ------------------------------------------------------------------------- gradients of real models

N = 6
BOUNDS = {"mlp": 1.06, "cnn": 1.65, "resnet18": 28.0}
"""Between the lengths of the records' gradients, so that some are clipped and some are not."""


def problem(name):
    """Return a small model in double precision, to exclude rounding, and its input shape."""
    shape = {"mlp": (5,), "cnn": (1, 8, 8), "resnet18": (3, 16, 16)}[name]
    options = {"input_shape": shape, "num_classes": 3, "seed": 1}
    make = {
        "mlp": partial(mlp, hidden=(8,)),
        "cnn": partial(cnn, width=4),
        "resnet18": partial(resnet18, width=2),
    }[name]
    return make(**options).double(), shape


def losses(forward, batch):
    return F.cross_entropy(forward(batch.inputs), batch.labels, reduction="none")


def records(shape):
    place = torch.Generator().manual_seed(0)
    inputs = torch.rand(N, *shape, generator=place).double() * torch.logspace(-2, 1, N).view(
        -1, *[1] * len(shape)
    )
    return Batch.current(Records(inputs=inputs, labels=torch.arange(N) % 3), 0)


def loop(module, batch, bound):
    """Return the sum of clipped gradients, with one backward pass per record."""
    sums = [torch.zeros_like(value) for value in module.parameters()]
    lengths = []
    for i in range(len(batch)):
        loss = losses(Forward(module), batch.take(slice(i, i + 1))).sum()
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        lengths.append(float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt()))
        sums = [
            total + g * min(1.0, bound / lengths[-1])
            for total, g in zip(sums, gradients, strict=True)
        ]
    return dict(zip(dict(module.named_parameters()), sums, strict=True)), lengths


def by_rows(module, batch, bound, chunk=4):
    params = dict(module.named_parameters())
    return clipped_sum(
        gradient_rows(losses, module), params, batch.tensors(), Clip(norm=bound), chunk
    )


def by_bookkeeping(module, batch, bound):
    params = dict(module.named_parameters())
    forward = Forward(module)
    return clipped_gradient_sum(
        module, params, lambda: losses(forward, batch), len(batch), Clip(norm=bound)
    )


@pytest.mark.reference
@pytest.mark.parametrize("how", [by_rows, by_bookkeeping])
@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet18"])
def test_clipped_gradient_sums_equal_a_loop_over_records(name, how):
    module, shape = problem(name)
    batch = records(shape)
    expected, lengths = loop(module, batch, BOUNDS[name])
    assert min(lengths) < BOUNDS[name] < max(lengths)
    mine = how(module, batch, BOUNDS[name])
    assert mine.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-4, atol=1e-5)
        assert not mine[key].requires_grad


@pytest.mark.parametrize("how", [by_rows, by_bookkeeping])
@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet18"])
def test_one_record_changes_the_gradient_sum_by_the_clip_norm(name, how):
    module, shape = problem(name)
    batch = records(shape)
    whole = how(module, batch, BOUNDS[name])
    for dropped in range(N):
        neighbour = how(module, batch.take(torch.arange(N) != dropped), BOUNDS[name])
        moved = (
            torch.stack([(whole[key] - neighbour[key]).square().sum() for key in whole])
            .sum()
            .sqrt()
        )
        assert 0.01 < float(moved) <= BOUNDS[name] * ROUNDING + 1e-5


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_record_with_nan_adds_nothing_to_the_gradient_sum(poison):
    """NaN or infinite pixels are in one record, which may change the sum by C at most, and here by
    0.
    """
    module, shape = problem("mlp")
    batch = records(shape)
    expected, _ = loop(module, batch.take(slice(1, None)), 1.0)
    batch.inputs[0] = poison
    with pytest.raises(NotFiniteError) as refusal:  # who asked leaves the row out
        by_bookkeeping(module, batch, 1.0)
    assert refusal.value.rows.tolist() == [True] + [False] * (N - 1)
    params = dict(module.named_parameters())
    whole = clipped_gradient(Forward(module), losses, params, batch, Clip(norm=1.0), None)
    for sums in (whole, by_rows(module, batch, 1.0)):
        for key, value in sums.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)


def test_clipping_some_parameters_ignores_the_other_parameters():
    module, shape = problem("mlp")
    batch = records(shape)
    head = {name: value for name, value in module.named_parameters() if name.startswith("head")}
    rows = clipped_sum(gradient_rows(losses, module), head, batch.tensors(), Clip(norm=1.0), 3)
    forward = Forward(module)
    fast = clipped_gradient_sum(module, head, lambda: losses(forward, batch), N, Clip(norm=1.0))
    assert list(rows) == list(fast) == ["head.weight", "head.bias"]
    for key, value in rows.items():
        torch.testing.assert_close(fast[key], value, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------- ways to bound a record


@pytest.mark.parametrize("how", [by_rows, by_bookkeeping])
def test_per_layer_clipping_bounds_every_layer_by_its_share(how):
    """With a bound that clips every layer of every record, one record has norm C / sqrt(L) in each
    layer.
    """
    module, shape = problem("mlp")
    batch = records(shape)
    params = dict(module.named_parameters())
    clip = Clip(norm=1e-3, per_layer=True)
    for i in range(N):
        one = batch.take(slice(i, i + 1))
        if how is by_rows:
            total = clipped_sum(gradient_rows(losses, module), params, one.tensors(), clip, 4)
        else:
            total = clipped_gradient_sum(
                module, params, lambda one=one: losses(Forward(module), one), 1, clip
            )
        lengths = {
            layer: float(square.sqrt()) for layer, square in squared_norms(as_rows(total)).items()
        }
        assert len(lengths) == 2 and lengths == pytest.approx(
            dict.fromkeys(lengths, 1e-3 / 2**0.5), rel=1e-4
        )


def as_rows(total):
    return {name: value[None] for name, value in total.items()}


@pytest.mark.parametrize("how", ["rows", "book-keeping"])
def test_a_clip_can_count_the_records_within_the_clip_norm(how):
    module, shape = problem("mlp")
    batch = records(shape)
    params = dict(module.named_parameters())
    _, lengths = loop(module, batch, 1.0)
    clip = Clip(norm=BOUNDS["mlp"], counted=True)
    if how == "rows":
        total = clipped_sum(gradient_rows(losses, module), params, batch.tensors(), clip, 4)
    else:
        total = clipped_gradient_sum(
            module, params, lambda: losses(Forward(module), batch), N, clip
        )
    assert float(total[WITHIN]) == sum(
        0.5 if length <= BOUNDS["mlp"] else -0.5 for length in lengths
    )
    assert [name for name in total if name != WITHIN] == list(params)
