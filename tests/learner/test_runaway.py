"""Training that diverges: named at its step, by layer and quantity, and bounded gradients."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from perdure import Privacy, Session
from perdure.errors import ConfigError, DataError, RunawayError, RunError
from perdure.learner.runaway import EVERY, bounded
from perdure.models import mlp
from perdure.strategies import EWC, LwF, Naive
from perdure.types import Params

SIMULATED = Privacy(noise_multiplier=1.0, seed=0)
SGD = partial(torch.optim.SGD, lr=0.1)


class _Broken(torch.autograd.Function):
    """Identity whose gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nan


class BrokenGradient(nn.Module):
    """A classifier whose head has the gradient NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(input_shape=(5,), num_classes=4, hidden=(6,), seed=0)
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(_Broken.apply(self.body(x)))


def broken_at(step: int, name: str, value: float = torch.inf):
    """Return a callback that sets a parameter after the given step."""

    def callback(point, learner):
        if point == "step.done" and learner.position.step == step + 1:
            with torch.no_grad():
                learner.params[name].fill_(value)

    return callback


def test_a_parameter_that_is_lost_is_named_at_the_next_step(learner_of, toy_stream):
    learner = learner_of(iterations=30, callbacks=[broken_at(6, "head.bias")])
    message = (
        "Naive: parameter head.bias is NaN or infinite in step 7 of experience 0; lower the "
        "learning rate or the strength of the strategy, or give max_grad_norm"
    )
    with pytest.raises(RunawayError, match=message):
        learner.fit(toy_stream())
    assert learner.position.step == 7


def test_an_infinite_loss_names_the_largest_parameter(learner_of, toy_stream):
    learner = learner_of(iterations=9, callbacks=[broken_at(3, "head.weight", 3e38)])
    message = r"the loss is NaN or infinite in step 4 of .* parameter: head\.weight, 3\.0e\+38\);"
    with pytest.raises(RunawayError, match=message):
        learner.fit(toy_stream())


def test_a_gradient_that_is_nan_is_named_before_the_step(learner_of, toy_stream):
    learner = learner_of(model=BrokenGradient())
    before = {name: value.detach().clone() for name, value in learner.params.items()}
    message = r"the gradient of body\.body\.1\.weight \(and 3 more\) is NaN .* step 0 of exp"
    with pytest.raises(RunawayError, match=message):
        learner.fit(toy_stream())
    for name, value in learner.params.items():
        assert torch.equal(before[name], value)


def test_the_last_step_of_an_experience_is_checked_too(learner_of, toy_stream):
    learner = learner_of(iterations=5, callbacks=[broken_at(4, "head.weight", torch.nan)])
    with pytest.raises(RunawayError, match=r"head\.weight is NaN .* at the end of experience 0"):
        learner.fit(toy_stream())


def test_inputs_that_are_nan_are_named_instead(learner_of, toy_stream):
    stream = toy_stream()
    inputs = torch.cat([stream[0].train.inputs[:1] * torch.nan, stream[0].train.inputs[1:]])
    first = replace(stream[0], train=replace(stream[0].train, inputs=inputs))
    stream = replace(stream, experiences=(first, *stream.experiences[1:]))
    with pytest.raises(DataError, match="has nan in row 0"):
        learner_of(epochs=1, iterations=None).fit(stream)


def test_private_steps_are_checked_on_what_is_released(learner_of, toy_stream):
    learner = learner_of(
        privacy=SIMULATED, iterations=6, callbacks=[broken_at(2, "head.bias", torch.nan)]
    )
    with pytest.raises(RunawayError, match=r"parameter head\.bias is NaN .* in step 3 of"):
        learner.fit(toy_stream())


def test_large_finite_gradients_are_no_divergence(learner_of, toy_stream):
    class Huge(Naive):
        def add_penalty_gradient(self, gradient, params, state):
            for value in gradient.values():
                value.fill_(1e38)  # their sum overflows

        def penalty(self, params, state):
            return None

    still = partial(torch.optim.SGD, lr=1e-44)
    learner_of(Huge(), optimizer=still, iterations=EVERY + 2).fit(toy_stream())


# --------------------------------------------------------------------------- max_grad_norm


def test_a_bounded_gradient_equals_that_of_pytorch():
    for scale in (0.1, 100.0, torch.inf):
        made = [torch.randn(3, 2) * scale, torch.randn(4) * scale]
        params = [nn.Parameter(torch.zeros_like(value)) for value in made]
        for param, value in zip(params, made, strict=True):
            param.grad = value.clone()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        given: Params = dict(zip("ab", made, strict=True))
        found = bounded(given, 1.0)
        for param, name in zip(params, given, strict=True):
            torch.testing.assert_close(found[name], param.grad, equal_nan=True)


def norms_of(learner_of, toy_stream, **options) -> list[float]:
    """Return the norm of `.grad` in every step."""
    norms = []

    def look(point, learner):
        if point == "step.done":
            grads = [p.grad for p in learner.session.trained.values()]
            norms.append(float(torch.nn.utils.get_total_norm(grads)))

    learner = learner_of(callbacks=[look], iterations=4, optimizer=SGD, **options)
    learner.fit(toy_stream())
    return norms


@pytest.mark.parametrize("privacy", [None, SIMULATED], ids=["plain", "private"])
def test_the_whole_gradient_is_bounded_after_the_penalty(learner_of, toy_stream, privacy):
    options = {"strategy": EWC(strength=1e4), "privacy": privacy}
    free = norms_of(learner_of, toy_stream, **options)
    held = norms_of(learner_of, toy_stream, **options, max_grad_norm=0.05)
    assert max(free) > 0.06 and max(held) <= 0.05 * (1 + 1e-5)


def test_a_bound_keeps_a_penalty_from_diverging(learner_of, toy_stream):
    options = {"strategy": EWC(strength=1e6), "optimizer": SGD, "iterations": 60}
    with pytest.raises(RunawayError):
        learner_of(**options).fit(toy_stream())
    learner_of(**options, max_grad_norm=1.0).fit(toy_stream())


def test_a_loose_bound_changes_no_bit(learner_of, toy_stream):
    trained = []
    for bound in (None, 1e6):
        learner = learner_of(LwF(), max_grad_norm=bound)
        learner.fit(toy_stream())
        trained.append([value.detach().clone() for value in learner.params.values()])
    assert all(map(torch.equal, *trained))


def test_a_session_bounds_gradients_as_a_learner_does(learner_of, toy_stream):
    stream = toy_stream()
    learner = learner_of(max_grad_norm=0.05, optimizer=SGD, iterations=3)
    learner.fit(stream)
    other = learner_of(optimizer=SGD, iterations=3)
    session = Session(
        model=other.model,
        strategy=other.strategy,
        stream=stream,
        optimizer=SGD(other.model.parameters()),
        iterations=3,
        batch_size=other.batch_size,
        seed=other.seed,
        max_grad_norm=0.05,
    )
    for experience in stream:
        with session.experience(experience) as batches:
            for batch in batches:
                session.backward(batch)
                session.optimizer.step()
                session.after_step()
    for name, value in learner.params.items():
        assert torch.equal(value, other.params[name])


@pytest.mark.parametrize("value", [0.0, -1.0, torch.inf, torch.nan, True, "1"])
def test_a_bound_that_is_no_positive_number_is_refused(learner_of, value):
    with pytest.raises(ConfigError, match=r"max_grad_norm = .* a finite number above 0"):
        learner_of(max_grad_norm=value)


def test_another_bound_is_refused_on_resume(learner_of, toy_stream, tmp_path):
    learner_of(folder=tmp_path, max_grad_norm=1.0).fit(toy_stream())
    with pytest.raises(RunError, match=r"max_grad_norm \(given 2.0, stored 1.0\)"):
        learner_of(folder=tmp_path, max_grad_norm=2.0).fit(toy_stream())
