"""Book-keeping of unusual models: the right sum, or none, so that per-record gradients are used."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.noise_tapes import (
    WORDS,
    N,
    assert_equal,
    batch_of,
    by_tape,
    distance,
    floats,
    losses,
    made,
    words,
)
from perdure.contract.forward import Forward
from perdure.privacy.clipping.bookkeeping import clipped_gradient_sum
from perdure.privacy.clipping.clip import Clip
from perdure.privacy.clipping.rules.convolution import Geometry

# --------------------------------------------------------------------------- what models do


class Tied(nn.Module):
    """Two layers, and several second uses of the first layer's weight."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
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
def test_book_keeping_refuses_a_weight_used_outside_its_layer(way):
    torch.manual_seed(0)
    assert by_tape(Tied(way), floats(6), Clip(norm=1.0)) is None


@pytest.mark.parametrize("way", ["one layer", "plain"])
def test_a_layer_with_two_names_counts_both_uses(way):
    torch.manual_seed(0)
    assert_equal(Tied(way), floats(6))


class Quirk(nn.Module):
    """Unusual operations of a model between two layers."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(5, 3)
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
def test_sums_of_changed_layer_outputs_equal_a_record_loop(way):
    torch.manual_seed(0)
    assert_equal(Quirk(way), floats(6))


def test_book_keeping_refuses_a_layer_input_changed_later():
    torch.manual_seed(0)
    assert by_tape(Quirk("input changed"), floats(6), Clip(norm=1.0)) is None


def test_parameters_that_do_not_affect_losses_get_zero_gradients():
    torch.manual_seed(0)
    module = Tied("plain")
    x = floats(6)
    total = by_tape(
        module, x, Clip(norm=1.0), of=lambda forward, batch: module.first(batch.inputs).sum(1)
    )
    assert float(total["first.weight"].abs().sum()) > 0
    assert all(not value.any() for name, value in total.items() if not name.startswith("first"))
    for way in (
        lambda forward, batch: torch.ones(len(batch)),
        lambda f, batch: f(batch.inputs).detach().sum(1),
    ):
        nothing = by_tape(module, x, Clip(norm=1.0), of=way)
        assert list(nothing) == list(total) and not any(value.any() for value in nothing.values())
    half = by_tape(
        module.bfloat16(),
        x.bfloat16(),
        Clip(norm=1.0),
        of=lambda f, b: module.first(b.inputs).sum(1),
    )
    assert all(value.dtype == torch.float32 for value in half.values())


def test_book_keeping_ignores_a_teacher_pass_without_gradients():
    module, x, _ = made("linear")

    def of(forward, batch):
        with torch.no_grad():
            forward(batch.inputs[:3])
        return losses(forward, batch)

    assert distance(by_tape(module, x, Clip(norm=1.0), of), by_tape(module, x, Clip(norm=1.0))) == 0


def by_halves(forward, batch):
    return torch.cat(
        [losses(forward, batch.take(slice(0, 4))), losses(forward, batch.take(slice(4, None)))]
    )


def test_book_keeping_refuses_passes_without_all_records():
    module, x, _ = made("linear")
    assert by_tape(module, x, Clip(norm=1.0), of=by_halves) is None


def test_book_keeping_does_not_take_channels_for_records():
    module = nn.Sequential(nn.Conv2d(2, N, 3))
    x = floats(2, 5, 5)
    of = lambda forward, batch: forward(batch.inputs[0]).flatten(1).sum(1)  # noqa: E731
    assert by_tape(module, x, Clip(norm=1.0), of=of) is None


def normed(layer):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


OTHERS = {
    "padding mode": lambda: (
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
        floats(2, 5, 5),
    ),
    "padding in words": lambda: (nn.Conv1d(2, 4, 3, padding="same"), floats(2, 5)),
    "norm of embeddings": lambda: (nn.Embedding(WORDS, 4, max_norm=1.0), words(3)),
    "frequency of words": lambda: (nn.Embedding(WORDS, 4, scale_grad_by_freq=True), words(3)),
    "sparse": lambda: (nn.Embedding(WORDS, 4, sparse=True), words(3)),
    "weight norm": lambda: (normed(nn.Linear(6, 5)), floats(6)),
    "no rule": lambda: (nn.Bilinear(6, 6, 5), floats(6)),
    "a layer of the user": lambda: (type("Mine", (nn.Linear,), {})(6, 5), floats(6)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_book_keeping_refuses_layers_without_a_clipping_rule(name):
    layer, x = OTHERS[name]()
    module = nn.ModuleDict({"layer": layer})
    call = (lambda x: layer(x, x)) if name == "no rule" else layer
    of = lambda forward, batch: call(batch.inputs).flatten(1).sum(1)  # noqa: E731
    assert by_tape(module, x, Clip(norm=1.0), of=of) is None


@pytest.mark.parametrize("part", ["layer.weight", "layer.bias"])
def test_book_keeping_refuses_a_partly_trained_layer(part):
    module, x, _ = made("linear")
    params = {name: value for name, value in module.named_parameters() if name != part}
    clip = Clip(norm=1.0)
    assert (
        clipped_gradient_sum(module, params, lambda: losses(Forward(module), batch_of(x)), N, clip)
        is None
    )
    copied = {name: value.detach().clone() for name, value in module.named_parameters()}
    assert (
        clipped_gradient_sum(module, copied, lambda: losses(Forward(module), batch_of(x)), N, clip)
        is None
    )


def test_a_convolution_over_image_lines_equals_the_convolution():
    layer = nn.Conv2d(1, 4, 8, stride=2, padding=3, bias=False)
    x = floats(1, 13, 12)
    geometry = Geometry.of(layer)
    y = layer(x)
    weight = layer.weight.view(4, 1, 8, 4, 2).permute(0, 1, 4, 2, 3).reshape(4, 16, 1, 4)
    assert torch.allclose(
        F.conv2d(geometry.to_lines(x[:, None], y.shape[3])[:, 0], weight), y, atol=1e-5
    )
    assert torch.equal(geometry.from_lines(weight).reshape(layer.weight.shape), layer.weight)


def test_book_keeping_refuses_weights_computed_from_parameters():
    """A layer runs with twice its weight; book-keeping would give half of the right gradient."""
    layer = nn.Linear(3, 2)
    inputs = torch.rand(4, 3)
    params = dict(layer.named_parameters())

    def losses():
        doubled = {name: 2 * value for name, value in params.items()}
        return torch.func.functional_call(layer, doubled, (inputs,)).square().sum(1)

    assert clipped_gradient_sum(layer, params, losses, 4, Clip(norm=0.1)) is None
    plain = lambda: torch.func.functional_call(layer, params, (inputs,)).square().sum(1)  # noqa: E731
    assert clipped_gradient_sum(layer, params, plain, 4, Clip(norm=0.1)) is not None
