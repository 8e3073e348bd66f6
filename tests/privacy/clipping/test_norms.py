"""Records of extreme numbers are clipped as others are, whatever the processor does with denormals.

Before a normalisation inputs of length 1e19 have gradients of length 1e-19: in float32 the square
of the one is finite, the square of the other is 0, and their product, the norm, would be 0.
"""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from opacus.layers import DPGRU, DPLSTM
from torch import nn

from helpers.noise_tapes import LAYERS, NO_BIAS, difference, place, randn, size, total
from perdure.data.experience import Experience, Stream
from perdure.data.records import Records
from perdure.learner.learner import Learner
from perdure.privacy.clipping import squared_row_norms
from perdure.privacy.clipping.bookkeeping import clipped_gradient_sum
from perdure.privacy.clipping.clip import Clip, clip_factors
from perdure.privacy.clipping.norms import LONGEST
from perdure.privacy.clipping.rules.base import ghost_norms
from perdure.privacy.grid import SLACK
from perdure.privacy.opacus.samplers import grad_sample_sum
from perdure.privacy.settings import Privacy
from perdure.strategies import Naive
from perdure.testing.replay import replay

MISSING_DATE = float(torch.iinfo(torch.int64).min)
"""The NaT of pandas, -9.2e18, where a column of dates is cast to float32."""
MOST = SLACK / 2
N = 16
EXTREME = N // 2


@pytest.fixture(autouse=True)
def flushed_as_while_training():
    """Flush denormal numbers to 0, as a learner with one thread does during training."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)
    torch.set_num_threads(threads)


# --------------------------------------------------------------------------- norms


LENGTHS = (1e-44, 1e-38, 1e-25, 1e-19, 1e-10, 1.0, 1e10, 1e19, 9e20, 1e23)


@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_squared_row_norms_are_accurate_for_rows_of_any_length(shape):
    torch.set_flush_denormal(False)
    rows = randn(len(LENGTHS), *shape, draw=place()).sign() * torch.tensor(LENGTHS).view(
        -1, *[1] * len(shape)
    )
    (squares,) = squared_row_norms(rows)
    exact = rows.double().flatten(1).square().sum(1)
    assert squares.dtype == torch.float64
    torch.testing.assert_close(squares, exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e25])
def test_the_norm_of_a_nan_or_too_long_row_is_infinite(value):
    rows = torch.ones(3, 4)
    rows[1, 2] = value
    for table in (rows, rows.double()):
        assert squared_row_norms(table)[0].tolist() == [4.0, torch.inf, 4.0]


def test_squared_row_norms_accept_several_tables_and_no_rows():
    a, d = squared_row_norms(torch.zeros(2, 3), torch.full((2, 3), 1e-30))
    assert a.tolist() == [0.0, 0.0]
    assert d.tolist() == pytest.approx([3e-60] * 2, rel=1e-5)
    assert squared_row_norms(torch.zeros(0, 3))[0].shape == (0,)


def test_clip_factors_equal_the_formula_for_norms_of_any_size():
    norms = torch.tensor([0.0, 1e-200, 1e-3, 1.0, 1e20, 1e40, torch.inf, torch.nan]).double()
    factors = clip_factors(norms.square(), 1e-3)
    assert factors.tolist() == pytest.approx([1.0, 1.0, 1.0, 1e-3, 1e-23, 0.0, 0.0, 0.0])
    assert clip_factors(torch.tensor([1e4]).double(), 1e-36).tolist() == [0.0]


def test_ghost_norms_use_float64_only_for_extreme_records():
    asked = []

    def grams(some, dtype):
        asked.append((dtype, len(torch.arange(6)[some])))
        a = torch.ones(6, 2, 3)[some].to(dtype)
        d = (torch.tensor([1.0, 1e-30, 0.0, 1e5, torch.nan, 1e-9])[:, None, None] * a[:1])[some]
        return a @ a.mT, d.to(dtype) @ d.to(dtype).mT

    norms = ghost_norms(grams, 6, 4, 3).sqrt()
    assert norms.tolist() == pytest.approx([6, 6e-30, 0, 6e5, torch.inf, 6e-9])
    assert asked == [(torch.float32, 6), (torch.float64, 3)]


# --------------------------------------------------------------------------- every layer


class Recurrent(nn.Module):
    """The outputs of a recurrent layer without its last state."""

    def __init__(self, kind):
        super().__init__()
        self.inner = kind(3, 4, batch_first=True)

    def forward(self, x):
        return self.inner(x)[0]


CASES = {
    name: (partial(make, bias=True), x.shape[1:], x.dtype)
    for name, (make, x, _) in (LAYERS | NO_BIAS).items()
} | {
    "embedding bag": (partial(nn.EmbeddingBag, 5, 4, mode="sum"), (8,), torch.int64),
    "grouped conv2d": (partial(nn.Conv2d, 4, 4, 3, groups=2), (4, 5, 5), torch.float32),
    "conv3d": (partial(nn.Conv3d, 2, 3, 2), (2, 3, 3, 3), torch.float32),
    "instance norm": (partial(nn.InstanceNorm2d, 3, affine=True), (3, 4, 4), torch.float32),
    "rms norm": (partial(nn.RMSNorm, 6), (4, 6), torch.float32),
    "LSTM": (partial(Recurrent, DPLSTM), (4, 3), torch.float32),
    "GRU": (partial(Recurrent, DPGRU), (4, 3), torch.float32),
}
ELSEWHERE = ("norm", "LSTM", "GRU", "cosine")
"""Layers whose own float32 arithmetic gives other rows at such numbers than float64 would."""


def extreme(name, long):
    """Return a layer, inputs and output gradients, whose product is about 1 for one record."""
    make, shape, dtype = CASES[name]
    torch.manual_seed(1)
    model = make()
    draw = place()
    words = dtype == torch.int64
    x = torch.randint(5, (N, *shape), generator=draw) if words else randn(N, *shape, draw=draw)
    backs = randn(N, *model(x[:2]).shape[1:], draw=draw)
    if words:
        backs[EXTREME] *= 3.0 / long
    else:
        x[EXTREME] *= long / x[EXTREME].norm()
        backs[EXTREME] *= 3.0 / long / backs[EXTREME].norm()
    return model, x, backs


@pytest.mark.parametrize("flush", [True, False], ids=["flushed", "denormal"])
@pytest.mark.parametrize("name", CASES)
def test_an_extreme_record_changes_the_sum_by_the_clip_norm(name, flush):
    torch.set_flush_denormal(flush)
    clip = Clip(norm=0.01, steps=2**30, per_layer="LSTM" in name)
    for long in (1e23, 1.5e19, 1.5e-19, 1e-23) if flush else (1.5e19, 1.5e-19):
        model, x, backs = extreme(name, long)
        whole = total(model, x, backs, torch.arange(N), clip)
        fewer = total(model, x, backs, torch.arange(N) != EXTREME, clip)
        moved = difference(whole, fewer)
        assert size(moved) <= clip.norm * (1 + MOST)
        if not any(kind in name for kind in ELSEWHERE):
            twin = copy.deepcopy(model).double()
            wide = x.double() if x.is_floating_point() else x
            exact = total(twin, wide, backs.double(), torch.tensor([EXTREME]), clip)
            assert size(difference(moved, exact)) <= clip.norm * MOST


@pytest.mark.parametrize("name", ["linear, few positions", "linear, many positions"])
def test_a_record_of_opposite_extremes_is_clipped_to_the_norm(name):
    """One record has short gradients of long inputs, and the reverse."""
    model, x, backs = extreme(name, 1.0)
    x[EXTREME].view(-1, x.shape[-1])[::2] *= 1e19
    backs[EXTREME].view(-1, backs.shape[-1])[::2] *= 1e-19
    x[EXTREME].view(-1, x.shape[-1])[1::2] *= 1e-19
    backs[EXTREME].view(-1, backs.shape[-1])[1::2] *= 1e19
    clip = Clip(norm=0.01)
    alone = torch.tensor([EXTREME])
    mine = total(model, x, backs, alone, clip)
    exact = total(copy.deepcopy(model).double(), x.double(), backs.double(), alone, clip)
    assert size(difference(mine, exact)) <= clip.norm * MOST


# --------------------------------------------------------------------------- before a normalisation


class OverPositions(nn.Module):
    """A linear layer over positions, a normalisation, and a head."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(256, 256)
        self.n = nn.LayerNorm(256)
        self.h = nn.Linear(256, 10)

    def forward(self, x):
        return self.h(self.n(self.a(x)).mean(1))


def tail(width, norm):
    return [norm, nn.ReLU(), nn.Flatten(), nn.Linear(width, 10)]


NETWORKS = {
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(30, 64), *tail(64, nn.LayerNorm(64))),
        (30,),
        (3, 4),
    ),
    "RMS norm": (
        lambda: nn.Sequential(nn.Linear(30, 64), *tail(64, nn.RMSNorm(64))),
        (30,),
        (3, 4),
    ),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(64, 128, 3), *tail(512, nn.GroupNorm(32, 128))),
        (64, 4, 4),
        (85,),
    ),
    "grouped convolution": (
        lambda: nn.Sequential(nn.Conv2d(8, 16, 3, groups=2), *tail(64, nn.GroupNorm(4, 16))),
        (8, 4, 4),
        (5, 20),
    ),
    "positions": (OverPositions, (8, 256), (3,)),
}


def sums_of_one(model, x, y, clip):
    """Return clipped sums of one record, by rules if each layer has one, else by samplers."""
    params = {name: value for name, value in model.named_parameters() if value.requires_grad}

    def losses():
        return F.cross_entropy(model(x), y, reduction="none")

    ways = (clipped_gradient_sum, grad_sample_sum)
    sums = [way(model, params, losses, 1, clip) for way in ways]
    return [each for each in sums if each is not None]


@pytest.mark.parametrize("per_layer", [False, True], ids=["flat", "per layer"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_huge_input_before_a_normalisation_is_clipped(name, per_layer):
    torch.manual_seed(0)
    make, shape, dates = NETWORKS[name]
    model = make()
    x = torch.rand(1, *shape)
    for date in dates:
        x.view(-1)[date] = MISSING_DATE
    y = model(x).argmin(1)
    for trained in (True, False):
        list(model.children())[-1].requires_grad_(trained)
        for norm in (1.0, 0.1, 1e-4):
            sums = sums_of_one(model, x, y, Clip(norm=norm, per_layer=per_layer))
            assert sums
            assert all(0.1 * norm < size(each) <= norm * (1 + MOST) for each in sums)


def stream_with_a_missing_date(labels):
    draw = place()
    x = torch.rand(40, 30, generator=draw)
    x[0, 3:5] = MISSING_DATE
    train = Records(inputs=x, labels=labels, ids=torch.arange(40), partition="p", declared_size=40)
    test = Records(inputs=x[1:9].clone(), labels=labels[1:9], partition="t")
    only = Experience(index=0, train=train, test=test, classes=tuple(range(10)))
    return Stream(
        name="dates",
        scenario="domain",
        experiences=(only,),
        num_classes=10,
        input_shape=(30,),
        assigned_by_record=True,
    )


def with_a_frozen_head():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 64), *tail(64, nn.LayerNorm(64)))
    model[-1].requires_grad_(False)
    return model


def test_one_huge_record_changes_a_run_within_its_charge():
    """The change was once 43 times the charged one."""
    labels = torch.arange(40) % 10
    stream = stream_with_a_missing_date(labels)
    labels[0] = with_a_frozen_head()(stream[0].train.inputs[:1]).argmin()

    def learner(key):
        return Learner(
            model=with_a_frozen_head(),
            strategy=Naive(),
            optimizer=partial(torch.optim.SGD, lr=0.1),
            iterations=2,
            batch_size=20,
            privacy=Privacy(noise_multiplier=1.0, delta=1e-2, clip_norm=0.1, seed=0),
        )

    report = replay(learner, [stream], record=0)
    assert report.holds and 0.9 < report.largest <= 1.0


def test_the_longest_allowed_norm_is_far_from_float32_limits():
    """A denormal number times such a row, and a clip factor, then stay negligible."""
    assert 2.0**-126 * LONGEST < 1e-13
    assert torch.finfo(torch.float32).tiny < 1e-12 / LONGEST
