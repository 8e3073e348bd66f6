"""Sums on the grid: exact addition, bounded changes, and the cost of rounding."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from perdure.errors import BudgetError, PrivacyError
from perdure.learner.learner import Learner
from perdure.models.classifiers import mlp
from perdure.privacy import grid
from perdure.privacy.accounting.accountants import MOST_DRAWS
from perdure.privacy.accounting.calibration import epsilon
from perdure.privacy.accounting.charges import Charge
from perdure.privacy.clipping import row_loops
from perdure.privacy.clipping.clip import Clip, clipped_sum, sum_of_clipped
from perdure.privacy.grid import MOST_UNITS, SENSITIVITY, SLACK, Grid
from perdure.privacy.ledger.entries import Entry
from perdure.privacy.ledger.ledger import Ledger
from perdure.privacy.noise.compiled import grid_loops
from perdure.privacy.noise.key import NoiseKey
from perdure.privacy.settings import Privacy
from perdure.strategies import Naive

SHAPES = {"a": torch.Size([3, 5]), "b": torch.Size([]), "c": torch.Size([0, 4])}


def test_grid_units_convert_back_to_the_same_values():
    grid = Grid.of(16, 1.1)
    total = {
        name: torch.randint(-(10**6), 10**6, tuple(shape)).double() * (0.3 / grid.steps)
        for name, shape in SHAPES.items()
    }
    units = grid.units(total, SHAPES, 0.3)
    assert units.dtype == torch.int64 and len(units) == 16
    back = grid.values(units, SHAPES, 0.3, torch.device("cpu"))
    assert {n: v.shape for n, v in back.items()} == SHAPES
    for name, value in total.items():
        assert back[name].dtype == torch.float32
        torch.testing.assert_close(back[name].double(), value)


@pytest.mark.parametrize("numbers", [1, 7, 478_410, 28_000_000])
@pytest.mark.parametrize("noise", [1e-3, 0.5, 1.1, 40.0])
def test_grid_rounding_stays_small_and_noise_spans_64_steps(numbers, noise):
    grid = Grid.of(numbers, noise)
    assert math.sqrt(numbers) / grid.steps <= 2.0**-11
    assert noise * grid.steps >= 64
    assert 1 + SLACK + math.sqrt(numbers) / grid.steps <= SENSITIVITY
    assert grid.steps & (grid.steps - 1) == 0


def test_a_sum_beyond_exact_integers_is_refused():
    grid = Grid.of(1, 1.0)
    with pytest.raises(PrivacyError, match="too large to be added exactly"):
        grid.units({"a": torch.tensor([2.0**50])}, {"a": torch.Size([1])}, 1.0)
    with pytest.raises(PrivacyError, match="2 coordinates, but its grid was made for at most 1"):
        grid.units(None, {"a": torch.Size([2])}, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_grid_conversions_equal_those_of_numpy(dtype):
    """Halves of a step round to the even integer, and too large or NaN values are refused."""
    steps = 2.0**20
    values = torch.randn(50_000, dtype=dtype, generator=torch.Generator().manual_seed(0))
    values[:1000] = (torch.arange(1000) + 0.5) / steps
    counted = []
    for to_units, to_values in ((grid.to_units, grid.to_values), grid_loops()):
        units = np.zeros(len(values), dtype=np.int64)
        assert to_units(values.numpy(), steps, MOST_UNITS, units)
        back = np.zeros(len(values), dtype=np.float32)
        to_values(units, 1 / steps, back)
        parts = np.zeros(len(values), dtype=np.float32)
        to_values(units / 3, 1 / steps, parts)
        counted.append((units, back, parts))
        for bad in (MOST_UNITS, -MOST_UNITS, math.nan, math.inf):
            wrong = values.clone()
            wrong[777] = bad / steps
            assert not to_units(wrong.numpy(), steps, MOST_UNITS, units.copy())
    for mine, theirs in zip(*counted, strict=True):
        assert np.array_equal(mine, theirs)


def change(rows, index, clip):
    """Return the norm of the change of the grid sum without one row, in clip norms."""
    grid = Grid(numbers=rows.shape[1], steps=clip.steps)
    shapes = {"a": rows.shape[1:]}
    kept = torch.arange(len(rows)) != index
    whole, fewer = (
        grid.units(sum_of_clipped({"a": part}, clip), shapes, clip.norm)
        for part in (rows, rows[kept])
    )
    return float((whole - fewer).double().norm()) / clip.steps


@pytest.mark.parametrize(
    "n",
    [
        60_000,
        pytest.param(600_000, marks=pytest.mark.deep(reason="full replay: ten times the rows")),
    ],
)
def test_one_of_many_rows_changes_the_grid_sum_by_its_clip_norm(n):
    """In float32 the change was 1.013 C at 60,000 rows and 1.549 C at 600,000."""
    rows = torch.full((n, 8), 3.0) + torch.arange(8) / 7
    clip = Clip(norm=0.7, steps=Grid.of(8, 1.0).steps)
    for index in (0, n // 2, n - 1):
        assert change(rows, index, clip) <= 1 + math.sqrt(8) / 2 / clip.steps


def test_grid_sums_are_exact_in_any_order_of_rows():
    rows = torch.randn(5000, 30, generator=torch.Generator().manual_seed(0)) * 10
    clip = Clip(norm=1.0, steps=Grid.of(30, 1.0).steps)
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(1))
    whole = sum_of_clipped({"a": rows}, clip)["a"]
    assert torch.equal(whole, sum_of_clipped({"a": rows[order]}, clip)["a"])
    assert torch.equal((whole * clip.steps).round(), whole * clip.steps)


def test_a_nan_row_adds_nothing_to_a_grid_sum():
    rows = torch.tensor([[math.nan, 1.0], [math.inf, 1.0], [3e38, 3e38], [0.3, 0.4]])
    clip = Clip(norm=1.0, steps=Grid.of(2, 1.0).steps)
    total = sum_of_clipped({"a": rows}, clip)["a"]
    expected = torch.tensor([0.3, 0.4])  # 3e38 is beyond all that is clipped, too
    torch.testing.assert_close(total.float(), expected, rtol=0, atol=2 / clip.steps)


def test_the_size_of_the_last_chunk_changes_no_clipped_row():
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    data = {"x": torch.randn(1001, 30, generator=torch.Generator().manual_seed(1))}
    clip = Clip(norm=1.0, steps=Grid.of(1200, 1.0).steps)

    def rows(params, record):
        return {"w": torch.outer(params["w"] @ record["x"], record["x"])}

    whole = clipped_sum(rows, {"w": weight}, data, clip, 100)["w"]
    fewer = clipped_sum(rows, {"w": weight}, {"x": data["x"][:-1]}, clip, 100)["w"]
    moved = float((whole - fewer).norm())
    assert moved <= 1 + math.sqrt(1200) / 2 / clip.steps


# ---- cost


@pytest.mark.parametrize(
    ("rate", "noise", "steps"),
    [(256 / 12_000, 1.1, 469), (0.01, 0.6, 1000), (0.1, 2.0, 300), (1.0, 4.4, 2)],
)
def test_grid_rounding_adds_less_than_1_percent_to_epsilon(rate, noise, steps):
    ideal = epsilon([Charge(rate, noise, steps)], delta=1e-5)
    real = epsilon([Charge(rate, noise, steps, "grid-gaussian")], delta=1e-5)
    assert ideal < real < 1.01 * ideal
    by_rdp = epsilon([Charge(rate, noise, steps, "grid-gaussian")], delta=1e-5, accountant="rdp")
    assert by_rdp > epsilon([Charge(rate, noise, steps)], delta=1e-5, accountant="rdp")


def test_the_grid_epsilon_is_above_that_of_the_ideal_gaussian():
    real = epsilon([Charge(0.02, 1.0, 100, "grid-gaussian")], delta=1e-5)
    scaled = epsilon([Charge(0.02, 1.0 / SENSITIVITY, 100)], delta=1e-5)
    assert 0 < real - scaled < 1e-3


def test_noise_too_small_for_the_grid_has_infinite_epsilon():
    assert epsilon([Charge(1.0, 0.05, 1, "grid-gaussian")], delta=1e-5) == math.inf
    assert epsilon([Charge(1.0, 0.3, 1, "grid-gaussian")], delta=1e-5) < 20


def entry(**changes):
    facts = Grid.of(2**40, 1.0).facts()
    return Entry(
        **{
            "purpose": "gradient",
            "mechanism": "gaussian",
            "noise_multiplier": 1.0,
            "clip_norm": 1.0,
            "first_step": 0,
            "steps": 100,
            "sampling": "poisson",
            "scope": {"p": 0.1},
            "grid": facts,
            "data": "",
            "start": "",
            "simulated": True,
        }
        | changes
    )


def test_the_ledger_refuses_more_noise_values_than_allowed():
    ledger = Ledger.open(None, key=NoiseKey.from_seed(0))
    ledger.declare("p", 100)
    ledger.charge(entry())
    with pytest.raises(BudgetError, match=f"allowed: at most {MOST_DRAWS}"):
        ledger.charge(entry(steps=2**9, first_step=100))


def test_a_ledger_entry_records_the_grid_settings():
    assert entry().grid.keys() == {
        "numbers",
        "steps",
        "slack",
        "rounding",
        "log2_error",
        "deviations",
    }
    assert entry().charge(["p"]) == Charge(0.1, 1.0, 100, "grid-gaussian")
    assert entry(grid=None).charge(["p"]) == Charge(0.1, 1.0, 100, "gaussian")
    assert entry().draws == 2**40 * 100


# ------------------------------------------------------------------ noise beyond the tables

TOO_MUCH = {
    "correlated": Privacy(noise_multiplier=1e3, delta=1e-3, bands=2, seed=0),
    "independent": Privacy(noise_multiplier=1e6, delta=1e-3, seed=0),
}


@pytest.mark.parametrize("kind", TOO_MUCH)
def test_noise_beyond_the_tables_is_refused_before_any_charge(toy_stream, kind):
    stream = toy_stream()
    learner = Learner(
        model=mlp(input_shape=(5,), num_classes=4, hidden=(64, 2048), seed=0),
        strategy=Naive(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        iterations=2,
        batch_size=8,
        privacy=TOO_MUCH[kind],
    )
    learner.prepare(stream)
    learner.begin(0)
    with pytest.raises(PrivacyError, match=r"noise of .* grid steps cannot be drawn"):
        learner.train(range(2))
    assert not learner.private_sum.ledger.entries


# ---- long rows


def long_rows(n=20):
    """Return rows of three parameters in two layers, of all lengths, one of them NaN."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.logspace(-3, 3, n).view(-1, 1, 1)
    weight = torch.randn(n, 90, 100, generator=draw) * lengths
    rows = {"a.weight": weight, "a.bias": weight[:, :, 0] * 3, "b.weight": weight.mT}
    rows["a.bias"][3, 5] = torch.nan
    return rows


@pytest.mark.parametrize("per_layer", [False, True], ids=["flat", "per layer"])
@pytest.mark.parametrize("steps", [0, 2**20])
def test_compiled_sums_of_long_rows_equal_sums_by_torch(per_layer, steps, monkeypatch):
    clip = Clip(norm=2.0, steps=steps, per_layer=per_layer, counted=True)
    rows = long_rows()
    assert row_loops.takes(rows)
    by_loop = sum_of_clipped(rows, clip)
    monkeypatch.setattr(row_loops, "LONG_ROW", 10**9)  # none is so long
    by_torch = sum_of_clipped(rows, clip)
    for name, value in by_torch.items():
        assert torch.equal(by_loop[name], value) and bool(value.isfinite().all())


class Unclipped(Clip):
    """A clip that scales no row, as a fault for the check of integer norms."""

    def factors(self, squares):
        return {layer: torch.ones_like(square) for layer, square in squares.items()}


@pytest.mark.parametrize("numbers", [30, 2**11])
def test_a_row_above_its_declared_bound_is_left_out(numbers):
    rows = 0.5 * torch.nn.functional.normalize(torch.randn(9, numbers))
    rows[[2, 5]] *= 7
    kept = rows[torch.arange(9)[(torch.arange(9) != 2) & (torch.arange(9) != 5)]]
    clip = Unclipped(norm=1.0, steps=2**20)
    assert torch.equal(
        sum_of_clipped({"a": rows}, clip)["a"], sum_of_clipped({"a": kept}, clip)["a"]
    )


def test_short_or_float64_rows_are_summed_by_torch():
    assert not row_loops.takes({"a": torch.zeros(2, row_loops.LONG_ROW).double()})
    assert not row_loops.takes({"a": torch.zeros(2 * row_loops.LONG_ROW, 1)})


class Passes(TorchDispatchMode):
    """Count torch operations on tensors of some size."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers = numbers
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        answer = func(*args, **(kwargs or {}))
        if isinstance(answer, torch.Tensor) and answer.numel() >= self.numbers:
            self.calls.append(func)
        return answer


def test_long_rows_are_summed_without_a_copy():
    rows = {"a": torch.randn(8, 2**13)}
    views = {
        torch.ops.aten.slice.Tensor,
        torch.ops.aten.view.default,
        torch.ops.aten.detach.default,
    }
    with Passes(2**13 * 8) as passes:
        sum_of_clipped(rows, Clip(norm=1.0, steps=2**20))
    assert set(passes.calls) <= views
