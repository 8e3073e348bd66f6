"""Clipped sums with Opacus's samplers, against one backward pass per record."""

import pytest
import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule, register_grad_sampler
from opacus.layers import DPGRU, DPLSTM, DPRNN, DPMultiheadAttention
from torch import nn

from helpers.module_hooks import any_hooks, hooks_on
from perdure.errors import PrivacyError
from perdure.privacy.clipping.bookkeeping import clipped_gradient_sum
from perdure.privacy.clipping.clip import WITHIN, Clip, NotFiniteError, clipped_sum, sum_of_clipped
from perdure.privacy.guard.loss_checks import check_rows
from perdure.privacy.guard.model_checks import fix
from perdure.privacy.opacus import samplers as bridge
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


# ---------------------------------------------------------- what is refused or left to the next way


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


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(5)
        self.layer = nn.Linear(5, 8)

    def forward(self, x):
        return self.layer(input=self.norm(x=x))


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
