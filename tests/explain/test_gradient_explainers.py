"""Explainers by captum beside captum itself, closed forms, and what they refuse."""

import numpy as np
import pytest
import torch
from torch import nn

from perdure.errors import ConfigError
from perdure.explain import (
    DeepLiftSHAP,
    GradCAM,
    GradientSHAP,
    IntegratedGradients,
    find,
    names,
)

GRADIENTS = [name for name in names() if find(name).NEEDS_GRADIENTS]
ADDITIVE = [name for name in GRADIENTS if name != "grad_cam"]


def network(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 3, 3, stride=2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(27, 3),
        ).to(dtype)


def data(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


X = data(0, 3, 2, 8, 8)
BACKGROUND = data(1, 4, 2, 8, 8)
TARGETS = torch.tensor([2, 0, 1])


@pytest.mark.parametrize("name", ADDITIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_of_a_linear_model_equal_the_closed_form(name, dtype):
    weight = data(5, 5, 3, dtype=dtype)
    linear = nn.Linear(5, 3).to(dtype)
    linear.weight = nn.Parameter(weight.T.clone())
    x, background = data(6, 2, 5, dtype=dtype), data(7, 1, 5, dtype=dtype)
    found = find(name)().explain(linear, x, background, targets="all")
    wanted = (x - background)[:, :, None] * weight
    torch.testing.assert_close(found.values, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.base, linear(background).detach().expand(2, 3))
    assert found.additivity_gap.abs().max() < 1e-5
    assert linear.weight.grad is None


@pytest.mark.reference
def test_integrated_gradients_equal_those_of_captum():
    from captum import attr

    model = network()
    method = attr.IntegratedGradients(model)
    wanted = sum(
        method.attribute(X, row[None], target=TARGETS, n_steps=20) for row in BACKGROUND
    ) / len(BACKGROUND)
    found = IntegratedGradients(steps=20).explain(model, X, BACKGROUND, targets=TARGETS)
    torch.testing.assert_close(found.values, wanted, rtol=1e-6, atol=1e-6)
    fine = IntegratedGradients(steps=200).explain(model, X, BACKGROUND, targets="all")
    assert fine.additivity_gap.abs().max() < 1e-3


@pytest.mark.reference
def test_deep_lift_equals_that_of_captum():
    from captum import attr

    model = network()
    with pytest.warns(UserWarning, match="activations"):
        wanted = attr.DeepLiftShap(model).attribute(X, BACKGROUND, target=TARGETS)
    found = DeepLiftSHAP().explain(model, X, BACKGROUND, targets=TARGETS)
    torch.testing.assert_close(found.values, wanted, rtol=1e-6, atol=1e-6)
    assert found.additivity_gap.abs().max() < 1e-5
    single = DeepLiftSHAP(chunk=1).explain(model, X, BACKGROUND[:1], targets="all")
    assert single.additivity_gap.abs().max() < 1e-5


@pytest.mark.reference
def test_grad_cam_equals_that_of_captum():
    from captum import attr

    model = network()
    for layer in (None, "0"):
        chosen = model[0] if layer else model[2]
        heat = attr.LayerGradCam(model, chosen).attribute(X, TARGETS, relu_attributions=True)
        wanted = attr.LayerAttribution.interpolate(heat, (8, 8), "bilinear")
        found = GradCAM(layer=layer).explain(model, X, BACKGROUND, targets=TARGETS)
        torch.testing.assert_close(found.values.sum(1, keepdim=True), wanted)
        assert found.base.count_nonzero() == 0
        assert found.values.min() >= 0 < found.values.max()
    with pytest.raises(ConfigError, match=r"attribution\.outputs"):
        _ = found.additivity_gap


@pytest.mark.reference
def test_gradient_shap_equals_that_of_captum():
    from captum import attr

    model = network()
    generator = torch.Generator().manual_seed(4)
    seed = int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(4)))
    wanted = []
    for row, target in zip(X.split(1), TARGETS.split(1), strict=True):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            np.random.seed(seed)
            method = attr.GradientShap(model)
            wanted.append(method.attribute(row, BACKGROUND, target=target, n_samples=30))
    found = GradientSHAP(samples=30).explain(
        model, X, BACKGROUND, targets=TARGETS, generator=generator
    )
    torch.testing.assert_close(found.values, torch.cat(wanted), rtol=1e-6, atol=1e-6)


@pytest.mark.statistical
def test_gradient_shap_tends_to_integrated_gradients():
    """Flakiness: none, the draws are seeded; the error of 20,000 draws is below 1 %."""
    model = network(torch.float64)
    x, background = X[:1].double(), BACKGROUND.double()
    exact = IntegratedGradients(steps=300).explain(model, x, background, targets=1).values
    few, many = (
        GradientSHAP(samples=samples).explain(model, x, background, targets=1).values
        for samples in (50, 20_000)
    )
    assert (many - exact).norm() < 0.03 * exact.norm()
    assert (few - exact).norm() > 0.05 * exact.norm()


@pytest.mark.parametrize("name", GRADIENTS)
def test_no_global_draw_or_mode_of_the_model_changes(name):
    model = nn.Sequential(network(), nn.Dropout(0.5)).train()
    torch.manual_seed(9)
    np.random.seed(9)
    wanted = torch.rand(3), np.random.rand(3)
    torch.manual_seed(9)
    np.random.seed(9)
    first = find(name)().explain(model, X, BACKGROUND)
    assert torch.equal(torch.rand(3), wanted[0])
    assert (np.random.rand(3) == wanted[1]).all()
    again = find(name)().explain(model, X, BACKGROUND)
    assert torch.equal(first.values, again.values)
    assert all(part.training for part in model.modules())
    assert all(each.grad is None for each in model.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_other_draws_of_gradient_shap_give_other_values():
    model = network()
    first, second = (
        GradientSHAP().explain(model, X, BACKGROUND, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 2)
    )
    assert not torch.equal(first.values, second.values)


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.act = nn.Linear(5, 5), nn.Linear(5, 3), nn.ReLU()

    def forward(self, rows):
        return self.act(self.second(self.act(self.first(rows))))


FLAT = torch.ones(2, 5)


@pytest.mark.parametrize(
    ("explainer", "model", "inputs", "named"),
    [
        (IntegratedGradients(), lambda rows: rows.detach() * 2, FLAT, "without gradients"),
        (IntegratedGradients(), lambda rows: np.asarray(rows)[:, :2], FLAT.numpy(), "numpy"),
        (GradientSHAP(), nn.Embedding(9, 3), torch.ones(2, 1, dtype=torch.int64), "inputs|shape"),
        (DeepLiftSHAP(), lambda rows: rows * 2, FLAT, "a torch module or a learner's predictor"),
        (DeepLiftSHAP(), Reused(), FLAT, "module of its own, or use integrated_gradients"),
        (GradCAM(), network(), X, None),
        (GradCAM(layer="7"), network(), X, "layer = '7' is not allowed; allowed: 0, 2"),
        (GradCAM(layer="5"), network(), X, "layer = '5'"),
        (GradCAM(), nn.Linear(5, 3), FLAT, "shape of an input"),
        (GradCAM(), nn.Sequential(nn.Flatten(), nn.Linear(128, 3)), X, "with a convolution"),
    ],
)
def test_gradients_refuse_what_does_not_fit(explainer, model, inputs, named):
    def call():
        return explainer.explain(model, inputs, inputs[:1])

    if named is None:
        assert call().values.shape == X.shape
        return
    with pytest.raises(ConfigError, match=named):
        call()


@pytest.mark.parametrize(
    "build",
    [
        lambda: IntegratedGradients(steps=0),
        lambda: GradientSHAP(samples=0),
        lambda: GradientSHAP(noise=-1.0),
    ],
)
def test_settings_out_of_range_are_refused(build):
    with pytest.raises(ConfigError, match="allowed"):
        build()


def test_a_missing_captum_is_told_before_training(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ConfigError, match=r"pip install 'perdure\[explain\]'"):
        IntegratedGradients().unknowns((3, 8, 8))
