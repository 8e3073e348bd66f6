import math

import pytest
import torch
import torch.nn.functional as F

from perdure.contract.context import Spec, contexts
from perdure.contract.forward import Forward
from perdure.data.records import Batch
from perdure.errors import ConfigError
from perdure.learner.learner import Learner
from perdure.strategies import FeatureDistillation, Naive


@pytest.fixture
def problem(toy_stream, toy_model):
    stream = toy_stream()
    model = toy_model(stream).eval()
    teacher = {name: value.detach() + 0.3 for name, value in model.named_parameters()}
    spec = Spec(params=teacher, num_classes=4, num_experiences=2, feature_size=6, scenario="class")
    return stream, model, teacher, spec


@pytest.mark.reference
def test_the_feature_distillation_loss_equals_its_formula(problem):
    stream, model, teacher, spec = problem
    strategy = FeatureDistillation(strength=0.7)
    batch = Batch.current(stream[1].train, 1)
    at = contexts(stream, "cpu")(1)
    mine = strategy.losses(Forward(model), batch, at, strategy.init(spec))

    def hidden(params, x):
        return torch.tanh(x @ params["body.1.weight"].T + params["body.1.bias"])

    now = dict(model.named_parameters())
    for i, (x, y) in enumerate(zip(batch.inputs, batch.labels, strict=True)):
        logits = hidden(now, x) @ now["head.weight"].T + now["head.bias"]
        distance = sum(
            (a - b) ** 2
            for a, b in zip(hidden(now, x).tolist(), hidden(teacher, x).tolist(), strict=True)
        )
        expected = F.cross_entropy(logits[None], y[None]).item() + 0.35 * distance
        assert mine[i].item() == pytest.approx(expected, rel=1e-4) and distance > 0.01


def test_feature_distillation_starts_without_a_teacher(problem):
    stream, model, _, spec = problem
    strategy = FeatureDistillation(strength=1.0)
    batch = Batch.current(stream[0].train, 0)
    at = contexts(stream, "cpu")(0)
    state = strategy.init(spec)
    poisoned = state.replace(
        {name: torch.full_like(value, math.nan) for name, value in state.items()}
    )
    plain = Naive().losses(Forward(model), batch, at, poisoned)
    torch.testing.assert_close(strategy.losses(Forward(model), batch, at, poisoned), plain)


def test_feature_distance_has_no_gradient_for_head_or_teacher(problem):
    stream, model, _, spec = problem
    batch = Batch.current(stream[1].train, 1)
    at = contexts(stream, "cpu")(1)
    plain = Naive()
    strategy = FeatureDistillation(strength=1.0)
    state = strategy.init(spec)
    leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
    distance = strategy.losses(Forward(model), batch, at, state.replace(leaves)) - plain.losses(
        Forward(model), batch, at, state
    )
    assert torch.autograd.grad(
        distance.sum(), list(leaves.values()), allow_unused=True, retain_graph=True
    ) == (None,) * len(leaves)
    moved = dict(
        zip(leaves, torch.autograd.grad(distance.sum(), list(model.parameters())), strict=True)
    )
    sizes = {name: float(value.abs().max()) for name, value in moved.items()}
    assert sizes["teacher/head.weight"] < 1e-5 and sizes["teacher/body.1.weight"] > 0.01


def test_feature_distillation_reduces_the_change_of_features(toy_stream, toy_model):
    def drift(strategy):
        """Return the mean squared distance over the second experience between the features before
        and after it.
        """
        stream = toy_stream()
        seen = []
        model = toy_model(stream)

        def look(point, learner):
            if point == "experience.end":
                with torch.no_grad():
                    seen.append(learner.session.forward.features(stream[1].train.inputs))

        Learner(
            model=model,
            strategy=strategy,
            optimizer=torch.optim.Adam,
            iterations=200,
            batch_size=8,
            callbacks=[look],
        ).fit(stream)
        return float((seen[1] - seen[0]).square().sum(1).mean())

    assert drift(FeatureDistillation(strength=10.0)) < 0.2 * drift(Naive())


@pytest.mark.parametrize("strength", [-1.0, float("inf"), float("nan")])
def test_feature_distillation_refuses_an_invalid_strength(strength):
    with pytest.raises(ConfigError, match=r"feature_distillation\.strength"):
        FeatureDistillation(strength=strength)
