"""A training step makes no tensor as large as the model except the gradient; tensors are
counted.
"""

from functools import partial

import pytest
import torch
from torch.overrides import TorchFunctionMode

from helpers.learners import bits, same_bits
from perdure.contract.combine import Combine
from perdure.contract.state import State
from perdure.contract.strategy import Strategy
from perdure.learner.step_memory import StepMemory
from perdure.models.classifiers import mlp
from perdure.strategies import EWC, L2, MAS, SI, Naive, RWalk
from perdure.utils.pieces import PIECE

HIDDEN = (300, 300)
LARGE = 300 * 300
"""Numbers of the largest parameter: more than a piece."""


class Fresh(TorchFunctionMode):
    """Count the new tensors of a large parameter's size that torch functions make."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given = {t.data_ptr() for t in args if isinstance(t, torch.Tensor)}
        if isinstance(made, torch.Tensor) and made.numel() >= LARGE:
            self.count += made.data_ptr() not in given
        return made


@pytest.fixture
def begun(learner_of, toy_stream):
    """Return a learner of a model with a large layer, some steps into its second experience."""

    def make(strategy, **options):
        stream = toy_stream()
        model = mlp(input_shape=(5,), num_classes=4, hidden=HIDDEN, seed=1)
        learner = learner_of(strategy, model=model, iterations=20, **options)
        learner.prepare(stream)
        learner.begin(0)
        learner.train(range(3))
        learner.finish()
        learner.begin(1)
        learner.train(range(3))
        return learner

    assert LARGE > PIECE
    return make


@pytest.mark.parametrize(
    "strategy",
    [
        EWC(strength=1.0),
        EWC(strength=1.0, mode="online"),
        MAS(strength=1.0),
        L2(strength=1.0),
        SI(strength=1.0),
        RWalk(strength=1.0, window=100),
        Combine(SI(strength=1.0), EWC(strength=1.0)),
    ],
    ids=repr,
)
def test_a_step_makes_no_tensor_as_large_as_the_model(begun, strategy):
    learner = begun(strategy)
    session = learner.session
    for step in (3, 4):
        batch = session.sample(step)
        gradient = learner.curator.gradient(session.losses, session.trained, batch, step)
        with Fresh() as before:
            session.set_gradients(gradient, ())
        learner.current_optimizer.step()
        with Fresh() as after:
            session.follow_step()
        assert before.count == after.count == 0


@pytest.mark.parametrize("strategy", [EWC(strength=1.0), SI(strength=1.0)], ids=repr)
def test_gradients_and_si_paths_reuse_their_memory_over_steps(begun, strategy):
    learner = begun(strategy)

    def places():
        kept = {n: t for n, t in learner.state.items() if n.startswith("path/")}
        kept |= {f"gradient {n}": p.grad for n, p in learner.params.items()}
        return {name: value.data_ptr() for name, value in kept.items()}

    first = places()
    learner.train(range(3, 6))
    assert places() == first


@pytest.mark.parametrize("strategy", [SI(strength=1.0), RWalk(strength=1.0, window=3)], ids=repr)
def test_a_strategy_state_given_by_the_caller_is_not_changed(begun, strategy):
    learner = begun(strategy)
    held = State(bits(learner.state), learner.state.rules)
    values = bits(held)
    learner.session.state = held
    learner.train(range(3, 6))
    assert same_bits(dict(held), values)
    followed = "path" if isinstance(strategy, SI) else "metric"
    assert not torch.equal(
        learner.state[f"{followed}/head.weight"], values[f"{followed}/head.weight"]
    )


class Collecting(Strategy):
    """A strategy that keeps its arguments, as allowed without in-place updates."""

    def init(self, spec):
        return State().declare_group("before", spec.params, "local")

    def after_step(self, before, after, gradient, state, noise_variance=0.0):
        return state.replace_group("before", before)


def test_updates_that_are_not_in_place_keep_the_old_state(begun):
    learner = begun(Collecting())
    kept = learner.state
    values = bits(kept)
    learner.train(range(3, 5))
    assert same_bits(dict(kept), values)
    assert not torch.equal(learner.state["before/head.weight"], values["before/head.weight"])


def test_the_released_gradient_shares_no_optimizer_memory(begun):
    nesterov = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=True)
    learner = begun(SI(strength=1.0), optimizer=nesterov)
    session = learner.session
    batch = session.sample(3)
    gradient = learner.curator.gradient(session.losses, session.trained, batch, 3)
    values = bits(gradient)
    session.set_gradients(gradient, ())
    learner.current_optimizer.step()
    assert same_bits(gradient, values)


def test_a_second_copy_of_a_stored_gradient_uses_new_memory():
    """If a loop zeroes gradients in place, autograd adds to the kept tensors."""
    memory = StepMemory()
    kept = memory.copy_of({"w": torch.ones(3)})
    again = memory.copy_of(kept)
    again["w"].add_(1)
    assert kept["w"].tolist() == [1, 1, 1] and again["w"].tolist() == [2, 2, 2]


def test_a_gradient_with_shared_memory_is_copied():
    """Autograd may return one number for many entries, and one tensor for two parameters."""
    shared = torch.ones(1).expand(3)
    kept = StepMemory().copy_of({"a": shared, "b": shared})
    kept["a"][0] = 5.0
    assert kept["a"].tolist() == [5, 1, 1] and kept["b"].tolist() == [1, 1, 1]


def test_the_gradient_is_not_copied_without_penalty_or_path(begun):
    learner = begun(Naive())
    session = learner.session
    batch = session.sample(3)
    gradient = learner.curator.gradient(session.losses, session.trained, batch, 3)
    session.set_gradients(gradient, ())
    assert all(param.grad is gradient[name] for name, param in session.trained.items())
