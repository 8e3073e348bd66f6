import copy
import gc
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from perdure.heads import CosineHead
from perdure.privacy import convolution_rules, layer_rules
from perdure.privacy.bookkeeping import clipped_gradient_sum
from perdure.privacy.clipping import Clip, clipped_sum, squared_norms
from perdure.privacy.convolution_rules import ConvGhost, ConvRows, conv_rule
from perdure.privacy.layer_rules import LinearGhost, LinearOuter, LinearRows, Use, linear_rule
from perdure.queries import gradient_rows
from perdure.records import Batch, Records
from perdure.strategy import Forward

N, WORDS = 9, 5
ROUNDING = 1 + 1e-4
SHARES = torch.logspace(-1.5, 1.5, N)
"""Weights of the records' losses, so that some gradients are long and some are short."""


class Net(nn.Module):
    """A layer, called once or twice, below a head."""

    def __init__(self, layer, x, times=1):
        super().__init__()
        self.layer, self.times = layer, times
        self.head = nn.Linear(layer(x).flatten(1).shape[1], 3)

    def forward(self, x):
        y = torch.tanh(self.layer(x))
        if self.times == 2:
            y = y + torch.tanh(self.layer((x + 1) % WORDS if x.dtype == torch.int64 else 0.5 - x))
        return self.head(y.flatten(1))


def floats(*shape):
    return torch.rand(N, *shape, generator=torch.Generator().manual_seed(0))


def words(*shape):
    return torch.randint(WORDS, (N, *shape), generator=torch.Generator().manual_seed(0))


# name -> (layer from bias, input, the way its rule goes; None where there is only one)
LAYERS = {
    "linear": (partial(nn.Linear, 6, 5), floats(6), LinearOuter),
    "linear, many positions": (partial(nn.Linear, 4, 5), floats(7, 4), LinearRows),
    "linear, few positions": (partial(nn.Linear, 30, 20), floats(2, 2, 30), LinearGhost),
    "conv1d": (partial(nn.Conv1d, 3, 4, 3, stride=2, padding=2), floats(3, 12), ConvRows),
    "conv1d, dilated": (partial(nn.Conv1d, 2, 3, 3, dilation=2), floats(2, 11), ConvRows),
    "conv1d, kernel 1": (partial(nn.Conv1d, 3, 4, 1), floats(3, 6), ConvRows),
    "conv1d, few places": (partial(nn.Conv1d, 12, 16, 5, padding=1), floats(12, 5), ConvGhost),
    "conv2d": (partial(nn.Conv2d, 2, 4, 3), floats(2, 7, 7), ConvRows),
    "conv2d, settings": (
        partial(nn.Conv2d, 3, 4, (3, 2), stride=(2, 3), padding=(1, 2), dilation=(1, 2)), floats(3, 9, 8), ConvRows,
    ),
    "conv2d, kernel 1": (partial(nn.Conv2d, 3, 5, 1, stride=2), floats(3, 5, 5), ConvRows),
    "conv2d, by lines": (partial(nn.Conv2d, 1, 4, 8, stride=2, padding=3), floats(1, 13, 12), ConvRows),
    "conv2d, by upright lines": (partial(nn.Conv2d, 2, 3, (8, 3), stride=(2, 1)), floats(2, 13, 6), ConvRows),
    "conv2d, few places": (partial(nn.Conv2d, 8, 16, 3, stride=2, padding=1, dilation=2), floats(8, 5, 5), ConvGhost),
    "layer norm": (lambda bias: nn.LayerNorm(6, bias=bias), floats(6), None),
    "layer norm, positions": (lambda bias: nn.LayerNorm(6, bias=bias), floats(4, 6), None),
    "layer norm, two dimensions": (lambda bias: nn.LayerNorm((4, 6), bias=bias), floats(2, 4, 6), None),
}  # fmt: skip
NO_BIAS = {
    "group norm": (lambda bias: nn.GroupNorm(2, 4), floats(4, 3, 3), None),
    "group norm, flat": (lambda bias: nn.GroupNorm(2, 6), floats(6), None),
    "embedding": (lambda bias: nn.Embedding(WORDS, 4), words(8), None),
    "embedding, one word": (lambda bias: nn.Embedding(WORDS, 4), words(), None),
    "embedding, padding": (lambda bias: nn.Embedding(WORDS, 4, padding_idx=1), words(2, 4), None),
    "cosine head": (lambda bias: CosineHead(6, 5), floats(6), None),
    "cosine head, positions": (lambda bias: CosineHead(4, 5), floats(7, 4), None),
}
CASES = [(name, bias) for name in LAYERS for bias in (True, False)] + [(name, True) for name in NO_BIAS]


def made(name, bias=True, times=1):
    torch.manual_seed(1)
    make, x, way = (LAYERS | NO_BIAS)[name]
    return Net(make(bias=bias), x, times), x, way


def losses(forward, batch):
    logits = forward(batch.inputs)
    return F.cross_entropy(logits.float(), batch.labels % 3, reduction="none") * SHARES[batch.labels].to(logits.device)


def batch_of(x):
    return Batch.current(Records(inputs=x, labels=torch.arange(len(x))), 0)


def exactly(module, x, clip):
    """In double precision, record by record."""

    def in_double(forward, batch):
        logits = forward(batch.inputs)
        return F.cross_entropy(logits, batch.labels % 3, reduction="none") * SHARES.double()[batch.labels]

    twin, x = copy.deepcopy(module).double(), x.double() if x.is_floating_point() else x
    params = dict(twin.named_parameters())
    return clipped_sum(gradient_rows(in_double, twin), params, batch_of(x).tensors(), clip, N)


def lengths(module, x):
    """Norms of the records' gradients, in order of length."""
    params, batch = list(module.parameters()), batch_of(x)
    each = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses(Forward(module), batch)]
    return sorted(size(dict(enumerate(gradient))) for gradient in each)


def by_tape(module, x, clip, of=losses, index=slice(None)):
    params, batch = dict(module.named_parameters()), batch_of(x).take(index)
    return clipped_gradient_sum(module, params, lambda: of(Forward(module), batch), len(batch), clip)


def size(total):
    return float(torch.stack([value.double().square().sum() for value in total.values()]).sum().sqrt())


def distance(one, other):
    assert list(one) == list(other)
    return size({name: one[name].double() - other[name].double() for name in one})


def assert_equal(module, x):
    """Flat and per layer, with bounds between the records' norms."""
    middle = lengths(module, x)[N // 2]
    for clip in (Clip(norm=middle), Clip(norm=middle, per_layer=True)):
        expected = exactly(module, x, clip)
        mine = by_tape(module, x, clip)
        assert distance(mine, expected) < 1e-5 * size(expected)
        assert all(value.dtype == torch.float32 and not value.requires_grad for value in mine.values())


# --------------------------------------------------------------------------- every layer with a rule


@pytest.mark.reference
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(("name", "bias"), CASES)
def test_the_clipped_sum_is_that_of_records_one_by_one(name, bias, times):
    module, x, _ = made(name, bias, times)
    assert ("layer.bias" in dict(module.named_parameters())) == (bias and not name.startswith(("embedding", "cosine")))
    assert_equal(module, x)


@pytest.mark.parametrize("name", [name for name, (_, _, way) in LAYERS.items() if way])
def test_each_case_goes_the_way_that_it_is_a_case_of(name):
    module, x, way = made(name)
    layer, y = module.layer, module.layer(x)
    rule = (linear_rule if isinstance(layer, nn.Linear) else conv_rule)(layer, [Use(x, y, torch.ones_like(y))])
    assert type(rule) is way
    assert getattr(rule, "lined", False) == ("lines" in name)


@pytest.mark.parametrize("name", ["linear, many positions", "conv1d", "conv2d", "conv2d, by lines"])
def test_rows_that_are_not_kept_are_formed_again(name, monkeypatch):
    monkeypatch.setattr(layer_rules, "KEPT_NUMBERS", 0)
    monkeypatch.setattr(layer_rules, "ROWS_AT_ONCE", 4)
    module, x, _ = made(name)
    assert_equal(module, x)


@pytest.mark.parametrize("name", ["conv1d", "conv1d, dilated", "conv2d, settings", "conv2d, by lines"])
def test_rows_by_patches_equal_rows_by_groups(name):
    """Patches are the way on accelerators, where convolutions may round to fewer digits than products of matrices."""
    module, x, _ = made(name)
    y = module.layer(x)
    use = Use(x, y, torch.rand_like(y))
    groups, patches = (conv_rule(module.layer, [use]) for _ in range(2))
    patches.on_cpu = patches.lined = False
    assert torch.allclose(groups.squared_norms(), patches.squared_norms(), rtol=1e-5)
    for name, value in groups.weighted(SHARES).items():
        assert torch.allclose(value, patches.weighted(SHARES)[name], rtol=1e-4, atol=1e-4)


def test_a_layer_may_be_the_whole_model():
    torch.manual_seed(0)
    assert_equal(nn.Linear(6, 3), floats(6))


@pytest.mark.parametrize("records", [1, 5])
def test_few_records(records):
    for name in ("linear", "linear, few positions", "conv2d", "embedding"):
        module, x, _ = made(name)
        expected = exactly(module, x[:records], Clip(norm=0.1))
        assert distance(by_tape(module, x[:records], Clip(norm=0.1)), expected) < 1e-5 * size(expected)


class Products(TorchDispatchMode):
    """Counts the products of matrices, and convolutions' gradients by what is asked of them."""

    def __init__(self):
        super().__init__()
        self.products, self.masks = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func is torch.ops.aten.mm.default
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(args[-1])
        return func(*args, **(kwargs or {}))


def test_the_backward_pass_forms_no_weight_gradients_and_stops_at_the_first_layer():
    three = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    with Products() as count:
        by_tape(three, floats(6), Clip(norm=1.0))
    assert count.products == 2 + 3  # back to two layers' outputs; three clipped sums
    images = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(27, 3))
    with Products() as count:
        by_tape(images, floats(2, 7, 7), Clip(norm=1.0))
    assert [mask for mask in count.masks if mask[0]] == [[True, False, False]]


@pytest.mark.parametrize("name", ["linear", "linear, many positions", "linear, few positions", "conv2d", "embedding"])
def test_activations_go_with_the_call_and_not_with_the_next_garbage_collection(name):
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
def test_a_ghost_norm_is_not_too_small_where_positions_cancel(kind):
    """Positions t and t + 1 cancel but for a share of 2e-4, which is at the end of float32's digits in a square."""
    place = torch.Generator().manual_seed(0)
    a = torch.randn(64, 1, 40, generator=place).repeat(1, 2, 1) * 100
    d = torch.randn(64, 1, 30, generator=place).repeat(1, 2, 1) * torch.tensor([1.0, -1.0])[:, None] * 100
    d[:, 0] *= 1 + 2e-4
    if kind is LinearGhost:
        rule = linear_rule(nn.Linear(40, 30), [Use(a, d, d)])
    else:
        rule = conv_rule(nn.Conv1d(40, 30, 1), [Use(a.mT, d.mT, d.mT)])
    assert type(rule) is kind
    factors = Clip(norm=1.0).factors({"": rule.squared_norms()})[""]
    for i in range(64):
        alone = rule.weighted(factors * (torch.arange(64) == i))
        assert 0.0 < size(alone) <= 1 + 1e-3


@pytest.mark.parametrize("name", ["linear", "linear, many positions", "linear, few positions", "conv2d", "embedding"])
@pytest.mark.parametrize("way", ["autocast", "bfloat16"])
def test_in_half_precision_norms_and_sums_are_taken_in_single_precision(name, way):
    module, x, _ = made(name)
    if way == "bfloat16":
        module, x = module.bfloat16(), x.bfloat16() if x.is_floating_point() else x
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


def test_under_autocast_the_sum_is_that_of_the_numbers_that_flowed():
    """For a linear layer: the outer products of what came back and of the input as it was rounded to bfloat16."""
    layer, x, clip = nn.Linear(30, 20), floats(30), Clip(norm=1.0)
    backs = []

    def of(forward, batch):
        y = forward(batch.inputs)
        assert y.dtype == torch.bfloat16
        y.register_hook(backs.append)
        return y.float().square().sum(1)

    with torch.autocast("cpu", torch.bfloat16):
        mine = by_tape(nn.Sequential(layer), x, clip, of=of)
    a, d = x.bfloat16().double(), backs[0].double()
    rows = {"0.weight": d[:, :, None] * a[:, None, :], "0.bias": d}
    factors = clip.factors(squared_norms(rows))["0"].double()
    expected = {name: torch.tensordot(factors, row, 1) for name, row in rows.items()}
    assert distance(mine, expected) < 1e-5 * size(expected)


# --------------------------------------------------------------------------- what models do


class Tied(nn.Module):
    """Two layers, and ways to use the first one's weight once more."""

    def __init__(self, way):
        super().__init__()
        self.way, self.first, self.second, self.head = way, nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        if way == "one parameter":
            self.second.weight = self.first.weight
        if way == "one layer":
            self.second = self.first

    def forward(self, x):
        h = torch.tanh(self.first(x))
        if self.way == "by itself":
            h = h + F.linear(h, self.first.weight)
        if self.way == "by forward":
            h = h + self.first.forward(h)
        if self.way == "penalty":
            h = h + self.first.weight.square().sum()
        return self.head(torch.tanh(self.second(h)))


@pytest.mark.parametrize("way", ["one parameter", "by itself", "by forward", "penalty"])
def test_a_weight_used_outside_of_its_own_layers_calls_is_left_to_the_rows(way):
    torch.manual_seed(0)
    assert by_tape(Tied(way), floats(6), Clip(norm=1.0)) is None


@pytest.mark.parametrize("way", ["one layer", "plain"])
def test_a_layer_under_two_names_is_used_twice(way):
    torch.manual_seed(0)
    assert_equal(Tied(way), floats(6))


class Quirk(nn.Module):
    """Things that models do between two layers."""

    def __init__(self, way):
        super().__init__()
        self.way, self.first, self.second = way, nn.Linear(6, 5), nn.Linear(5, 3)
        if way == "changed by a hook":
            self.first.register_forward_hook(lambda layer, x, y: 2 * y)

    def forward(self, x):
        if self.way == "named input":
            return self.second(input=torch.relu(self.first(input=x)))
        if self.way == "in place":
            return self.second(F.relu(self.first(x), inplace=True))
        h = torch.tanh(self.first(x))
        y = self.second(h)
        return y + h.mul_(2.0).sum(1, keepdim=True) if self.way == "input changed" else y


@pytest.mark.parametrize("way", ["named input", "in place", "changed by a hook"])
def test_what_left_the_layer_is_taken_as_it_left(way):
    torch.manual_seed(0)
    assert_equal(Quirk(way), floats(6))


def test_an_input_that_is_changed_afterwards_is_left_to_the_rows():
    torch.manual_seed(0)
    assert by_tape(Quirk("input changed"), floats(6), Clip(norm=1.0)) is None


def test_what_the_losses_do_not_reach_is_zero():
    torch.manual_seed(0)
    module, x = Tied("plain"), floats(6)
    total = by_tape(module, x, Clip(norm=1.0), of=lambda forward, batch: module.first(batch.inputs).sum(1))
    assert float(total["first.weight"].abs().sum()) > 0
    assert all(not value.any() for name, value in total.items() if not name.startswith("first"))
    for way in (lambda forward, batch: torch.ones(len(batch)), lambda f, batch: f(batch.inputs).detach().sum(1)):
        nothing = by_tape(module, x, Clip(norm=1.0), of=way)
        assert list(nothing) == list(total) and not any(value.any() for value in nothing.values())
    half = by_tape(module.bfloat16(), x.bfloat16(), Clip(norm=1.0), of=lambda f, b: module.first(b.inputs).sum(1))
    assert all(value.dtype == torch.float32 for value in half.values())


def test_a_teacher_without_gradients_does_not_count():
    module, x, _ = made("linear")

    def of(forward, batch):
        with torch.no_grad():
            forward(batch.inputs[:3])
        return losses(forward, batch)

    assert distance(by_tape(module, x, Clip(norm=1.0), of), by_tape(module, x, Clip(norm=1.0))) == 0


def by_halves(forward, batch):
    return torch.cat([losses(forward, batch.take(slice(0, 4))), losses(forward, batch.take(slice(4, None)))])


def test_passes_that_do_not_cover_all_records_are_left_to_the_rows():
    module, x, _ = made("linear")
    assert by_tape(module, x, Clip(norm=1.0), of=by_halves) is None


def test_an_image_alone_is_not_taken_for_records():
    module = nn.Sequential(nn.Conv2d(2, N, 3))
    x = floats(2, 5, 5)
    of = lambda forward, batch: forward(batch.inputs[0]).flatten(1).sum(1)  # noqa: E731
    assert by_tape(module, x, Clip(norm=1.0), of=of) is None


def normed(layer):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


OTHERS = {
    "groups": lambda: (nn.Conv2d(4, 4, 3, groups=2), floats(4, 5, 5)),
    "padding mode": lambda: (nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), floats(2, 5, 5)),
    "padding in words": lambda: (nn.Conv1d(2, 4, 3, padding="same"), floats(2, 5)),
    "norm of embeddings": lambda: (nn.Embedding(WORDS, 4, max_norm=1.0), words(3)),
    "frequency of words": lambda: (nn.Embedding(WORDS, 4, scale_grad_by_freq=True), words(3)),
    "sparse": lambda: (nn.Embedding(WORDS, 4, sparse=True), words(3)),
    "weight norm": lambda: (normed(nn.Linear(6, 5)), floats(6)),
    "no rule": lambda: (nn.Bilinear(6, 6, 5), floats(6)),
    "a layer of one's own": lambda: (type("Mine", (nn.Linear,), {})(6, 5), floats(6)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_layers_and_settings_without_a_rule_are_left_to_the_rows(name):
    layer, x = OTHERS[name]()
    module = nn.ModuleDict({"layer": layer})
    call = (lambda x: layer(x, x)) if name == "no rule" else layer
    of = lambda forward, batch: call(batch.inputs).flatten(1).sum(1)  # noqa: E731
    assert by_tape(module, x, Clip(norm=1.0), of=of) is None


@pytest.mark.parametrize("part", ["layer.weight", "layer.bias"])
def test_a_layer_that_is_partly_trained_is_left_to_the_rows(part):
    module, x, _ = made("linear")
    params = {name: value for name, value in module.named_parameters() if name != part}
    clip = Clip(norm=1.0)
    assert clipped_gradient_sum(module, params, lambda: losses(Forward(module), batch_of(x)), N, clip) is None
    copied = {name: value.detach().clone() for name, value in module.named_parameters()}
    assert clipped_gradient_sum(module, copied, lambda: losses(Forward(module), batch_of(x)), N, clip) is None


def test_lines_are_another_way_to_write_a_convolution():
    layer, x = nn.Conv2d(1, 4, 8, stride=2, padding=3, bias=False), floats(1, 13, 12)
    geometry = convolution_rules.Geometry.of(layer)
    y = layer(x)
    weight = layer.weight.view(4, 1, 8, 4, 2).permute(0, 1, 4, 2, 3).reshape(4, 16, 1, 4)
    assert torch.allclose(F.conv2d(geometry.to_lines(x, y.shape[3]), weight), y, atol=1e-5)
    assert torch.equal(geometry.from_lines(weight).reshape(layer.weight.shape), layer.weight)


def test_weights_computed_from_parameters_are_left_to_the_gradients_of_records():
    """A layer that runs with twice its weight: the tape would give the gradient of the doubled weight, half of it."""
    layer, inputs = nn.Linear(3, 2), torch.rand(4, 3)
    params = dict(layer.named_parameters())

    def losses():
        doubled = {name: 2 * value for name, value in params.items()}
        return torch.func.functional_call(layer, doubled, (inputs,)).square().sum(1)

    assert clipped_gradient_sum(layer, params, losses, 4, Clip(norm=0.1)) is None
    plain = lambda: torch.func.functional_call(layer, params, (inputs,)).square().sum(1)  # noqa: E731
    assert clipped_gradient_sum(layer, params, plain, 4, Clip(norm=0.1)) is not None
