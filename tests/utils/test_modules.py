"""Bit comparison of tensors, and training modes of modules."""

import pytest
import torch
from torch import nn

from perdure.utils.modules import (
    begin_training,
    ignores_mode,
    parts_of,
    same_bits,
    share_memory,
    state_of,
)

NUMBERS = [torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_same_bits_is_true_only_for_bit_identical_tensors(dtype):
    one = torch.tensor([[1, 0], [1, 1]]).to(dtype)
    assert same_bits(one, one.clone())
    assert same_bits(one.T, one.T.contiguous())
    assert not same_bits(one, 1 - one.long().to(dtype) if dtype != torch.bool else ~one)
    assert not same_bits(one, one.flatten())
    assert same_bits(one.sum().to(dtype), one.sum().to(dtype))


def test_same_bits_separates_signed_zeros_and_accepts_equal_nan():
    zero, nan = torch.tensor(0.0), torch.tensor([float("nan")])
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.int())
    assert same_bits(nan, nan.clone())


class HalfFrozen(nn.Module):
    """A model whose normalisation never enters training mode, and counts the calls."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.asked = 0

    def train(self, mode=True):
        self.asked += 1
        super().train(mode)
        self.norm.eval()
        return self


def test_begin_training_calls_overridden_train_methods():
    model = nn.Sequential(HalfFrozen())
    for asked in (1, 2):
        begin_training(model)
        assert model[0].asked == asked
        assert not model[0].norm.training


def test_begin_training_sets_every_submodule_to_training_mode():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[1].eval()
    begin_training(model)
    assert all(part.training for part in model.modules())


@pytest.mark.parametrize(
    ("part", "ignores"),
    [(nn.ReLU(), True), (nn.Dropout(0.1), False), (nn.BatchNorm1d(2), False), (nn.RReLU(), False)],
    ids=lambda value: type(value).__name__,
)
def test_ignores_mode_is_true_for_parts_without_a_mode(part, ignores):
    assert ignores_mode(nn.Sequential(nn.Linear(2, 2), part)) is ignores


class Renamed(nn.Linear):
    """Layer with a state of its own."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}other"] = self.weight if keep_vars else self.weight.detach()


def nested(last):
    shared = nn.Linear(2, 2)
    body = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(shared, nn.ReLU()), shared, last)
    body.register_buffer("kept", torch.ones(1))
    body.register_buffer("dropped", torch.ones(1), persistent=False)
    return body


def hooked():
    def without_bias(module, state, prefix, _):
        del state[f"{prefix}bias"]

    layer = nn.Linear(2, 3)
    layer.register_state_dict_post_hook(without_bias)
    return layer


@pytest.mark.parametrize("last", [nn.Identity(), Renamed(2, 3), hooked()], ids=str)
def test_state_of_returns_the_tensors_of_the_state_dict(last):
    module = nested(last)
    expected = module.state_dict(keep_vars=True)
    found = state_of(module)
    assert list(found) == list(expected)
    assert all(found[name] is value for name, value in expected.items())


def test_parts_of_returns_every_module_once():
    module = nested(nn.Identity())
    parts = parts_of(module)
    assert len(parts) == len(set(parts))
    assert set(parts) == set(module.modules())


def test_share_memory_skips_parameters_of_another_shape():
    first = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    second = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    own = second[1].weight.clone()
    share_memory(state_of(second), state_of(first))
    with torch.no_grad():
        first[0].weight.fill_(7.0)
    assert second[0].weight.eq(7.0).all()
    assert torch.equal(second[1].weight, own)
