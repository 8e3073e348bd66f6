"""The cosine head: formula, invariances, model builders, and per-record gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from perdure.contract.forward import Forward, cross_entropy_of
from perdure.data.records import Batch
from perdure.errors import ConfigError
from perdure.learner.learner import Learner
from perdure.models.classifier import Classifier
from perdure.models.classifiers import cnn, mlp, resnet18
from perdure.models.cosine_head import SCALE, SHORTEST, CosineHead, cosines, directions
from perdure.models.frozen import frozen
from perdure.privacy.clipping.bookkeeping import clipped_gradient_sum
from perdure.privacy.clipping.clip import Clip, clipped_sum
from perdure.privacy.clipping.rules.cosine_head import CosineHeadRule
from perdure.privacy.guard.model_checks import check_buffers, check_model
from perdure.privacy.settings import Privacy
from perdure.queries.per_record import gradient_rows
from perdure.strategies import Replay

DIGITS = (1, 8, 8)


def head(seed=0, classes=4, size=6):
    torch.manual_seed(seed)
    return CosineHead(size, classes)


@pytest.mark.reference
def test_cosine_logits_equal_the_formula():
    made = head()
    features = torch.randn(5, 6)
    for i, f in enumerate(features.tolist()):
        for c, w in enumerate(made.weight.tolist()):
            dot = sum(x * y for x, y in zip(f, w, strict=True))
            expected = SCALE * dot / math.hypot(*f) / math.hypot(*w)
            assert made(features)[i, c].item() == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(
        made(features), SCALE * F.cosine_similarity(features[:, None], made.weight, dim=2)
    )
    assert float(cosines(features, made.weight).detach().abs().max()) <= 1 + 1e-6


def test_cosine_logits_ignore_vector_lengths_but_not_the_scale():
    made = head()
    features = torch.randn(5, 6)
    before = made(features)
    with torch.no_grad():
        made.weight.mul_(torch.tensor([0.1, 1.0, 10.0, 100.0])[:, None])
    torch.testing.assert_close(made(3.0 * features), before)
    with torch.no_grad():
        made.scale.mul_(2)
    torch.testing.assert_close(made(features), 2 * before)


def test_the_cosine_head_gradient_equals_finite_differences():
    made = head().double()
    features = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def logits(features, weight, scale):
        return torch.func.functional_call(made, {"weight": weight, "scale": scale}, features)

    assert torch.autograd.gradcheck(logits, (features, made.weight, made.scale))


def test_zero_vectors_have_finite_cosine_gradients():
    for made in (head(), head().double()):
        features = torch.zeros(2, 6, dtype=made.weight.dtype, requires_grad=True)
        logits = made(features)
        assert (logits == 0).all()
        logits.sum().backward()
        assert all(
            torch.isfinite(value.grad).all() for value in (features, made.weight, made.scale)
        )
    tiny = torch.full((6,), SHORTEST * 1e-3)
    assert float(directions(tiny).norm()) < 0.01  # what is shorter than rounding counts for little


@pytest.mark.parametrize("make", [mlp, cnn, resnet18])
def test_every_builder_accepts_the_cosine_head(make):
    sizes = {"width": 4} if make is not mlp else {"hidden": (8,)}
    model = make(input_shape=DIGITS, num_classes=10, seed=0, head="cosine", **sizes)
    again = make(input_shape=DIGITS, num_classes=10, seed=0, head="cosine", **sizes)
    plain = make(input_shape=DIGITS, num_classes=10, seed=0, **sizes)
    assert isinstance(model.head, CosineHead) and isinstance(plain.head, torch.nn.Linear)
    assert {n for n, _ in model.head.named_parameters()} == {"weight", "scale"}
    assert model.head.weight.shape == (10, model.feature_size)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    for (name, value), other in zip(
        plain.body.named_parameters(), model.body.parameters(), strict=True
    ):
        assert torch.equal(value, other), name


def test_the_cosine_head_works_on_frozen_features():
    model = frozen(torch.abs, input_shape=DIGITS, num_classes=10, head="cosine")
    assert {name for name, _ in model.named_parameters()} == {"head.weight", "head.scale"}
    assert model(torch.rand(3, *DIGITS)).shape == (3, 10)


def test_the_error_names_an_unknown_kind_of_head():
    with pytest.raises(ConfigError, match="head = 'cone' is not allowed; allowed: linear, cosine"):
        Classifier(torch.nn.Flatten(), 4, 2, "cone")


# --------------------------------------------------------------------------- record by record


def losses(forward, batch):
    return cross_entropy_of(forward(batch.inputs), batch.labels)


@pytest.mark.reference
@pytest.mark.parametrize("bound", [0.05, 0.5, 50.0])
def test_clipped_cosine_head_sums_equal_a_loop_over_records(toy_stream, bound):
    stream = toy_stream()
    model = mlp(
        input_shape=(5,), num_classes=4, hidden=(6,), seed=0, activation="tanh", head="cosine"
    )
    params = dict(model.named_parameters())
    batch = Batch.current(stream[0].train, 0)
    clip = Clip(norm=bound)
    mine = clipped_gradient_sum(
        model, params, lambda: losses(Forward(model), batch), len(batch), clip
    )
    detached = {name: value.detach() for name, value in params.items()}
    theirs = clipped_sum(gradient_rows(losses, model), detached, batch.tensors(), clip, 10)
    assert mine is not None and list(mine) == list(theirs) == list(params)
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-6)


def test_book_keeping_refuses_head_weights_used_outside_the_head(toy_stream):
    """LUCIR uses the weights this way, and book-keeping would miss that part."""
    stream = toy_stream()
    model = mlp(input_shape=(5,), num_classes=4, hidden=(6,), seed=0, head="cosine")
    params = dict(model.named_parameters())
    batch = Batch.current(stream[0].train, 0)

    def by_angles():
        return cross_entropy_of(
            cosines(model.features(batch.inputs), model.head.weight), batch.labels
        )

    assert clipped_gradient_sum(model, params, by_angles, len(batch), Clip(norm=1.0)) is None


def test_private_training_uses_the_rule_of_the_cosine_head(toy_stream, monkeypatch):
    stream = toy_stream()
    called = []
    rule = CosineHeadRule.gradients

    def counted(self, layer, calls):
        called.append(len(calls))
        return rule(self, layer, calls)

    monkeypatch.setattr(CosineHeadRule, "gradients", counted)
    model = mlp(
        input_shape=(5,), num_classes=4, hidden=(6,), seed=0, activation="tanh", head="cosine"
    )
    check_model(model)
    check_buffers(model, torch.rand(6, 5))
    learner = Learner(
        model=model,
        strategy=Replay(memory_size=8),
        optimizer=torch.optim.Adam,
        iterations=5,
        batch_size=8,
        privacy=Privacy(noise_multiplier=1.0, seed=0),
    )
    assert learner.fit(stream).isfinite().all()
    assert called and set(called) == {1}
