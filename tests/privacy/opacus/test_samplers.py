"""Clipped sums with Opacus's samplers, against one backward pass per record."""

import pytest
import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule, register_grad_sampler
from torch import nn

from helpers.module_hooks import hooks_on
from helpers.sampler_models import (
    CLIP,
    COUNTED,
    LENGTH,
    MODELS,
    RECORDS,
    Around,
    by_bridge,
    by_loop,
    case,
    distance,
    plain,
    size,
)
from perdure.errors import PrivacyError
from perdure.privacy.clipping.bookkeeping import clipped_gradient_sum
from perdure.privacy.clipping.clip import WITHIN, Clip, clipped_sum
from perdure.privacy.guard.loss_checks import check_rows

# --------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("records", [RECORDS, LENGTH, 1])
@pytest.mark.parametrize("clip", [CLIP, COUNTED], ids=["flat", "by layer"])
@pytest.mark.parametrize("name", MODELS)
def test_opacus_sampler_sums_equal_a_loop_over_records(name, clip, records):
    model, x, y = case(name, records)
    params = dict(model.named_parameters())
    assert clipped_gradient_sum(model, params, lambda: plain(model, x, y), records, clip) is None
    expected = by_loop(model, params, x, y, clip)
    assert distance(by_bridge(model, params, x, y, clip), expected) < 1e-5 * size(expected)
    assert (WITHIN in expected) == clip.counted


@pytest.mark.parametrize("name", MODELS)
def test_one_record_changes_sampler_sums_by_at_most_clip_norm(name):
    model, x, y = case(name)
    # so small that every record is clipped
    params = dict(model.named_parameters())
    clip = Clip(norm=0.01)
    whole = by_bridge(model, params, x, y, clip)
    for i in range(len(x)):
        kept = torch.arange(len(x)) != i
        moved = distance(whole, by_bridge(model, params, x[kept], y[kept], clip))
        assert 0.99 * clip.norm < moved <= clip.norm * (1 + 1e-4)


@pytest.mark.parametrize("name", ["DPLSTM", "block with SequenceBias", "mixed"])
def test_samplers_add_two_passes_before_the_norm(name):
    def twice(model, x, y):
        return plain(model, x, y) + 2 * plain(model, 0.5 * x.flip(1), y)

    model, x, y = case(name)
    params = dict(model.named_parameters())
    expected = by_loop(model, params, x, y, CLIP, twice)
    assert distance(by_bridge(model, params, x, y, CLIP, twice), expected) < 1e-5 * size(expected)
    apart = by_loop(model, params, torch.cat([x, 0.5 * x.flip(1)]), torch.cat([y, y]), CLIP)
    assert distance(apart, expected) > 0.1 * size(expected)


def test_samplers_count_a_layer_used_twice_as_one_layer():
    torch.manual_seed(0)
    norm = nn.RMSNorm(5)
    model = Around(nn.Sequential(norm, nn.Tanh(), norm, nn.Conv1d(4, 4, 3, padding=1, groups=2)), 5)
    x = torch.randn(RECORDS, LENGTH, 5)
    y = torch.randint(3, (RECORDS,))
    params = dict(model.named_parameters())
    expected = by_loop(model, params, x, y, CLIP)
    assert distance(by_bridge(model, params, x, y, CLIP), expected) < 1e-5 * size(expected)


def test_samplers_ignore_frozen_layers_and_teachers():
    def with_teacher(model, x, y):
        with torch.no_grad():
            taught = model(-3 * x).softmax(-1).flip(1)
        return F.cross_entropy(model(x), taught, reduction="none")

    model, x, y = case("mixed")
    params = {n: p for n, p in model.named_parameters() if n.startswith(("inner.1", "inner.3"))}
    expected = by_loop(model, params, x, y, CLIP, with_teacher)
    assert distance(by_bridge(model, params, x, y, CLIP, with_teacher), expected) < 1e-5 * size(
        expected
    )


def test_samplers_give_zeros_for_a_layer_that_no_loss_uses():
    model, x, y = case("DPLSTM")
    model.spare = nn.RMSNorm(5)
    total = by_bridge(model, dict(model.named_parameters()), x, y, CLIP)
    assert float(total["spare.weight"].abs().sum()) == 0 and size(total) > 0


def test_sampler_sums_of_float64_models_are_float64():
    model, x, y = case("mixed")
    model = model.double()
    x = x.double()
    params = dict(model.named_parameters())
    expected = by_loop(model, params, x, y, CLIP)
    total = by_bridge(model, params, x, y, CLIP)
    assert total["inner.0.weight"].dtype == torch.float64
    assert distance(total, expected) < 1e-6 * size(expected)


@pytest.mark.parametrize(
    "name", ["block with DPMultiheadAttention", "DPGRU", "grouped convolution"]
)
def test_sampler_sums_under_autocast_are_float32(name):
    def lowered(model, x, y):
        with torch.autocast("cpu", torch.bfloat16):
            return plain(model, x, y).float()

    model, x, y = case(name, records=64)
    params = dict(model.named_parameters())
    clip = Clip(norm=0.01)
    total = by_bridge(model, params, x, y, clip, lowered)
    fewer = by_bridge(model, params, x[1:], y[1:], clip, lowered)
    assert {v.dtype for v in total.values()} == {torch.float32}
    assert 0.99 * clip.norm < distance(total, fewer) <= clip.norm * (1 + 1e-4)
    expected = by_loop(model, params, x, y, clip)
    assert distance(total, expected) < 0.1 * size(expected)


def test_samplers_leave_models_with_rules_to_book_keeping():
    model = Around(nn.Linear(5, 8), 8)
    x = torch.randn(RECORDS, LENGTH, 5)
    y = torch.zeros(RECORDS, dtype=torch.int64)
    assert by_bridge(model, dict(model.named_parameters()), x, y, CLIP) is None


@pytest.mark.parametrize("name", MODELS)
def test_samplers_leave_no_hooks_or_attributes_on_the_model(name):
    def broken(model, x, y):
        plain(model, x, y)
        raise ZeroDivisionError

    model, x, y = case(name)
    params = dict(model.named_parameters())
    for param in params.values():
        param.grad = torch.ones_like(param)
    before = [(set(vars(m)), hooks_on(m)) for m in model.modules()]
    own = [set(vars(p)) for p in params.values()]
    by_bridge(model, params, x, y, CLIP)
    with pytest.raises(ZeroDivisionError):
        by_bridge(model, params, x, y, CLIP, broken)
    assert [(set(vars(m)), hooks_on(m)) for m in model.modules()] == before
    assert not any("pre_hooks" in kind for m in model.modules() for kind in hooks_on(m))
    assert [set(vars(p)) for p in params.values()] == own
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in params.values())


@pytest.mark.parametrize("name", MODELS)
def test_the_row_check_accepts_every_layer_with_a_sampler(name):
    model, x, _ = case(name, records=6)
    check_rows(model, lambda x, y: plain(model, x, y), x, torch.tensor([0, 1, 2, 0, 1, 2]), "plain")


@pytest.mark.parametrize("name", ["DPLSTM", "DPLSTM, two layers both ways", "DPGRU", "mixed"])
def test_opacus_layers_also_run_record_by_record(name):
    model, x, y = case(name)
    params = {n: p.detach() for n, p in model.named_parameters()}

    def loss(params, one):
        return plain(
            lambda x: torch.func.functional_call(model, params, (x,)),
            one["x"][None],
            one["y"][None],
        ).sum()

    total = clipped_sum(torch.func.grad(loss), params, {"x": x, "y": y}, CLIP, 3)
    assert distance(
        total, by_bridge(model, dict(model.named_parameters()), x, y, CLIP)
    ) < 1e-5 * size(total)


# -------------------------------------------------------------------------- layers of somebody else


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return x * self.weight


class WrongScale(Scale):
    pass


class Product(Scale):
    def forward(self, x, y):
        return x * y * self.weight


def register(undone, kind, sampler):
    """Register a sampler in Opacus's own registry, and remove it after the test."""
    undone.setitem(GradSampleModule.GRAD_SAMPLERS, kind, None)
    register_grad_sampler(kind)(sampler)


def test_samplers_refuse_a_layer_with_two_inputs(monkeypatch):
    register(
        monkeypatch,
        Product,
        lambda layer, entered, back: {layer.weight: (entered[0] * back).flatten(1, -2).sum(1)},
    )
    model = Around(Product(), 5, lambda m, x: m(x, x))
    x = torch.randn(RECORDS, LENGTH, 5)
    y = torch.randint(3, (RECORDS,))
    assert by_bridge(model, dict(model.named_parameters()), x, y, CLIP) is None


def test_a_sampler_that_the_user_registered_with_opacus_is_used(monkeypatch):
    register(
        monkeypatch,
        Scale,
        lambda layer, entered, back: {layer.weight: (entered[0] * back).flatten(1, -2).sum(1)},
    )
    register(
        monkeypatch,
        WrongScale,
        lambda layer, entered, back: {layer.weight: (entered[0] * back).flatten(0, -2).sum(0)},
    )
    x = torch.randn(RECORDS, LENGTH, 5)
    y = torch.randint(3, (RECORDS,))
    model = Around(nn.Sequential(nn.Linear(5, 5), Scale()), 5)
    expected = by_loop(model, params := dict(model.named_parameters()), x, y, CLIP)
    assert distance(by_bridge(model, params, x, y, CLIP), expected) < 1e-5 * size(expected)
    model = Around(nn.Sequential(nn.Linear(5, 5), WrongScale()), 5)
    with pytest.raises(
        PrivacyError,
        match=r"grad sampler of WrongScale returns shape \(5,\) for weight and 7 records",
    ):
        by_bridge(model, dict(model.named_parameters()), x, y, CLIP)
