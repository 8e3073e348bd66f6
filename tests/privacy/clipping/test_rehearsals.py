"""First axes that have the batch's length by chance, with as many positions as records."""

import pytest
import torch
from torch import nn

from helpers.record_loops import TOLERANCE, batch_of, cross_entropies, gap_to_loop, size
from perdure.contract.forward import Forward
from perdure.privacy.clipping.clip import Clip
from perdure.privacy.grid import SLACK
from perdure.queries.batch_gradients import clipped_gradient
from perdure.utils.chunking import FEWEST_ROWS

WIDTH = 6


class Sequences(nn.Module):
    """Tokens (n, places, 4) with positions added by `place`, and a head."""

    def __init__(self, place, **parts):
        super().__init__()
        torch.manual_seed(0)
        self.place = place
        self.embed = nn.Linear(4, WIDTH)
        self.head = nn.Linear(WIDTH, 3)
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.head(torch.tanh(self.place(self, self.embed(x))).square().mean(1))


def looked_up_once(m, t):
    """Look the positions up once for all records, as GPT does."""
    return t + m.pos(torch.arange(t.shape[1]))


def length_first(m, t):
    return m.mix(t.transpose(0, 1)).transpose(0, 1)


def rows_of_the_table(m, t):
    """Apply a layer to a table of its own, such as stored class means."""
    return t + m.mix(m.pos.weight[: t.shape[1]].detach()).mean(0)


MODELS = {
    "positions looked up once": lambda: Sequences(looked_up_once, pos=nn.Embedding(64, WIDTH)),
    "length first": lambda: Sequences(length_first, mix=nn.Linear(WIDTH, WIDTH)),
    "length first, by Opacus": lambda: Sequences(length_first, mix=nn.RMSNorm(WIDTH)),
    "a table of its own": lambda: Sequences(
        rows_of_the_table, mix=nn.Linear(WIDTH, WIDTH), pos=nn.Embedding(64, WIDTH)
    ),
}


@pytest.mark.parametrize("places", [FEWEST_ROWS - 1, FEWEST_ROWS, 20])
@pytest.mark.parametrize("name", MODELS)
def test_positions_as_many_as_records_are_not_taken_for_records(name, places):
    x = torch.rand(places, places, 4, generator=torch.Generator().manual_seed(0))
    assert gap_to_loop(MODELS[name](), x) < TOLERANCE
    # few records are filled up
    assert gap_to_loop(MODELS[name](), x[:5]) < TOLERANCE


@pytest.mark.parametrize("places", [24, 17])
def test_a_batch_as_long_as_the_sequence_keeps_the_clip_norm(places):
    model = MODELS["positions looked up once"]()
    params = dict(model.named_parameters())
    batch = batch_of(torch.rand(places, places, 4))
    clip = Clip(norm=1e-3)  # that all are clipped

    def total(rows):
        return clipped_gradient(Forward(model), cross_entropies, params, rows, clip, None)

    whole = total(batch)
    for i in range(0, places, 4):
        part = total(batch.take(torch.arange(places) != i))
        moved = size({n: whole[n].double() - part[n].double() for n in whole})
        assert moved <= clip.norm * (1 + SLACK)


def test_losses_are_run_once_more_only_at_the_first_batch():
    model = Sequences(lambda m, t: t)
    passes = []
    model.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    params = dict(model.named_parameters())
    for records in (32, 17, 40):
        clipped_gradient(
            Forward(model),
            cross_entropies,
            params,
            batch_of(torch.rand(records, 5, 4)),
            Clip(norm=1.0),
            None,
        )
    assert passes == [32, FEWEST_ROWS - 1, 17, 40]


def test_the_second_run_of_losses_keeps_the_global_generator():
    model = Sequences(lambda m, t: t + 0 * torch.rand(1))
    params = dict(model.named_parameters())
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        batch = batch_of(torch.ones(20, 5, 4))
        clipped_gradient(Forward(model), cross_entropies, params, batch, Clip(norm=1.0), None)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_a_model_with_a_fixed_batch_size_gets_single_records():
    table = torch.randn(FEWEST_ROWS, 1, WIDTH)

    def place(m, t):
        return t + table[:1] if len(t) == 1 else t + 0 * table + table[:1]

    x = torch.rand(FEWEST_ROWS, 5, 4)
    assert gap_to_loop(Sequences(place), x) < TOLERANCE
