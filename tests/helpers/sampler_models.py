"""Small models with layers that have a sampler of Opacus, and their clipped sums."""

import torch
import torch.nn.functional as F
from opacus.layers import DPGRU, DPLSTM, DPRNN, DPMultiheadAttention
from torch import nn

from perdure.privacy.clipping.clip import Clip, sum_of_clipped
from perdure.privacy.guard.model_checks import fix
from perdure.privacy.opacus.samplers import grad_sample_sum

LENGTH = 4
RECORDS = 7
CLIP = Clip(norm=0.5)
COUNTED = Clip(norm=0.5, per_layer=True, counted=True)


class Around(nn.Module):
    """A model of (n, 4, 5) through `inner`, the mean over positions, and a head; other outputs are
    ignored.
    """

    def __init__(self, inner, size, call=None, positions=1):
        super().__init__()
        self.inner = inner
        self.head = nn.Linear(size, 3)
        self.call = call
        self.positions = positions

    def forward(self, x):
        x = self.call(self.inner, x) if self.call else self.inner(x)
        return self.head((x[0] if isinstance(x, tuple) else x).mean(self.positions))


class Block(nn.Module):
    """A transformer block over 8 features."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        self.first = nn.LayerNorm(8)
        self.second = nn.RMSNorm(8)
        self.between = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        x = F.pad(x, (0, 3))
        y = self.first(x)
        x = x + self.attention(y, y, y)[0]
        return x + self.between(self.second(x))


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(5)
        self.layer = nn.Linear(5, 8)

    def forward(self, x):
        return self.layer(input=self.norm(x=x))


def as_picture(layer, x):
    return layer(x[..., None].expand(-1, -1, -1, 5)).flatten(2)


def as_volume(layer, x):
    return layer(x[..., None, None].expand(-1, -1, -1, 5, 3)).flatten(2)


def words(layer, x):
    return layer((3 * x.abs()).long().clamp(max=9)[:, :, 0])


def bag(layer, x):
    return words(layer, x)[:, None]


def attention(**options):
    return DPMultiheadAttention(8, 2, batch_first=True, **options)


MODELS = {
    "DPLSTM": lambda: Around(DPLSTM(5, 8, batch_first=True), 8),
    "DPLSTM, length first": lambda: Around(DPLSTM(5, 8), 8, lambda m, x: m(x.transpose(0, 1)), 0),
    "DPLSTM, two layers both ways": lambda: Around(
        DPLSTM(5, 8, 2, batch_first=True, bidirectional=True), 16
    ),
    "DPLSTM without bias": lambda: Around(DPLSTM(5, 8, bias=False, batch_first=True), 8),
    "DPGRU": lambda: Around(DPGRU(5, 8, batch_first=True), 8),
    "DPRNN": lambda: Around(DPRNN(5, 8, batch_first=True), 8),
    "block with DPMultiheadAttention": lambda: Around(Block(attention()), 8),
    "block with SequenceBias": lambda: Around(Block(attention(add_bias_kv=True)), 8),
    "grouped convolution": lambda: Around(
        nn.Conv2d(4, 8, 3, padding="same", groups=2), 25, as_picture
    ),
    "depthwise convolution": lambda: Around(nn.Conv1d(4, 8, 3, padding="same", groups=4), 5),
    "convolution with padding 'same'": lambda: Around(
        nn.Conv1d(4, 8, 4, padding="same", dilation=2), 5
    ),
    "convolution of volumes": lambda: Around(
        nn.Conv3d(4, 8, (1, 5, 3), padding="same", groups=2), 75, as_volume
    ),
    "InstanceNorm": lambda: Around(nn.InstanceNorm1d(4, affine=True), 5),
    "RMSNorm": lambda: Around(nn.RMSNorm((4, 5)), 5),
    "mixed": lambda: Around(
        nn.Sequential(
            nn.Conv1d(4, 4, 3, padding=1, groups=2),
            nn.RMSNorm(5),
            nn.Linear(5, 6),
            DPLSTM(6, 8, batch_first=True),
        ),
        8,
    ),
    "words": lambda: Around(
        nn.Sequential(nn.Embedding(10, 6), DPLSTM(6, 8, batch_first=True)), 8, words
    ),
    "layers called by keyword": lambda: Around(ByKeyword(), 8),
    "repaired": lambda: fix(Around(nn.LSTM(5, 8, 2, batch_first=True, bidirectional=True), 16)),
}


def case(name, records=RECORDS):
    torch.manual_seed(0)
    model = MODELS[name]()
    return model, 3 * torch.randn(records, LENGTH, 5), torch.randint(3, (records,))


def plain(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def by_loop(model, params, x, y, clip, losses=plain):
    """Return the sum with one backward pass per record, each alone."""
    rows = [
        torch.autograd.grad(losses(model, x[i : i + 1], y[i : i + 1]).sum(), list(params.values()))
        for i in range(len(x))
    ]
    return sum_of_clipped(
        {n: torch.stack(g) for n, g in zip(params, zip(*rows, strict=True), strict=True)}, clip
    )


def by_bridge(model, params, x, y, clip, losses=plain):
    return grad_sample_sum(model, params, lambda: losses(model, x, y), len(x), clip)


def distance(one, other):
    assert list(one) == list(other)
    return float(sum((one[n] - other[n]).square().sum() for n in one)) ** 0.5


def size(total):
    return distance(total, {n: torch.zeros_like(v) for n, v in total.items()})
