"""Clipped sums of models that write into tensors, against a loop of autograd over the records."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from opacus.layers import DPGRU
from torch import nn

from helpers.record_loops import TOLERANCE, batch_of, gap_to_loop, rows_by_loop
from perdure.contract.forward import Forward
from perdure.models.cosine_head import CosineHead
from perdure.privacy.clipping.clip import Clip
from perdure.queries.batch_gradients import clipped_gradient

N = 5
WORDS = 7

ACTIVATIONS = {
    "ReLU": nn.ReLU(inplace=True),
    "LeakyReLU": nn.LeakyReLU(0.1, inplace=True),
    "Hardswish": nn.Hardswish(inplace=True),
    "Hardtanh": nn.Hardtanh(-0.5, 0.5, inplace=True),
    "SiLU": nn.SiLU(inplace=True),
    "mul_": lambda y: y.mul_(2.0),
    "mul_ by itself": lambda y: y.mul_(y.detach().sigmoid()),
    "clamp_": lambda y: y.clamp_(-0.3, 0.4),
    "add_ to a part": lambda y: (y[:, :1].relu_(), y)[1],
    "tanh_ of a view": lambda y: y.flatten(1).tanh_().view(y.shape),
}

# name -> (layer, shape of one record); those that go by Opacus's samplers
SAMPLED = {
    "same Conv2d": (partial(nn.Conv2d, 4, 8, (3, 5), padding="same"), (4, 5, 5)),
    "same grouped Conv1d": (partial(nn.Conv1d, 4, 8, 3, padding="same", groups=2), (4, 8)),
    "same Conv3d": (partial(nn.Conv3d, 4, 4, 3, padding="same"), (4, 3, 4, 3)),
    "InstanceNorm1d": (partial(nn.InstanceNorm1d, 4, affine=True), (4, 6)),
    "InstanceNorm2d": (partial(nn.InstanceNorm2d, 4, affine=True), (4, 4, 5)),
    "InstanceNorm3d": (partial(nn.InstanceNorm3d, 4, affine=True), (4, 3, 4, 3)),
    "RMSNorm": (partial(nn.RMSNorm, (5, 5)), (4, 5, 5)),
}
RULED = {
    "Linear": (partial(nn.Linear, 6, 5), (6,)),
    "Linear on positions": (partial(nn.Linear, 6, 5), (4, 6)),
    "Conv1d": (partial(nn.Conv1d, 4, 6, 3), (4, 8)),
    "Conv2d": (partial(nn.Conv2d, 4, 6, 3, stride=2), (4, 7, 7)),
    "Conv2d, few places": (partial(nn.Conv2d, 8, 16, 3, stride=2), (8, 4, 4)),
    "grouped Conv1d": (partial(nn.Conv1d, 4, 8, 3, groups=2), (4, 8)),
    "grouped Conv2d": (partial(nn.Conv2d, 4, 8, 3, stride=2, padding=1, groups=4), (4, 6, 6)),
    "grouped 1x1 Conv2d": (partial(nn.Conv2d, 4, 8, 1, groups=2), (4, 5, 5)),
    "Conv3d": (partial(nn.Conv3d, 4, 4, 2, padding=1), (4, 3, 4, 3)),
    "ConvTranspose2d": (partial(nn.ConvTranspose2d, 4, 6, 2), (4, 4, 4)),
    "LayerNorm": (partial(nn.LayerNorm, 6), (4, 6)),
    "GroupNorm": (partial(nn.GroupNorm, 2, 4), (4, 5, 5)),
    "CosineHead": (partial(CosineHead, 6, 5), (6,)),
}
BY_LOOP = {"PReLU": (partial(nn.PReLU, 4), (4, 4, 4))}
LAYERS = SAMPLED | RULED | BY_LOOP


class Network(nn.Module):
    """A shift of the input by a layer, the layer in question, GroupNorm, and a head.

    `before` and `after` stand around the layer; with `times` = 2 it is called once more.
    """

    def __init__(self, layer, shape, before=torch.tanh, after=torch.tanh, times=1, later=None):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(shape[-1], shape[-1])
        self.layer = layer()
        self.before = before
        self.after = after
        self.times = times
        self.later = later
        out = self.layer(torch.zeros(1, *shape))
        self.norm = nn.GroupNorm(1, out.shape[1])
        self.head = nn.Linear(out[0].numel(), 3)

    def forward(self, x):
        h = self.before(self.first(x))
        y = self.after(self.layer(h))
        if self.times == 2:
            y = y + self.after(self.layer(0.5 * h + 0.1))
        if self.later:
            self.later(h)
        return self.head(torch.tanh(self.norm(y)).flatten(1))


def inputs(shape):
    return 2 * torch.randn(N, *shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "layer", ["grouped Conv2d", "same Conv2d", "Conv3d", "InstanceNorm2d", "RMSNorm"]
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_clipped_sums_after_in_place_activations_equal_a_loop(layer, activation):
    make, shape = LAYERS[layer]
    model = Network(make, shape, after=ACTIVATIONS[activation])
    assert gap_to_loop(model, inputs(shape)) < TOLERANCE


silu_ = partial(F.silu, inplace=True)
WAYS = {
    "called twice": {"times": 2},
    "in place after": {"after": F.relu_},
    "in place before and after": {"before": silu_, "after": silu_},
    "called twice, in place": {"times": 2, "before": F.relu_, "after": F.relu_},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layer", LAYERS)
def test_clipped_sums_equal_a_record_loop_for_every_layer(layer, way):
    make, shape = LAYERS[layer]
    model = Network(make, shape, **WAYS[way])
    assert gap_to_loop(model, inputs(shape), per_layer=way == "called twice, in place") < TOLERANCE


FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.mark.parametrize("way", ["called once", "in place before and after", "called twice"])
@pytest.mark.parametrize(
    "layer", [name for name, (_, shape) in LAYERS.items() if len(shape) + 1 in FORMATS]
)
def test_channels_last_clipped_sums_equal_a_record_loop(layer, way):
    make, shape = LAYERS[layer]
    order = FORMATS[len(shape) + 1]
    options = WAYS.get(way, {})
    activation = options.get("before", torch.tanh)
    entered = []

    def before(h):
        entered.append(activation(h.contiguous(memory_format=order)))
        return entered[-1]

    model = Network(make, shape, **options | {"before": before}).to(memory_format=order)
    assert gap_to_loop(model, inputs(shape)) < TOLERANCE
    assert not any(h.is_contiguous() for h in entered)


@pytest.mark.parametrize("layer", [*SAMPLED, *RULED])
def test_clipped_sums_of_transposed_inputs_equal_a_record_loop(layer):
    make, shape = LAYERS[layer]
    model = Network(
        make, shape, before=lambda h: torch.tanh(h).transpose(0, -1).contiguous().transpose(0, -1)
    )
    assert gap_to_loop(model, inputs(shape)) < TOLERANCE


@pytest.mark.parametrize("layer", LAYERS)
def test_a_later_write_into_a_layer_input_raises_or_keeps_sums(layer):
    """Autograd refuses most such models; the sums of the others are right."""
    make, shape = LAYERS[layer]
    model = Network(make, shape, later=lambda h: h.mul_(3.0))
    x = inputs(shape)
    try:
        rows_by_loop(model, batch_of(x))
    except RuntimeError:
        with pytest.raises(RuntimeError, match="inplace"):
            clipped_gradient(
                Forward(model),
                lambda forward, batch: forward(batch.inputs).sum(1),
                dict(model.named_parameters()),
                batch_of(x),
                Clip(norm=1.0),
                None,
            )
    else:
        assert gap_to_loop(model, x) < TOLERANCE


class Reader(nn.Module):
    """Words through an embedding, a recurrent layer of Opacus, and a head."""

    def __init__(self, activation):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, 6)
        self.layer = DPGRU(6, 8, batch_first=True)
        self.head = nn.Linear(8, 3)
        self.activation = activation

    def forward(self, x):
        read, _ = self.layer(self.activation(self.words(x)))
        return self.head(self.activation(read).mean(1))


@pytest.mark.parametrize("activation", ["ReLU", "SiLU", "mul_", "add_ to a part"])
def test_clipped_token_sums_with_in_place_writes_equal_a_loop(activation):
    x = torch.randint(WORDS, (N, 6), generator=torch.Generator().manual_seed(0))
    assert gap_to_loop(Reader(ACTIVATIONS[activation]), x) < TOLERANCE
