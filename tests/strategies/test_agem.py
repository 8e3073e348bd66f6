from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.contract.plan import MemoryPlan
from perdure.contract.state import State
from perdure.errors import ConfigError
from perdure.learner.learner import Learner
from perdure.privacy.settings import Privacy
from perdure.strategies import AGEM
from perdure.strategies.agem import against


def flat(params):
    return torch.cat([value.flatten() for value in params.values()])


def pair(seed):
    place = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 2), "b": (4,)}
    return [
        {name: torch.randn(shape, generator=place) for name, shape in shapes.items()} for _ in "gr"
    ]


@pytest.mark.property
@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_agem_projection_equals_the_formula(seed):
    gradient, reference = pair(seed)
    g = flat(gradient)
    r = flat(reference)
    mine = AGEM(memory_size=5).project(gradient, (reference,), State())
    assert [value.shape for value in mine.values()] == [(3, 2), (4,)]
    if float(g @ r) >= 0:
        assert all(torch.equal(mine[name], value) for name, value in gradient.items())
    else:
        torch.testing.assert_close(flat(mine), g - (g @ r) / (r @ r) * r)
        assert abs(float(flat(mine) @ r)) < 1e-4
    nearest = (
        g.double()
        - min(0.0, float(g.double() @ r.double())) / float(r.double() @ r.double()) * r.double()
    )
    assert float((flat(mine).double() - nearest).norm()) < 1e-4  # nearest point of the half-space


def test_agem_with_a_missing_or_zero_reference_changes_nothing():
    gradient, _ = pair(0)
    assert AGEM(memory_size=5).project(gradient, (), State()) is gradient
    nothing = {name: torch.zeros_like(value) for name, value in gradient.items()}
    mine = against(gradient, nothing)
    assert all(torch.equal(mine[name], value) for name, value in gradient.items())


@pytest.mark.parametrize(
    "privacy", [None, Privacy(noise_multiplier=1.0, seed=0)], ids=["plain", "private"]
)
def test_an_agem_step_uses_the_projected_gradient(toy_stream, toy_model, privacy):
    """Plain gradient descent at rate 0.5; the gradients point with and against the reference in
    turn.
    """
    stream = toy_stream()
    model = toy_model(toy_stream())
    learner = Learner(
        model=model,
        strategy=AGEM(memory_size=12),
        optimizer=partial(torch.optim.SGD, lr=0.5),
        iterations=12,
        batch_size=8,
        privacy=privacy,
    )
    learner.prepare(stream)
    learner.begin(0)
    learner.train(range(12))
    learner.finish()
    learner.begin(1)
    asked = {}
    gradient_of = learner.curator.gradient
    reference_of = learner.curator.reference

    def reference(*arguments, **options):
        asked["reference"] = reference_of(*arguments, **options)
        return asked["reference"]

    def gradient(losses, params, batch, step):
        given = gradient_of(losses, params, batch, step)
        with_it = float(flat(given) @ flat(asked["reference"])) >= 0
        sign = 1 if with_it == (step % 2 == 0) else -1
        asked["gradient"] = {name: sign * value for name, value in given.items()}
        return asked["gradient"]

    learner.curator.gradient = gradient
    learner.curator.reference = reference
    before = flat(learner.params).detach().clone()
    moved = []
    learner.callbacks = [
        lambda point, _: (
            point == "step.done" and moved.append(flat(learner.params).detach().clone())
        )
    ]
    for step in range(12):
        learner.train(range(step, step + 1))
        g = flat(asked["gradient"])
        r = flat(asked["reference"])
        assert float(r.norm()) > 0 and (float(g @ r) < 0) == (step % 2 == 1)
        expected = g - (g @ r) / (r @ r) * r if step % 2 else g
        torch.testing.assert_close(moved[-1], before - 0.5 * expected, rtol=1e-4, atol=1e-5)
        before = moved[-1]


def test_agem_equals_plain_training_in_the_first_experience(toy_stream, toy_model):
    from perdure.strategies import Naive

    ends = []
    for strategy in (AGEM(memory_size=12), Naive()):
        stream = toy_stream()
        learner = Learner(
            model=toy_model(stream),
            strategy=strategy,
            optimizer=torch.optim.Adam,
            iterations=5,
            batch_size=8,
        )
        learner.prepare(stream)
        learner.begin(0)
        learner.train(range(5))
        ends.append(flat(learner.params))
    assert torch.equal(*ends)


def test_agem_batches_contain_no_stored_rows(toy_stream, toy_model):
    stream = toy_stream()
    roles = []

    def look(point, learner):
        if point == "step.done":
            batch = learner.session.held.sample(learner.position.step - 1)
            roles.append((bool(batch.from_memory.any()), set(batch.tasks.tolist())))

    Learner(
        model=toy_model(stream),
        strategy=AGEM(memory_size=12),
        optimizer=torch.optim.SGD,
        iterations=2,
        batch_size=8,
        callbacks=[look],
    ).fit(stream)
    assert roles == [(False, {0})] * 2 + [(False, {1})] * 2


def test_agem_plans_memory_for_one_reference_gradient(toy_stream):
    first = toy_stream()[0]
    assert AGEM(memory_size=9, selection="ring", per_class=2, batch_size=3).plan(
        first
    ).memory == MemoryPlan(capacity=9, selection="ring", per_class=2, batch_size=3, use="reference")
    assert AGEM(memory_size="0.36 kB").plan(first).memory.capacity == 10
    assert AGEM.privacy_cost.references == 1 and AGEM.privacy_cost.reuses_past_records


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_size": 0}, "memory_size = 0"),
        ({"memory_size": 5, "selection": "best"}, "agem.selection = 'best'"),
        ({"memory_size": "5 records"}, "memory_size = '5 records'"),
    ],
)
def test_agem_refuses_invalid_options(toy_stream, options, message):
    with pytest.raises(ConfigError, match=message):
        AGEM(**options).plan(toy_stream()[0])
