"""Tensors that are compared to the bit."""

import pytest
import torch

from perdure.utils.modules import same_bits

NUMBERS = [torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_tensors_are_the_same_only_to_the_last_bit(dtype):
    one = torch.tensor([[1, 0], [1, 1]]).to(dtype)
    assert same_bits(one, one.clone())
    assert same_bits(one.T, one.T.contiguous())
    assert not same_bits(one, 1 - one.long().to(dtype) if dtype != torch.bool else ~one)
    assert not same_bits(one, one.flatten())
    assert same_bits(one.sum().to(dtype), one.sum().to(dtype))


def test_signed_zeros_and_dtypes_differ_and_nan_equals_itself():
    zero, nan = torch.tensor(0.0), torch.tensor([float("nan")])
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.int())
    assert same_bits(nan, nan.clone())
