"""Parameters outside of layers: clipped by book-keeping if each row gets them, else refused.

Batches have as many records as other axes are long, so that a length proves nothing.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.noise_tapes import N, assert_equal, batch_of, by_tape, difference, floats, losses, size
from helpers.record_loops import TOLERANCE, cross_entropies, gap_to_loop
from perdure.contract.forward import Forward
from perdure.errors import GuardError
from perdure.models.vision_transformer import Block
from perdure.privacy.clipping import broadcasts
from perdure.privacy.clipping.clip import Clip
from perdure.privacy.grid import SLACK
from perdure.privacy.guard.gradient_checks import GradientCase, check_gradients
from perdure.privacy.guard.loss_checks import quiet_training
from perdure.queries import batch_gradients
from perdure.queries.batch_gradients import clipped_gradient

WIDTH = 8
LENGTH = N
"""Tokens of a record, as many as records."""


class Tokens(nn.Module):
    """Linear tokens of (n, LENGTH, 4), parameters used by `use`, and a head."""

    def __init__(self, use, **shapes):
        super().__init__()
        torch.manual_seed(0)
        self.use = use
        self.embed = nn.Linear(4, WIDTH)
        self.body = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, 3)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        tokens = self.use(self, self.embed(x))
        return self.head((tokens + self.body(tokens)).square().mean(1))


def vision(m, t):
    return torch.cat([m.cls.expand(len(t), -1, -1), t], dim=1) + m.pos


def in_place(m, t):
    t += m.pos
    return t.relu_()


def several(m, t):
    """Add one parameter in several places, and two parameters together."""
    t = torch.tanh(t + m.pos[:, :1]) + m.pos
    return torch.cat([t, m.cls.repeat(len(t), 1, 1)], -2) + m.pos[0].mT.mT[:1]


def norm(m, t):
    """Apply a written-out root mean square norm and a scaled branch."""
    t = t * torch.rsqrt(t.square().mean(-1, keepdim=True) + 1e-3) * m.gain
    return t + m.gamma * m.body(t)


def through_views(m, t):
    images = t.transpose(1, 2).reshape(len(t), WIDTH, 3, LENGTH // 3)
    images = images + m.pos.squeeze(0).view(1, WIDTH, 3, 1)
    cls = m.cls[None, :, 0].unsqueeze(1).expand(len(t), 1, WIDTH)
    return torch.cat((cls, images.flatten(2).permute(0, 2, 1).contiguous()), dim=-2)


def listed(m, t):
    return t + m.shifts[0] + m.shifts[1]


def with_list():
    model = Tokens(listed)
    model.shifts = nn.ParameterList([torch.randn(LENGTH, 1), torch.randn(1, 1, WIDTH)])
    return model


def shift(m, t):
    return t + m.pos


RIGHT = {
    "class token and positions": lambda: Tokens(
        vision, cls=(1, 1, WIDTH), pos=(1, LENGTH + 1, WIDTH)
    ),
    "one number": lambda: Tokens(shift, pos=()),
    "one row": lambda: Tokens(shift, pos=(WIDTH,)),
    "positions without an axis of records": lambda: Tokens(shift, pos=(LENGTH, WIDTH)),
    "positions on the left": lambda: Tokens(lambda m, t: m.pos + t, pos=(LENGTH, 1)),
    "in place": lambda: Tokens(in_place, pos=(LENGTH, WIDTH)),
    "in place, doubled": lambda: Tokens(lambda m, t: m.pos.add(t, alpha=2), pos=(1, WIDTH)),
    "norm and scale": lambda: Tokens(norm, gain=(WIDTH,), gamma=(1, 1, WIDTH)),
    "views": lambda: Tokens(through_views, pos=(1, WIDTH, 3), cls=(WIDTH, 2)),
    "list of parameters": with_list,
    "several places": lambda: Tokens(several, pos=(1, LENGTH, WIDTH), cls=(1, 1, WIDTH)),
    "expanded and added": lambda: Tokens(
        lambda m, t: t + m.pos.expand(len(t), -1, WIDTH), pos=(1, LENGTH, 1)
    ),
    "copies, reshaped": lambda: Tokens(
        lambda m, t: torch.cat([m.cls.expand(len(t), -1, -1).reshape(len(t), 2, WIDTH), t], 1),
        cls=(1, 1, 2 * WIDTH),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_parameter_added_to_every_row_is_clipped_per_record(name):
    assert_equal(RIGHT[name](), floats(LENGTH, 4))


@pytest.mark.parametrize("name", RIGHT)
def test_gradients_of_two_passes_are_added_before_the_norm(name):
    model = RIGHT[name]()

    def twice(forward, batch):
        return cross_entropies(forward, batch) + 2 * F.cross_entropy(
            forward(0.5 * batch.inputs.flip(1)), batch.labels, reduction="none"
        )

    assert by_tape(model, floats(LENGTH, 4), Clip(norm=1.0), of=losses) is not None
    assert gap_to_loop(model, floats(LENGTH, 4), twice) < TOLERANCE


def test_an_unused_parameter_outside_layers_gets_zero_gradients():
    model = Tokens(shift, pos=(LENGTH, WIDTH), spare=(1, WIDTH))
    total = by_tape(model, floats(LENGTH, 4), Clip(norm=1.0))
    assert not total["spare"].any() and total["pos"].any()
    nothing = by_tape(
        model, floats(LENGTH, 4), Clip(norm=1.0), of=lambda f, b: model.embed(b.inputs).sum((1, 2))
    )
    assert not nothing["pos"].any() and nothing["embed.weight"].any()


def test_parameters_outside_layers_need_one_forward_pass(monkeypatch):
    """After one test run the whole batch takes one forward pass."""

    class Vit(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(4, WIDTH)
            self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH))
            self.pos = nn.Parameter(torch.randn(1, LENGTH + 1, WIDTH))
            self.blocks = nn.Sequential(Block(WIDTH, 2, 16), Block(WIDTH, 2, 16))
            self.head = nn.Linear(WIDTH, 3)
            self.passes = []

        def forward(self, x):
            self.passes.append(len(x))
            tokens = torch.cat([self.cls.expand(len(x), -1, -1), self.embed(x)], 1)
            return self.head(self.blocks(tokens + self.pos)[:, 0])

    torch.manual_seed(0)
    model = Vit()
    monkeypatch.delattr(batch_gradients, "clipped_sum")  # an error, were it called
    params = dict(model.named_parameters())
    batch = batch_of(floats(LENGTH, 4))
    for _ in range(2):
        assert clipped_gradient(Forward(model), losses, params, batch, Clip(norm=1.0), None)
    assert model.passes == [16, 15, 16]
    assert_equal(model, floats(LENGTH, 4))


# --------------------------------------------------------------------------- extreme numbers


@pytest.mark.parametrize("long", [1e23, 1.5e19, 1.5e-19, 1e-23])
def test_an_extreme_record_changes_broadcast_sums_by_clip_norm(long):
    """A scale with long inputs and short gradients, or the reverse."""
    torch.manual_seed(0)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4, bias=False)
            nn.init.eye_(self.first.weight)
            self.gain = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self.first(x) * self.gain

    model = Scaled()
    x = floats(4) + 0.1
    shares = torch.ones(N)
    x[4] *= long
    shares[4] = 3.0 / long
    clip = Clip(norm=0.01, steps=2**30)

    def of(forward, batch):
        return forward(batch.inputs).sum(1) * shares[batch.labels]

    def total(index):
        params = {"gain": model.gain}
        return clipped_gradient(Forward(model), of, params, batch_of(x).take(index), clip, None)

    moved = difference(total(torch.arange(N)), total(torch.arange(N) != 4))
    assert 0.9 * clip.norm < size(moved) <= clip.norm * (1 + SLACK / 2)


@pytest.mark.parametrize("name", ["class token and positions", "norm and scale"])
def test_one_record_changes_micro_batch_sums_by_the_clip_norm(name):
    model = RIGHT[name]()
    x = floats(LENGTH, 4)
    params = dict(model.named_parameters())
    clip = Clip(norm=1e-3, per_layer=True)

    def total(index, at_once):
        batch = batch_of(x).take(index)
        return clipped_gradient(Forward(model), losses, params, batch, clip, at_once)

    whole = total(torch.arange(N), None)
    assert size(difference(whole, total(torch.arange(N), 4))) < 1e-5 * size(whole)
    for i in range(N):
        moved = difference(whole, total(torch.arange(N) != i, None))
        assert 0.99 * clip.norm < size(moved) <= clip.norm * (1 + SLACK / 2)


# --------------------------------------------------------------------------- what is left


def delta(m, t):
    """Add a weight of as many rows as records, computed from a constant and a parameter."""
    return F.linear(t, m.base + m.row)[..., :WIDTH]


def with_base():
    model = Tokens(delta, row=(1, WIDTH))
    model.register_buffer("base", torch.randn(N, WIDTH))
    return model


def length_first(m, t):
    return (t.transpose(0, 1) + m.pos).transpose(0, 1)


def part_in_place(m, t):
    t = t.clone()
    t[:, 0] += m.row
    return t


def mixed_copies(m, t):
    """Mix the copies of a parameter of all records before they meet the records."""
    copies = m.row.expand(len(t), WIDTH)
    return torch.cat([copies.mean(0).expand(len(t), 1, WIDTH), t], 1)


def rows_as_tokens(m, t):
    """Pass a table of as many rows as records into a layer."""
    return t + m.body(m.table)[None]


LEFT = {
    "a product of matrices": lambda: Tokens(lambda m, t: t @ m.mix, mix=(WIDTH, WIDTH)),
    "a weight with as many rows as records": with_base,
    "a row for every record": lambda: Tokens(
        lambda m, t: t + m.table[: len(t), None], table=(N, WIDTH)
    ),
    "the length first": lambda: Tokens(length_first, pos=(LENGTH, 1, WIDTH)),
    "positions as rows": lambda: Tokens(
        lambda m, t: (t.reshape(-1, WIDTH) + m.row).view_as(t), row=(WIDTH,)
    ),
    "a part in place": lambda: Tokens(part_in_place, row=(WIDTH,)),
    "subtracted": lambda: Tokens(lambda m, t: t - m.row, row=(WIDTH,)),
    "added doubled": lambda: Tokens(lambda m, t: t.add(m.row, alpha=2), row=(WIDTH,)),
    "a function of the parameter": lambda: Tokens(lambda m, t: t + m.row.exp(), row=(WIDTH,)),
    "two parameters at once": lambda: Tokens(
        lambda m, t: t + (m.row + m.pos), row=(WIDTH,), pos=(LENGTH, 1)
    ),
    "tiled": lambda: Tokens(lambda m, t: t + m.pos.repeat(len(t), LENGTH, 1), pos=(1, 1, WIDTH)),
    "copies beside the records": lambda: Tokens(
        lambda m, t: torch.cat([t, m.cls.expand(len(t), -1, -1)], 0)[: len(t)],
        cls=(1, LENGTH, WIDTH),
    ),
    "copies that are mixed": lambda: Tokens(mixed_copies, row=(1, WIDTH)),
    "into a layer": lambda: Tokens(rows_as_tokens, table=(N, WIDTH)),
    "copies into a layer": lambda: Tokens(
        lambda m, t: t + m.body(m.row.expand(len(t), WIDTH))[:, None], row=(1, WIDTH)
    ),
    "once right and once not": lambda: Tokens(
        lambda m, t: (t + m.pos) * m.pos.square().mean(), pos=(LENGTH, WIDTH)
    ),
    "flipped records": lambda: Tokens(lambda m, t: (t.flip(0) + m.row).flip(0), row=(WIDTH,)),
    "chosen rows": lambda: Tokens(lambda m, t: t[torch.arange(len(t))] + m.row, row=(1, WIDTH)),
    "most of the numbers": lambda: Tokens(shift, pos=(LENGTH, WIDTH), spare=(100, 100)),
}


@pytest.mark.parametrize("name", LEFT)
def test_book_keeping_refuses_other_parameters_outside_layers(name):
    model = LEFT[name]()
    assert by_tape(model, floats(LENGTH, 4), Clip(norm=1.0)) is None
    if name not in ("a row for every record", "into a layer", "copies beside the records"):
        assert gap_to_loop(model, floats(LENGTH, 4)) < TOLERANCE


def test_book_keeping_refuses_a_parameter_added_to_raw_inputs():
    """Nothing shows that the first axis of an input is the axis of records."""
    torch.manual_seed(0)
    model = Tokens(lambda m, t: t, row=(4,))
    model.embed.register_forward_pre_hook(lambda layer, args: (args[0] + model.row,))
    assert by_tape(model, floats(LENGTH, 4), Clip(norm=1.0)) is None
    assert gap_to_loop(model, floats(LENGTH, 4)) < TOLERANCE


def test_book_keeping_refuses_a_parameter_penalty_outside_layers():
    model = Tokens(shift, pos=(LENGTH, WIDTH))

    def penalised(forward, batch):
        return losses(forward, batch) + model.pos.square().sum()

    assert by_tape(model, floats(LENGTH, 4), Clip(norm=1.0), of=penalised) is None


def test_book_keeping_refuses_half_precision_outside_layers():
    model = Tokens(shift, pos=(LENGTH, WIDTH)).bfloat16()
    assert by_tape(model, floats(LENGTH, 4).bfloat16(), Clip(norm=1.0)) is None


def test_layers_without_a_rule_are_found_without_a_forward_pass():
    model = nn.Sequential(nn.Linear(4, 4), nn.Bilinear(4, 4, 4))  # it has no rule, and never runs
    model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    assert by_tape(model, floats(4), Clip(norm=1.0)) is None


def pooled_token(m, t):
    """Mix equal tokens of all records, so that their gradients mix too."""
    tokens = torch.cat([m.cls.expand(len(t), -1, -1), t], 1)
    return torch.cat([tokens[:, :1].mean(0, keepdim=True).expand(len(t), -1, -1), tokens], 1)


def test_the_guard_refuses_gradients_shared_between_records():
    """Outputs do not show the mixing, because all copies are equal."""
    model = Tokens(pooled_token, cls=(1, 1, WIDTH))
    quiet_training(model)
    params = dict(model.named_parameters())

    def of(x, y):
        return F.cross_entropy(model(x), y, reduction="none")

    def clipped(x, y, clip):
        batch = batch_of(x)
        return clipped_gradient(
            Forward(model), lambda f, b: of(b.inputs, y[b.labels]), params, batch, clip, None
        )

    case = GradientCase(
        losses=of,
        clipped=clipped,
        params=params,
        inputs=floats(LENGTH, 4)[:3],
        labels=torch.arange(3),
    )
    with pytest.raises(GuardError, match="cls"):
        check_gradients(case, "the model")


def test_the_search_for_parameters_outside_layers_skips_layers():
    model = Tokens(vision, cls=(1, 1, WIDTH), pos=(1, LENGTH + 1, WIDTH))
    found = broadcasts.bare_parameters(model, {"pos": model.pos}, 10**6)
    assert found and not broadcasts.bare_parameters(nn.PReLU(), {"weight": model.pos}, 10**6)
    twin = copy.deepcopy(model)
    assert not broadcasts.bare_parameters(twin, {"pos": twin.pos}, twin.pos.numel())
