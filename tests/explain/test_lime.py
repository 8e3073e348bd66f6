import math
import warnings

import pytest
import torch
from torch import nn

from perdure.errors import ConfigError
from perdure.explain import LIME

torch.set_num_threads(1)


def seed(value=0):
    return torch.Generator().manual_seed(value)


def smooth(features, outputs=2):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(features, 16), nn.Tanh(), nn.Linear(16, outputs))
    return model.double()


def data(n, features, value=0):
    return torch.randn(n, features, generator=seed(value), dtype=torch.float64)


def test_lime_recovers_the_slopes_of_a_linear_model():
    weight = data(6, 2)
    x = data(3, 6, 1)
    targets = torch.tensor([0, 1, 1])
    got = LIME(ridge=1e-9).explain(lambda rows: rows @ weight + 5, x, targets=targets)
    assert torch.allclose(got.values, weight.T[targets], atol=1e-8)
    assert torch.allclose(got.base, (x @ weight + 5)[torch.arange(3), targets], atol=1e-8)
    assert torch.allclose(got.fidelity, torch.ones(3, dtype=torch.float64))


def test_lime_slopes_do_not_depend_on_the_feature_scales():
    weight = data(4, 1)
    x = data(2, 4, 1)
    scale = torch.tensor([0.1, 1.0, 5.0, 20.0], dtype=torch.float64)
    got = LIME(ridge=1e-9).explain(lambda rows: rows @ weight, x, feature_scales=scale)
    assert torch.allclose(got.values, weight.T.expand(2, 4), atol=1e-7)


def test_the_lime_regression_equals_ridge_of_scikit_learn():
    from sklearn.linear_model import Ridge
    from sklearn.metrics import r2_score

    model = smooth(5)
    x = data(1, 5, 1)
    rows = []
    outputs = []

    def predict(batch):
        rows.append(batch)
        outputs.append(model(batch))
        return outputs[-1]

    got = LIME(samples=200, noise_scale=0.5, ridge=3.0).explain(
        predict, x, targets=torch.tensor([1])
    )
    # The first pass gives the outputs at the instances.
    noise = (rows[1] - x) / 0.5
    target = outputs[1][:, 1].detach()
    weights = torch.exp(-noise.square().sum(1) / (2 * 0.75**2 * 5))
    theirs = Ridge(alpha=3.0).fit(noise.numpy(), target.numpy(), sample_weight=weights.numpy())
    assert torch.allclose(got.values[0] * 0.5, torch.tensor(theirs.coef_), atol=1e-10)
    assert got.base.item() == pytest.approx(theirs.intercept_)
    fold = torch.arange(200) // 40
    held_out = torch.zeros(200, dtype=torch.float64)
    for out in (fold == k for k in range(5)):
        kept = [part[~out].numpy() for part in (noise, target, weights)]
        part = Ridge(alpha=3.0).fit(kept[0], kept[1], sample_weight=kept[2])
        held_out[out] = torch.tensor(part.predict(noise[out].numpy()))
    fidelity = r2_score(target.numpy(), held_out.numpy(), sample_weight=weights.numpy())
    assert got.fidelity.item() == pytest.approx(fidelity)
    assert 0.2 < fidelity < 0.999


def test_lime_slopes_with_small_noise_equal_the_gradient():
    model = smooth(5)
    x = data(3, 5, 1)
    targets = torch.tensor([0, 1, 0])
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[torch.arange(3), targets].sum(), leaf)
    got = LIME(noise_scale=1e-3, ridge=1e-12).explain(model, x, targets=targets)
    assert torch.allclose(got.values, gradient, atol=1e-5)


def test_lime_explains_a_row_alike_alone_and_in_a_batch():
    model = nn.Sequential(nn.Flatten(), smooth(6))
    x = data(4, 6, 1).view(4, 2, 3)
    together = LIME(samples=100, chunk=33).explain(model, x, generator=seed(2))
    assert torch.equal(together.targets, model(x).argmax(1))
    for i in range(4):
        alone = LIME(samples=100).explain(model, x[i : i + 1], generator=seed(2))
        for name in ("values", "base", "fidelity"):
            assert torch.allclose(
                getattr(together, name)[i : i + 1], getattr(alone, name), atol=1e-10
            )


def test_lime_fidelity_falls_with_the_curvature_of_the_model():
    x = torch.zeros(1, 3)

    def fidelity(bend):
        return LIME().explain(lambda rows: rows[:, :1] + bend * rows[:, :1] ** 2, x).fidelity.item()

    assert LIME().explain(lambda rows: rows[:, :1] * 0 + 0.1, x).fidelity.item() == 1.0
    assert 1 > fidelity(0.1) > fidelity(0.5) > fidelity(5.0)
    assert fidelity(5.0) < 0.1


def test_lime_with_equal_seeds_gives_equal_values():
    model = smooth(5)
    x = data(2, 5, 1)
    state = torch.get_rng_state()
    first, again = (LIME(samples=20).explain(model, x) for _ in range(2))
    other = LIME(samples=20).explain(model, x, generator=seed(5))
    assert torch.equal(first.values, again.values)
    assert not torch.allclose(first.values, other.values)
    assert torch.equal(torch.get_rng_state(), state)
    assert not first.values.requires_grad


@pytest.mark.reference
def test_lime_agrees_with_the_lime_package_on_a_smooth_model():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lime.lime_tabular import LimeTabularExplainer
    scale = torch.tensor([0.5, 1.0, 2.0, 1.0, 0.2, 3.0, 1.0, 1.0], dtype=torch.float64)
    model = smooth(8)
    train = data(500, 8) * scale
    x = data(5, 8, 1) * scale
    scale = train.std(0, correction=0)

    def probability(rows):
        return model(rows).softmax(1)

    explainer = LimeTabularExplainer(
        train.numpy(),
        discretize_continuous=False,
        sample_around_instance=True,
        feature_selection="none",
        random_state=0,
    )
    ours = LIME(samples=5000).explain(
        probability, x, targets=torch.ones(5, dtype=torch.int64), feature_scales=scale
    )
    for i in range(5):
        theirs = explainer.explain_instance(
            x[i].numpy(),
            lambda rows: probability(torch.tensor(rows)).detach().numpy(),
            num_features=8,
            num_samples=5000,
        )
        slopes = torch.zeros(8, dtype=torch.float64)
        for feature, slope in theirs.as_map()[1]:
            slopes[feature] = slope
        mine = ours.values[i] * scale
        assert torch.corrcoef(torch.stack([mine, slopes]))[0, 1] > 0.95
        assert (mine - slopes).abs().max() < 0.15 * slopes.abs().max()
        assert ours.fidelity[i].item() == pytest.approx(theirs.score, abs=0.06)


@pytest.mark.parametrize(
    "fields, field",
    [
        ({"samples": 7}, "samples"),
        ({"samples": 0}, "samples"),
        ({"kernel_width": 0.0}, "kernel_width"),
        ({"ridge": 0.0}, "ridge"),
        ({"ridge": math.nan}, "ridge"),
        ({"noise_scale": 0.0}, "noise_scale"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_lime_refuses_an_invalid_field_and_names_it(fields, field):
    with pytest.raises(ConfigError, match=f"^{field} = "):
        LIME(**fields)


def test_lime_refuses_a_kernel_width_with_all_weights_0():
    with pytest.raises(ConfigError, match=r"^kernel_width = 0\.001"):
        LIME(kernel_width=1e-3).explain(smooth(4), data(2, 4))


@pytest.mark.parametrize(
    "change, field",
    [
        ({"feature_scales": torch.ones(3)}, "feature_scales.shape"),
        ({"feature_scales": torch.tensor([1.0, 1.0, 0.0, 1.0])}, "feature_scales"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, "targets"),
    ],
)
def test_lime_refuses_an_invalid_argument_and_names_it(change, field):
    with pytest.raises(ConfigError, match=f"^{field} = "):
        LIME().explain(smooth(4), data(2, 4), **change)
