"""Models and passes that Opacus's samplers refuse, or leave to the next way."""

import pytest
import torch
from opacus.grad_sample import GradSampleModule
from opacus.layers import DPLSTM, DPMultiheadAttention
from torch import nn

from helpers.module_hooks import any_hooks
from helpers.sampler_models import (
    CLIP,
    LENGTH,
    RECORDS,
    Around,
    Block,
    bag,
    by_bridge,
    by_loop,
    case,
    distance,
    plain,
)
from perdure.privacy.clipping.clip import Clip, NotFiniteError, sum_of_clipped
from perdure.privacy.opacus import samplers as bridge


def halves(model, x, y):
    n = len(x) // 2
    return torch.cat([plain(model, x[:n], y[:n]), plain(model, x[n:], y[n:])])


@pytest.mark.parametrize(
    "name", ["DPLSTM", "block with SequenceBias", "grouped convolution", "mixed"]
)
def test_samplers_refuse_passes_of_half_the_records(name):
    model, x, y = case(name, records=6)
    params = dict(model.named_parameters())
    assert by_bridge(model, params, x, y, CLIP, halves) is None
    assert (
        by_bridge(
            model, params, x, y, CLIP, lambda m, x, y: plain(m, x, y) + plain(m, x[:1], y[:1]).sum()
        )
        is None
    )


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_the_hooks_of_opacus_mix_half_batches_without_an_error():
    model, x, y = case("DPLSTM", records=6)
    params = dict(model.named_parameters())
    clip = Clip(norm=0.01)
    # gradients that add up
    x = x[:1].expand_as(x)
    y = y[:1].expand_as(y)
    expected = by_loop(model, params, x, y, clip)
    hooked = GradSampleModule(model, loss_reduction="sum")
    halves(hooked, x, y).sum().backward()
    mixed = {n: p.grad_sample for n, p in params.items()}
    assert len(mixed["inner.weight_ih_l0"]) == 3  # six records in three rows
    assert distance(sum_of_clipped(mixed, clip), expected) > 2 * clip.norm


class Raw(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(5))
        self.layer = DPLSTM(5, 8, batch_first=True)

    def forward(self, x):
        return self.layer(x + self.shift)


class Packed(nn.Module):
    def __init__(self, lengths):
        super().__init__()
        self.layer = DPLSTM(5, 8, batch_first=True)
        self.lengths = lengths

    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(
            x, self.lengths[: len(x)], batch_first=True, enforce_sorted=False
        )
        return nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0]


def shared():
    inner = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.RMSNorm(5))
    inner[1].weight = inner[0].weight
    return Around(inner, 5)


LEFT = {
    "a parameter outside any layer": lambda: Around(Raw(), 8),
    "a weight of two layers": shared,
    "a layer without a sampler": lambda: Around(nn.PReLU(), 5),
    "attention of torch": lambda: Around(Block(nn.MultiheadAttention(8, 2, batch_first=True)), 8),
    "linear layers with the length axis first": lambda: Around(
        Block(DPMultiheadAttention(8, 2)), 8, lambda m, x: m(x.transpose(0, 1)), 0
    ),
    "padding that the sampler ignores": lambda: Around(
        nn.Conv1d(4, 8, 3, padding=1, padding_mode="reflect"), 5
    ),
    "words that repeat in a bag": lambda: Around(nn.EmbeddingBag(10, 8), 8, bag),
    "running statistics": lambda: Around(
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True), 5
    ),
    "sequences that are sorted by length": lambda: Around(
        Packed(torch.tensor([4, 2, 4, 3, 1, 4, 4])), 8
    ),
    "sequences that are sorted although all are full": lambda: Around(
        Packed(torch.full((7,), 4)), 8
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_samplers_refuse_unsupported_models(name):
    torch.manual_seed(0)
    model = LEFT[name]()
    x = torch.randn(RECORDS, LENGTH, 5)
    y = torch.randint(3, (RECORDS,))
    assert by_bridge(model, dict(model.named_parameters()), x, y, CLIP) is None
    assert not any_hooks(model)


def test_samplers_refuse_layers_whose_rows_are_positions():
    torch.manual_seed(0)
    model = LEFT["linear layers with the length axis first"]()
    x = torch.randn(LENGTH, LENGTH, 5)
    y = torch.randint(3, (LENGTH,))
    assert by_bridge(model, dict(model.named_parameters()), x, y, CLIP) is None


def test_samplers_refuse_partly_trained_layers():
    model, x, y = case("mixed")
    for left_out in ("inner.0.bias", "inner.3.weight_ih_l0", "head.bias"):
        params = {n: p for n, p in model.named_parameters() if n != left_out}
        assert by_bridge(model, params, x, y, CLIP) is None


def test_samplers_refuse_empty_and_too_large_batches(monkeypatch):
    model, x, y = case("grouped convolution")
    params = dict(model.named_parameters())
    assert by_bridge(model, params, x[:0], y[:0], CLIP) is None
    assert by_bridge(model, params, x, y, CLIP) is not None
    monkeypatch.setattr(bridge, "PASS_NUMBERS", 100)  # small, so that few rows are too many
    assert by_bridge(model, params, x, y, CLIP) is None


def test_the_sampler_error_names_rows_with_nan_or_infinity():
    model, x, y = case("grouped convolution")
    x = torch.where(torch.arange(7)[:, None, None] == 3, x / 0, x)
    with pytest.raises(NotFiniteError) as refusal:
        by_bridge(model, dict(model.named_parameters()), x, y, CLIP)
    assert refusal.value.rows.tolist() == [i == 3 for i in range(7)]
