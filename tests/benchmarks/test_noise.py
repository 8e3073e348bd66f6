"""The noise benchmark: every method draws, and the rows name it. Speeds are not tested.

What comes out is not tested.
"""

import importlib
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def noise():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("noise")


def test_the_small_noise_benchmark_draws_at_the_stated_scale(noise):
    total = torch.zeros(20_000, dtype=torch.int64)
    noise.exact_small(total, 2.0**20)
    assert 0.97 < float(total.double().std()) / 2**20 < 1.03  # 6 standard errors
    assert len(total.unique()) > 19_000


def test_noise_benchmark_rows_name_every_method(noise):
    rows = noise.measure("small", 10_000, 1)
    by_method = {row["method"]: row for row in rows}
    assert list(by_method) == ["exact, compiled", "exact, NumPy", "words", "torch.randn"]
    assert all(row["nanoseconds_a_number"] > 0 for row in rows)
    assert {name for name, row in by_method.items() if "met" in row} == {"exact, compiled"}
