"""Book-keeping: every layer with a rule against single records, and the bound in half precision."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.noise_tapes import (
    LAYERS,
    NO_BIAS,
    SHARES,
    N,
    assert_equal,
    by_tape,
    distance,
    exactly,
    floats,
    made,
    size,
)
from perdure.privacy.clipping.clip import Clip, squared_norms
from perdure.privacy.clipping.rules import base
from perdure.privacy.clipping.rules.base import LayerCall
from perdure.privacy.clipping.rules.convolution import ConvGhost, ConvolutionRule
from perdure.privacy.clipping.rules.linear import LinearGhost, LinearRule

ROUNDING = 1 + 1e-4
CASES = [(name, bias) for name in LAYERS for bias in (True, False)] + [
    (name, True) for name in NO_BIAS
]


# -------------------------------------------------------------------------- every layer with a rule


@pytest.mark.reference
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(("name", "bias"), CASES)
def test_book_keeping_sums_equal_a_loop_over_records(name, bias, times):
    module, x, _ = made(name, bias, times)
    assert ("layer.bias" in dict(module.named_parameters())) == (
        bias and not name.startswith(("embedding", "cosine"))
    )
    assert_equal(module, x)


@pytest.mark.parametrize("name", [name for name, (_, _, way) in LAYERS.items() if way])
def test_each_layer_uses_the_expected_method_for_norms(name):
    module, x, way = made(name)
    layer = module.layer
    y = module.layer(x)
    rule = (LinearRule() if isinstance(layer, nn.Linear) else ConvolutionRule()).gradients(
        layer, [LayerCall(x, y, torch.ones_like(y))]
    )
    assert type(rule) is way
    assert getattr(rule, "lined", False) == ("lines" in name)


@pytest.mark.parametrize("name", ["linear, many positions", "conv1d", "conv2d", "conv2d, by lines"])
def test_gradient_rows_that_are_not_stored_are_computed_again(name, monkeypatch):
    monkeypatch.setattr(base, "KEPT_NUMBERS", 0)  # as where they would not fit
    monkeypatch.setattr(base, "ROWS_AT_ONCE", 4)  # several pieces of few rows
    module, x, _ = made(name)
    assert_equal(module, x)


@pytest.mark.parametrize(
    "name", ["conv1d", "conv1d, dilated", "conv2d, settings", "conv2d, by lines"]
)
def test_convolution_gradients_by_patches_equal_those_by_groups(name):
    """Accelerators use patches, because their convolutions may be less accurate than matrix
    products.
    """
    module, x, _ = made(name)
    y = module.layer(x)
    use = LayerCall(x, y, torch.rand_like(y))
    groups, patches = (ConvolutionRule().gradients(module.layer, [use]) for _ in range(2))
    patches.on_cpu = patches.lined = False
    assert torch.allclose(groups.squared_norms(), patches.squared_norms(), rtol=1e-5)
    for name, value in groups.weighted(SHARES).items():
        assert torch.allclose(value, patches.weighted(SHARES)[name], rtol=1e-4, atol=1e-4)


def test_book_keeping_works_if_a_layer_is_the_whole_model():
    torch.manual_seed(0)
    assert_equal(nn.Linear(6, 3), floats(6))


@pytest.mark.parametrize("records", [1, 5])
def test_book_keeping_sums_of_few_records_equal_a_record_loop(records):
    for name in ("linear", "linear, few positions", "conv2d", "embedding"):
        module, x, _ = made(name)
        expected = exactly(module, x[:records], Clip(norm=0.1))
        assert distance(by_tape(module, x[:records], Clip(norm=0.1)), expected) < 1e-5 * size(
            expected
        )


class Products(TorchDispatchMode):
    """Count matrix products, and the convolution gradients by the requested outputs."""

    def __init__(self):
        super().__init__()
        self.products = 0
        self.masks = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func is torch.ops.aten.mm.default
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(args[-1])
        return func(*args, **(kwargs or {}))


def test_book_keeping_computes_no_weight_gradients():
    three = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    with Products() as count:
        by_tape(three, floats(6), Clip(norm=1.0))
    assert count.products == 2 + 3  # back to two layers' outputs; three clipped sums
    images = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(27, 3)
    )
    with Products() as count:
        by_tape(images, floats(2, 7, 7), Clip(norm=1.0))
    assert [mask for mask in count.masks if mask[0]] == [[True, False, False]]


@pytest.mark.parametrize(
    "name", ["linear", "linear, many positions", "linear, few positions", "conv2d", "embedding"]
)
def test_activations_are_freed_after_the_clipped_sum(name):
    module, x, _ = made(name)
    seen = []
    module.layer.register_forward_hook(lambda layer, args, y: seen.append(weakref.ref(y)))
    module.head.register_forward_hook(lambda layer, args, y: seen.append(weakref.ref(args[0])))
    gc.disable()
    try:
        total = by_tape(module, x, Clip(norm=1.0))
        assert total and len(seen) == 2 and not any(ref() is not None for ref in seen)
    finally:
        gc.enable()


# --------------------------------------------------------------------------- the bound


@pytest.mark.parametrize("kind", [LinearGhost, ConvGhost])
def test_ghost_norms_are_not_too_small_if_positions_cancel(kind):
    """Positions t and t + 1 cancel except for a share of 2e-4, the last digits of a float32
    square.
    """
    place = torch.Generator().manual_seed(0)
    a = torch.randn(64, 1, 40, generator=place).repeat(1, 2, 1) * 100
    d = (
        torch.randn(64, 1, 30, generator=place).repeat(1, 2, 1)
        * torch.tensor([1.0, -1.0])[:, None]
        * 100
    )
    d[:, 0] *= 1 + 2e-4
    if kind is LinearGhost:
        rule = LinearRule().gradients(nn.Linear(40, 30), [LayerCall(a, d, d)])
    else:
        rule = ConvolutionRule().gradients(nn.Conv1d(40, 30, 1), [LayerCall(a.mT, d.mT, d.mT)])
    assert type(rule) is kind
    factors = Clip(norm=1.0).factors({"": rule.squared_norms()})[""]
    for i in range(64):
        alone = rule.weighted(factors * (torch.arange(64) == i))
        assert 0.0 < size(alone) <= 1 + 1e-3


@pytest.mark.parametrize(
    "name", ["linear", "linear, many positions", "linear, few positions", "conv2d", "embedding"]
)
@pytest.mark.parametrize("way", ["autocast", "bfloat16"])
def test_norms_and_sums_of_half_precision_are_in_float32(name, way):
    module, x, _ = made(name)
    if way == "bfloat16":
        module = module.bfloat16()
        x = x.bfloat16() if x.is_floating_point() else x
    clip = Clip(norm=1e-3)  # every record is clipped

    def total(index):
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            return by_tape(module, x, clip, of=half_losses, index=index)

    whole = total(torch.arange(N))
    assert all(value.dtype == torch.float32 for value in whole.values())
    for i in range(N):
        assert clip.norm / ROUNDING <= size(total(torch.tensor([i]))) <= clip.norm * ROUNDING
        assert distance(whole, total(torch.arange(N)[torch.arange(N) != i])) <= clip.norm * ROUNDING


def half_losses(forward, batch):
    return F.cross_entropy(forward(batch.inputs).float(), batch.labels % 3, reduction="none")


def test_autocast_sums_use_the_rounded_half_precision_values():
    """The reference is the outer product of the gradient and the input rounded to bfloat16, for a
    linear layer.
    """
    layer = nn.Linear(30, 20)
    x = floats(30)
    clip = Clip(norm=1.0)
    backs = []

    def of(forward, batch):
        y = forward(batch.inputs)
        assert y.dtype == torch.bfloat16
        y.register_hook(backs.append)
        return y.float().square().sum(1)

    with torch.autocast("cpu", torch.bfloat16):
        mine = by_tape(nn.Sequential(layer), x, clip, of=of)
    a = x.bfloat16().double()
    d = backs[0].double()
    rows = {"0.weight": d[:, :, None] * a[:, None, :], "0.bias": d}
    factors = clip.factors(squared_norms(rows))["0"].double()
    expected = {name: torch.tensordot(factors, row, 1) for name, row in rows.items()}
    assert distance(mine, expected) < 1e-5 * size(expected)
