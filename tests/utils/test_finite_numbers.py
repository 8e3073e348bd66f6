"""Test of tensors for NaN and infinity, of every dtype that a model may have."""

import pytest
import torch

from perdure.utils.finite_numbers import all_finite

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.int64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_numbers_are_finite(dtype):
    assert all_finite(torch.ones(3, 4, dtype=dtype))
    assert all_finite(torch.empty(0, dtype=dtype))


@pytest.mark.parametrize("dtype", [each for each in DTYPES if each != torch.int64])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_one_wrong_number_is_found(dtype, wrong):
    value = torch.ones(3, 4, dtype=dtype)
    value[1, 2] = wrong
    assert not all_finite(value)


def test_infinities_of_both_signs_are_found():
    assert not all_finite(torch.tensor([float("inf"), -float("inf")]))


def test_a_sum_that_overflows_is_of_finite_numbers():
    assert all_finite(torch.full((4,), 3e38))
