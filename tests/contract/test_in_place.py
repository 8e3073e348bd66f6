"""In-place hooks: quadratic penalties by formula, and updates of path integrals."""

from dataclasses import dataclass

import pytest
import torch

from perdure.contract.combine import Combine
from perdure.contract.context import Spec
from perdure.contract.quadratic_penalty import QuadraticPenalty
from perdure.contract.state import State
from perdure.contract.strategy import Strategy
from perdure.errors import StrategyError
from perdure.strategies import EWC, L2, MAS, SI, Naive, RWalk
from perdure.utils.pieces import PIECE

PULLS = [
    EWC(strength=3.0),
    EWC(strength=3.0, mode="online", decay=0.5),
    MAS(strength=3.0),
    SI(strength=3.0),
    RWalk(strength=3.0, window=2),
    L2(strength=3.0),
    Combine(EWC(strength=3.0), Naive(), SI(strength=2.0)),
]
FOLLOWING = [SI(strength=1.0), RWalk(strength=1.0, window=2), Combine(SI(strength=1.0), Naive())]


def drawn(seed=0):
    """Return tensors of one piece and of several pieces, the last of which is short."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"large": (3, PIECE // 2 + 5), "small": (7,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def state_of(strategy):
    """Return a state in the middle of a run, with whole-number counters and squares above 0."""
    spec = Spec(params=drawn(), num_classes=2, num_experiences=2, feature_size=1, scenario="class")
    laid_out = strategy.init(spec)
    generator = torch.Generator().manual_seed(9)
    values = {
        name: torch.randn(value.shape, generator=generator) if value.dim() else value + 1
        for name, value in laid_out.items()
    }
    values |= {name: value.abs() for name, value in values.items() if "metric/" in name}
    return State(values, laid_out.rules)


def autograd(strategy, params, state):
    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    total = {name: torch.ones_like(value) for name, value in params.items()}
    Strategy.add_penalty_gradient(strategy, total, leaves, state)
    return total


@pytest.mark.parametrize("strategy", PULLS, ids=repr)
def test_the_penalty_gradient_formula_equals_autograd(strategy):
    state = state_of(strategy)
    params = drawn(1)
    before = {name: value.clone() for name, value in state.items()}
    total = {name: torch.ones_like(value) for name, value in params.items()}
    strategy.add_penalty_gradient(total, params, state)
    expected = autograd(strategy, params, state)
    assert float(expected["large"].abs().max()) > 2
    for name, value in expected.items():
        torch.testing.assert_close(total[name], value, rtol=1e-5, atol=1e-5)
        if not isinstance(strategy, Combine):
            assert torch.equal(total[name], value)
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_the_penalty_gradient_covers_only_trained_parameters():
    strategy = EWC(strength=3.0)
    total = {"small": torch.zeros(7)}
    strategy.add_penalty_gradient(total, drawn(1), state_of(strategy))
    assert list(total) == ["small"] and bool(total["small"].all())


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("strategy", FOLLOWING, ids=repr)
def test_the_in_place_update_equals_the_functional_update(strategy, noise):
    """The steps cross the end of a window, with counters at 1."""
    anew = state_of(strategy)
    in_place = State({name: value.clone() for name, value in anew.items()}, anew.rules)
    places = {name: value.data_ptr() for name, value in in_place.items()}
    for step in range(3):
        before = drawn(step)
        after = {name: value - 0.1 * drawn(step + 7)[name] for name, value in before.items()}
        anew = strategy.after_step(before, after, drawn(step + 20), anew, noise)
        in_place = strategy.after_step_in_place(before, after, drawn(step + 20), in_place, noise)
    for name, value in anew.items():
        assert torch.equal(in_place[name], value)  # or a resumed run would end in other bits
        group = name.rpartition("/")[0].rpartition(".")[2]
        at_the_end_of_a_window = group in ("won", "moved", "walked")
        assert at_the_end_of_a_window or in_place[name].data_ptr() == places[name]


@dataclass(frozen=True, kw_only=True)
class Cubic(EWC):
    """A penalty that overrides only `penalty`."""

    def penalty(self, params, state):
        return torch.stack([value.pow(3).sum() for value in params.values()]).sum()


@dataclass(frozen=True, kw_only=True)
class Counting(SI):
    """A strategy that overrides only `after_step`."""

    def after_step(self, before, after, gradient, state, noise_variance=0.0):
        return state.replace_group("path", {n: state[f"path/{n}"] + 1 for n in before})


class Mixed(Counting, Cubic):
    """A strategy that inherits both hooks from its bases."""


@pytest.mark.parametrize("kind", [Cubic, Mixed])
def test_autograd_differentiates_an_overridden_penalty(kind):
    strategy = kind(strength=5.0)
    params = {name: value.requires_grad_() for name, value in drawn(1).items()}
    total = {name: torch.zeros_like(value) for name, value in params.items()}
    strategy.add_penalty_gradient(total, params, state_of(strategy))
    torch.testing.assert_close(total["small"], 3 * params["small"].detach().square())
    assert not strategy.uses("add_penalty_gradient")


def test_the_in_place_update_calls_an_overridden_after_step():
    strategy = Counting(strength=5.0)
    state = state_of(strategy)
    moved = strategy.after_step_in_place(drawn(), drawn(1), drawn(2), state)
    assert torch.equal(moved["path/small"], state["path/small"] + 1)
    assert not strategy.uses("after_step_in_place") and SI(strength=1.0).uses("after_step_in_place")


def test_combine_updates_in_place_only_if_every_part_does():
    assert Combine(SI(strength=1.0), EWC(strength=1.0)).uses("after_step_in_place")
    mixed = Combine(SI(strength=1.0), Counting(strength=1.0))
    assert mixed.uses("after_step") and not mixed.uses("after_step_in_place")
    assert not Combine(Naive()).uses("after_step_in_place")


def test_a_quadratic_penalty_without_a_weight_method_is_refused():
    with pytest.raises(StrategyError, match=r"has no weight\(\).*return the weights"):
        QuadraticPenalty().weight(State())
