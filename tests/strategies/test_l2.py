import pytest
import torch

from perdure.contract.context import Spec
from perdure.errors import ConfigError
from perdure.learner.learner import Learner
from perdure.strategies import L2, Naive


def spec(params):
    return Spec(params=params, num_classes=2, num_experiences=2, feature_size=1, scenario="class")


def test_the_l2_penalty_equals_its_formula():
    anchors = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([[3.0]])}
    strategy = L2(strength=0.7)
    state = strategy.after_experience(None, anchors, strategy.init(spec(anchors)))
    at = {"a": torch.tensor([1.5, -4.0]), "b": torch.tensor([[0.0]])}
    assert strategy.penalty(at, state).item() == pytest.approx(0.7 * (0.25 + 4.0 + 9.0))
    assert set(state.rules.values()) == {"local"}


def test_the_l2_penalty_is_0_in_the_first_experience():
    params = {"a": torch.ones(3)}
    strategy = L2(strength=5.0)
    assert float(strategy.penalty({"a": torch.full((3,), 9.0)}, strategy.init(spec(params)))) == 0.0


def ends(strategy, stream, model):
    """Return the parameters after each experience."""
    found = []

    def look(point, learner):
        if point == "experience.end":
            found.append(
                {name: value.detach().clone() for name, value in learner.model.named_parameters()}
            )

    Learner(
        model=model,
        strategy=strategy,
        optimizer=lambda leaves: torch.optim.SGD(leaves, lr=0.2),
        iterations=30,
        batch_size=8,
        callbacks=[look],
    ).fit(stream)
    return found


def test_l2_changes_training_from_the_second_experience_on(toy_stream, toy_model):
    stream = toy_stream()
    held, free = (ends(s, stream, toy_model(stream)) for s in (L2(strength=2.0), Naive()))
    assert all(torch.equal(held[0][name], value) for name, value in free[0].items())
    moved = [
        sum(float((run[1][n] - run[0][n]).square().sum()) for n in run[0]) for run in (held, free)
    ]
    assert 0 < moved[0] < 0.1 * moved[1]


@pytest.mark.parametrize("strength", [-1.0, float("inf"), float("nan")])
def test_l2_refuses_an_invalid_strength(strength):
    with pytest.raises(ConfigError, match=r"l2\.strength"):
        L2(strength=strength)
