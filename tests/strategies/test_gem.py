import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear, minimize

from perdure.contract.plan import MemoryPlan
from perdure.contract.state import State
from perdure.errors import ConfigError
from perdure.learner.learner import Learner
from perdure.strategies import GEM
from perdure.strategies.agem import against
from perdure.strategies.gem import RIDGE, dual, flat


def problem(seed, references, width=7):
    """Return a gradient and references that point in similar or random directions."""
    place = torch.Generator().manual_seed(seed)
    draw = lambda: {  # noqa: E731
        "a": torch.randn(width - 3, generator=place),
        "b": torch.randn(3, generator=place),
    }
    return draw(), tuple(draw() for _ in range(references))


def matrices(gradient, references):
    return flat(gradient).double().numpy(), np.stack(
        [flat(reference).double().numpy() for reference in references]
    )


@pytest.mark.property
@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 5), st.sampled_from([0.0, 0.5, 2.0]))
def test_the_gem_dual_variables_solve_their_quadratic_program(seed, k, margin):
    """The reference is bounded least squares, |A v + b|^2 / 2 with A^T A = R R^T + ridge |r_k|^2,
    and optimality.
    """
    g, rows = matrices(*problem(seed, k))
    gram = rows @ rows.T + RIDGE * np.diag((rows**2).sum(1))
    along = rows @ g
    mine = dual(torch.from_numpy(rows @ rows.T), torch.from_numpy(along), margin).numpy()
    root = np.linalg.cholesky(gram)
    theirs = lsq_linear(root.T, -np.linalg.solve(root, along), bounds=(margin, np.inf), tol=1e-12).x
    np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    slope = gram @ mine + along
    assert (mine >= margin - 1e-9).all() and (slope >= -1e-6).all()
    assert np.abs(slope * (mine - margin)).max() < 1e-6


@pytest.mark.reference
@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 3))
def test_gem_with_margin_0_projects_to_the_nearest_gradient(seed, k):
    """SciPy solves the primal program; the ridge moves constraints by itself times the dual
    variables at most.
    """
    gradient, references = problem(seed, k)
    g, rows = matrices(gradient, references)
    mine = GEM(memory_size=5, margin=0.0).project(gradient, references, State())
    assert [value.shape for value in mine.values()] == [(4,), (3,)]
    nearest = minimize(
        lambda x: 0.5 * np.sum((x - g) ** 2),
        g,
        jac=lambda x: x - g,
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda x: rows @ x, "jac": lambda _: rows},
        options={"ftol": 1e-12},
    ).x
    np.testing.assert_allclose(
        flat(mine).numpy(), nearest, rtol=0, atol=2e-2 * (1 + np.abs(g).max())
    )
    v = dual(torch.from_numpy(rows @ rows.T), torch.from_numpy(rows @ g), 0.0).numpy()
    slack = RIDGE * v * (rows**2).sum(1)
    assert (rows @ flat(mine).double().numpy() >= -slack - 1e-4).all()


def test_a_grid_search_finds_no_better_gem_dual_solution():
    """The grid has two references and all dual variables from 0 to 4 in steps of 1/50."""
    g = np.array([1.0, -2.0, 0.5])
    rows = np.array([[0.0, 1.0, 0.3], [-1.0, 0.4, 0.0]])
    axis = np.linspace(0, 4, 201)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    ridge = RIDGE * (rows**2).sum(1)
    cost = 0.5 * ((grid @ rows) ** 2).sum(1) + 0.5 * (grid**2) @ ridge + grid @ (rows @ g)
    mine = dual(torch.from_numpy(rows @ rows.T), torch.from_numpy(rows @ g), 0.0).numpy()
    own = 0.5 * ((mine @ rows) ** 2).sum() + 0.5 * (mine**2) @ ridge + mine @ (rows @ g)
    assert own <= cost.min() and np.abs(grid[cost.argmin()] - mine).max() <= 0.02


@pytest.mark.property
@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_gem_with_one_reference_and_margin_0_equals_agem(seed):
    """Equal up to the ridge: v = -<g, r> / (<r, r> (1 + ridge))."""
    gradient, (reference,) = problem(seed, 1)
    mine = GEM(memory_size=5, margin=0.0).project(gradient, (reference,), State())
    apart = float((flat(mine) - flat(against(gradient, reference))).norm())
    along = float(flat(gradient) @ flat(reference))
    length = float(flat(reference) @ flat(reference))
    bound = max(0.0, -along) / length**0.5 * RIDGE
    assert apart <= bound * 1.01 + 1e-5


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("size", [1e-12, 0.014, 1e6])
def test_the_gem_projection_does_not_depend_on_gradient_sizes(size, margin):
    gradient, (first, second) = problem(3, 2)
    against_first = {name: value - 2 * first[name] for name, value in gradient.items()}
    strategy = GEM(memory_size=5, margin=margin)
    expected = flat(strategy.project(against_first, (first, second), State()))
    small, *rest = (
        {name: size * value for name, value in each.items()}
        for each in (against_first, first, second)
    )
    found = flat(strategy.project(small, tuple(rest), State()))
    torch.testing.assert_close(found / size, expected, rtol=1e-4, atol=1e-4)
    units = [flat(each) / flat(each).norm() for each in rest]
    assert min(float(found @ unit) for unit in units) >= -5e-3 * float(found.norm())


def test_gem_gives_short_and_long_references_equal_weight():
    gradient, (first, second) = problem(3, 2)
    strategy = GEM(memory_size=5, margin=0.0)
    expected = flat(strategy.project(gradient, (first, second), State()))
    short = {name: 1e-4 * value for name, value in first.items()}
    nothing = {name: 0 * value for name, value in first.items()}
    found = flat(strategy.project(gradient, (nothing, short, second), State()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_gem_keeps_a_gradient_that_agrees_with_its_references():
    gradient, _ = problem(0, 0)
    agreeing = tuple(
        {name: scale * value for name, value in gradient.items()} for scale in (1.0, 0.3)
    )
    strategy = GEM(memory_size=5, margin=0.5)
    assert strategy.project(gradient, (), State()) is gradient
    assert strategy.project(gradient, agreeing, State()) is gradient
    opposite = {name: -value for name, value in gradient.items()}
    at = [
        flat(GEM(memory_size=5, margin=margin).project(gradient, (opposite,), State()))
        for margin in (0.0, 1.5)
    ]
    assert float(at[0].norm()) < 1e-2
    torch.testing.assert_close(at[1], -0.5 * flat(gradient))  # g + 1.5 r


def test_gem_asks_one_reference_of_every_earlier_experience(toy_data, toy_model):
    from perdure.data.scenarios import split

    stream = split(toy_data, scenario="class", experiences=4)
    seen = []
    learner = Learner(
        model=toy_model(stream),
        strategy=GEM(memory_size=12),
        optimizer=partial(torch.optim.SGD, lr=0.5),
        iterations=2,
        batch_size=4,
    )
    learner.prepare(stream)
    for index in range(4):
        learner.begin(index)
        ask = type(learner.session.held).reference_rows

        def spy(of, held=learner.session.held, ask=ask):
            rows = ask(held, of)
            seen.append((held.experiences[-1].index, of, set(rows.tasks.tolist())))
            return rows

        learner.session.held.reference_rows = spy
        learner.train(range(2))
        learner.finish()
    assert seen == [
        (index, of, {of}) for index in (1, 2, 3) for _ in range(2) for of in range(index)
    ]
    assert all(bool(value.isfinite().all()) for value in learner.params.values())


def test_gem_plans_memory_for_reference_gradients(toy_stream):
    first = toy_stream()[0]
    assert GEM(memory_size=9, batch_size=3).plan(first).memory == MemoryPlan(
        capacity=9, selection="ring", batch_size=3, use="references"
    )
    assert (
        GEM(memory_size="0.36 kB").plan(first).memory.capacity == 10
        and GEM.privacy_cost.references == 1
    )


@pytest.mark.parametrize("margin", [-0.1, math.inf, math.nan])
def test_gem_refuses_invalid_options(toy_stream, margin):
    with pytest.raises(
        ConfigError, match=r"gem\.margin = .* is not allowed; allowed: a finite number, 0 or more"
    ):
        GEM(memory_size=5, margin=margin)
    with pytest.raises(ConfigError, match="memory_size = 0"):
        GEM(memory_size=0).plan(toy_stream()[0])
