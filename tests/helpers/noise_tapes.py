"""Layers with a clipping rule in a small network, and their clipped sums by book-keeping and record
by record.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from perdure.contract.forward import Forward
from perdure.data.records import Batch, Records
from perdure.models.cosine_head import CosineHead
from perdure.privacy.clipping.bookkeeping import clipped_gradient_sum
from perdure.privacy.clipping.clip import Clip, clipped_sum
from perdure.privacy.clipping.rules.convolution import ConvGhost, ConvRows
from perdure.privacy.clipping.rules.linear import LinearGhost, LinearOuter, LinearRows
from perdure.queries.batch_gradients import clipped_gradient
from perdure.queries.per_record import gradient_rows

N = 9
WORDS = 5
SHARES = torch.logspace(-1.5, 1.5, N)
"""Weights of the records' losses, so that some gradients are long and some are short."""


class Net(nn.Module):
    """A layer, called once or twice, followed by a head."""

    def __init__(self, layer, x, times=1):
        super().__init__()
        self.layer = layer
        self.times = times
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
        partial(nn.Conv2d, 3, 4, (3, 2), stride=(2, 3), padding=(1, 2), dilation=(1, 2)),
        floats(3, 9, 8),
        ConvRows,
    ),
    "conv2d, kernel 1": (partial(nn.Conv2d, 3, 5, 1, stride=2), floats(3, 5, 5), ConvRows),
    "conv2d, by lines": (
        partial(nn.Conv2d, 1, 4, 8, stride=2, padding=3),
        floats(1, 13, 12),
        ConvRows,
    ),
    "conv2d, by upright lines": (
        partial(nn.Conv2d, 2, 3, (8, 3), stride=(2, 1)),
        floats(2, 13, 6),
        ConvRows,
    ),
    "conv2d, few places": (
        partial(nn.Conv2d, 8, 16, 3, stride=2, padding=1, dilation=2),
        floats(8, 5, 5),
        ConvGhost,
    ),
    "conv1d, depthwise": (partial(nn.Conv1d, 4, 4, 3, padding=1, groups=4), floats(4, 6), ConvRows),
    "conv2d, groups": (
        partial(nn.Conv2d, 4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
        floats(4, 7, 6),
        ConvRows,
    ),
    "conv2d, depthwise": (partial(nn.Conv2d, 3, 6, 3, groups=3), floats(3, 5, 5), ConvRows),
    "conv2d, groups, few places": (
        partial(nn.Conv2d, 16, 32, 3, padding=1, groups=2),
        floats(16, 2, 2),
        ConvRows,
    ),
    "conv3d": (partial(nn.Conv3d, 2, 3, 2), floats(2, 3, 3, 3), ConvRows),
    "conv3d, settings": (
        partial(
            nn.Conv3d, 2, 4, (3, 2, 3), stride=(2, 1, 2), padding=(1, 0, 2), dilation=(2, 2, 1)
        ),
        floats(2, 7, 5, 4),
        ConvRows,
    ),
    "conv3d, groups": (
        partial(nn.Conv3d, 4, 6, (2, 3, 1), stride=(1, 2, 1), padding=1, groups=2),
        floats(4, 3, 5, 2),
        ConvRows,
    ),
    "conv3d, by lines": (partial(nn.Conv3d, 1, 3, (2, 8, 3)), floats(1, 3, 9, 4), ConvRows),
    "conv3d, few places": (
        partial(nn.Conv3d, 8, 16, 3, stride=2, padding=1, dilation=(2, 1, 1)),
        floats(8, 3, 3, 3),
        ConvGhost,
    ),
    "transposed 1d": (partial(nn.ConvTranspose1d, 3, 4, 3, stride=2), floats(3, 5), ConvRows),
    "transposed 2d": (
        partial(
            nn.ConvTranspose2d,
            4,
            6,
            (3, 2),
            stride=(2, 3),
            padding=(1, 0),
            output_padding=(1, 2),
            dilation=(1, 2),
            groups=2,
        ),
        floats(4, 4, 3),
        ConvRows,
    ),
    "transposed 2d, few places": (
        partial(nn.ConvTranspose2d, 16, 8, 3, stride=2, padding=1, output_padding=1),
        floats(16, 2, 2),
        ConvGhost,
    ),
    "transposed 3d": (
        partial(nn.ConvTranspose3d, 2, 3, (2, 3, 2), stride=2, output_padding=(1, 0, 1)),
        floats(2, 2, 3, 2),
        ConvRows,
    ),
    "layer norm": (lambda bias: nn.LayerNorm(6, bias=bias), floats(6), None),
    "layer norm, positions": (lambda bias: nn.LayerNorm(6, bias=bias), floats(4, 6), None),
    "layer norm, two dimensions": (
        lambda bias: nn.LayerNorm((4, 6), bias=bias),
        floats(2, 4, 6),
        None,
    ),
}
NO_BIAS = {
    "group norm": (lambda bias: nn.GroupNorm(2, 4), floats(4, 3, 3), None),
    "group norm, flat": (lambda bias: nn.GroupNorm(2, 6), floats(6), None),
    "embedding": (lambda bias: nn.Embedding(WORDS, 4), words(8), None),
    "embedding, one word": (lambda bias: nn.Embedding(WORDS, 4), words(), None),
    "embedding, padding": (lambda bias: nn.Embedding(WORDS, 4, padding_idx=1), words(2, 4), None),
    "cosine head": (lambda bias: CosineHead(6, 5), floats(6), None),
    "cosine head, positions": (lambda bias: CosineHead(4, 5), floats(7, 4), None),
}


def made(name, bias=True, times=1):
    torch.manual_seed(1)
    make, x, way = (LAYERS | NO_BIAS)[name]
    return Net(make(bias=bias), x, times), x, way


def losses(forward, batch):
    logits = forward(batch.inputs)
    return F.cross_entropy(logits.float(), batch.labels % 3, reduction="none") * SHARES[
        batch.labels
    ].to(logits.device)


def batch_of(x):
    return Batch.current(Records(inputs=x, labels=torch.arange(len(x))), 0)


def exactly(module, x, clip):
    """Return the clipped sum in double precision, record by record."""

    def in_double(forward, batch):
        logits = forward(batch.inputs)
        return (
            F.cross_entropy(logits, batch.labels % 3, reduction="none")
            * SHARES.double()[batch.labels]
        )

    twin = copy.deepcopy(module).double()
    x = x.double() if x.is_floating_point() else x
    params = dict(twin.named_parameters())
    return clipped_sum(gradient_rows(in_double, twin), params, batch_of(x).tensors(), clip, N)


def lengths(module, x):
    """Return the sorted gradient norms of the records."""
    params = list(module.parameters())
    batch = batch_of(x)
    each = [
        torch.autograd.grad(loss, params, retain_graph=True)
        for loss in losses(Forward(module), batch)
    ]
    return sorted(size(dict(enumerate(gradient))) for gradient in each)


def by_tape(module, x, clip, of=losses, index=slice(None)):
    params = dict(module.named_parameters())
    batch = batch_of(x).take(index)
    return clipped_gradient_sum(
        module, params, lambda: of(Forward(module), batch), len(batch), clip
    )


def size(total):
    return float(
        torch.stack([value.double().square().sum() for value in total.values()]).sum().sqrt()
    )


def distance(one, other):
    assert list(one) == list(other)
    return size({name: one[name].double() - other[name].double() for name in one})


def assert_equal(module, x):
    """Assert equal sums, flat and per layer, for bounds between the records' norms."""
    middle = lengths(module, x)[N // 2]
    for clip in (Clip(norm=middle), Clip(norm=middle, per_layer=True)):
        expected = exactly(module, x, clip)
        mine = by_tape(module, x, clip)
        assert distance(mine, expected) < 1e-5 * size(expected)
        assert all(
            value.dtype == torch.float32 and not value.requires_grad for value in mine.values()
        )


# --------------------------------------------------------------------------- given gradients


def place():
    return torch.Generator().manual_seed(0)


def randn(*shape, draw):
    return torch.randn(*shape, generator=draw)


def total(model, x, backs, index, clip, at_once=None):
    """Return the clipped sum of some records whose losses have the gradients `backs` at the
    output.
    """
    batch = Batch.current(Records(inputs=x, labels=torch.arange(len(x))), 0).take(index)

    def losses(forward, batch):
        return (forward(batch.inputs) * backs[batch.labels]).flatten(1).sum(1)

    params = dict(model.named_parameters())
    return clipped_gradient(Forward(model), losses, params, batch, clip, at_once)


def difference(one, other):
    return {name: one[name].double() - other[name].double() for name in one}
