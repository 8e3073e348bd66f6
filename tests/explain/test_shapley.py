import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from perdure.errors import ConfigError
from perdure.explain import ExactShapley, KernelSHAP

torch.set_num_threads(1)


def seed(value=0):
    return torch.Generator().manual_seed(value)


def network(features, outputs=3, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(features, 16), nn.Tanh(), nn.Linear(16, outputs))
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    return model.to(dtype)


def data(n, features, value=0, dtype=torch.float64):
    return torch.randn(n, features, generator=seed(value), dtype=dtype)


def brute_force(predict, x, background, target):
    """Return the average marginal contribution over all orders of the features, by the
    definition.
    """
    count = len(x)

    def worth(members):
        rows = background.clone()
        rows[:, members] = x[members]
        return predict(rows)[:, target].mean().item()

    phi = torch.zeros(count, dtype=torch.float64)
    for j in range(count):
        others = [i for i in range(count) if i != j]
        for size in range(count):
            share = math.factorial(size) * math.factorial(count - size - 1) / math.factorial(count)
            for members in itertools.combinations(others, size):
                phi[j] += share * (worth([*members, j]) - worth(list(members)))
    return phi


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("explainer", [KernelSHAP(), ExactShapley()])
def test_shapley_values_are_exact_on_8_features(explainer, dtype, tolerance):
    model = network(8)
    x = data(3, 8)
    background = data(5, 8, 1)
    targets = torch.tensor([2, 0, 1])
    with torch.no_grad():
        expected = torch.stack([brute_force(model, x[i], background, targets[i]) for i in range(3)])
    got = explainer.explain(
        network(8, dtype=dtype), x.to(dtype), background.to(dtype), targets=targets
    )
    assert got.values.dtype == dtype
    scale = expected.abs().max()
    assert (got.values - expected).abs().max() <= tolerance * scale
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("samples", [2048, 64])
def test_kernel_shap_explains_a_row_alike_alone_and_in_a_batch(samples):
    model = network(9)
    x = data(4, 9)
    background = data(6, 9, 1)
    together = KernelSHAP(samples=samples, chunk=50).explain(model, x, background, generator=seed())
    for i in range(4):
        alone = KernelSHAP(samples=samples).explain(
            model, x[i : i + 1], background, generator=seed()
        )
        assert torch.allclose(together.values[i : i + 1], alone.values, atol=1e-10)
        assert torch.allclose(together.base[i : i + 1], alone.base, atol=1e-10)


@pytest.mark.parametrize("samples", [30, 2048])
def test_shapley_values_add_up_to_output_minus_background_mean(samples):
    model = network(10)
    x = data(4, 10)
    background = data(7, 10, 1)
    got = KernelSHAP(samples=samples).explain(model, x, background, generator=seed())
    rows = torch.arange(4)
    assert torch.equal(got.targets, model(x).argmax(1))
    assert torch.allclose(got.base, model(background).mean(0)[got.targets])
    assert torch.allclose(got.values.sum(1), model(x)[rows, got.targets] - got.base)


@pytest.mark.property
@settings(deadline=None, max_examples=25)
@given(value=st.integers(0, 2**31), dummy=st.integers(0, 5), exact=st.booleans())
def test_an_unused_feature_has_the_shapley_value_0(value, dummy, exact):
    weight = data(6, 6, value)
    weight[dummy] = 0

    def model(rows):
        return torch.tanh(rows @ weight).cumprod(1)

    explainer = ExactShapley() if exact else KernelSHAP()
    values = explainer.explain(model, data(2, 6, value + 1), data(3, 6, value + 2)).values
    assert values[:, dummy].abs().max() < 1e-9
    assert values.abs().max() > 1e-6


@pytest.mark.property
@settings(deadline=None, max_examples=25)
@given(value=st.integers(0, 2**31), pair=st.permutations(range(6)), exact=st.booleans())
def test_symmetric_features_have_equal_shapley_values(value, pair, exact):
    first, second = pair[:2]
    weight = data(6, 6, value)
    x = data(2, 6, value + 1)
    background = data(3, 6, value + 2)
    for part in (weight.T, x, background):
        part[:, second] = part[:, first]

    def model(rows):
        return torch.tanh(rows @ weight).cumprod(1)

    explainer = ExactShapley() if exact else KernelSHAP()
    values = explainer.explain(model, x, background).values
    assert torch.allclose(values[:, first], values[:, second], atol=1e-9)


@pytest.mark.statistical
def test_kernel_shap_nears_exact_values_with_more_samples():
    # Five fixed seeds; the error at 1,000 samples is about 2 % of the largest value, the bound is 6
    # %.
    model = network(12)
    x = data(4, 12)
    background = data(5, 12, 1)
    exact = ExactShapley().explain(model, x, background).values

    def error(samples):
        runs = (
            KernelSHAP(samples=samples).explain(model, x, background, generator=seed(s))
            for s in range(5)
        )
        return (
            sum((run.values - exact).abs().max().item() for run in runs)
            / 5
            / exact.abs().max().item()
        )

    assert error(1000) < 0.06
    assert error(1000) < error(60)


def test_kernel_shap_works_with_the_fewest_samples():
    weight = data(40, 2)
    x = data(2, 40)
    background = data(3, 40, 1)
    got = KernelSHAP(samples=400).explain(
        lambda rows: rows @ weight, x, background, generator=seed()
    )
    # A linear model is in the span of the regression, so any sample that spans gives it back.
    expected = (x - background.mean(0)) * weight.T[got.targets]
    assert torch.allclose(got.values, expected, atol=1e-8)


def test_each_kernel_shap_forward_pass_has_at_most_chunk_rows():
    model = network(6)
    sizes = []

    def predict(rows):
        sizes.append(len(rows))
        return model(rows)

    x = data(3, 6)
    background = data(10, 6, 1)
    small = KernelSHAP(chunk=4).explain(predict, x, background)
    assert max(sizes) <= 4
    assert torch.allclose(small.values, KernelSHAP().explain(model, x, background).values)


@pytest.mark.parametrize("explainer", [KernelSHAP(), ExactShapley()])
def test_features_of_a_group_get_equal_shapley_values(explainer):
    groups = torch.tensor([[7, 7, 2], [2, 2, 5]])
    model = nn.Sequential(nn.Flatten(), network(6))
    x = data(2, 6)
    background = data(4, 6, 1)
    x = x.view(2, 2, 3)
    background = background.view(4, 2, 3)
    got = explainer.explain(model, x, background, groups=groups)

    def on_groups(members):
        """Return the value of a set of groups, for row 0."""
        mask = members.bool()[:, torch.tensor([2, 2, 0, 0, 0, 1])].view(-1, 1, 2, 3)
        rows = torch.where(mask, x[0], background)
        return model(rows.flatten(0, 1)).view(len(members), 4, -1).mean(1)

    ones = torch.ones(1, 3, dtype=torch.float64)
    zeros = torch.zeros(1, 3, dtype=torch.float64)
    whole = ExactShapley().explain(on_groups, ones, zeros, targets=got.targets[:1]).values[0]
    expected = torch.stack(
        [whole[2] / 2, whole[2] / 2, whole[0] / 3, whole[0] / 3, whole[0] / 3, whole[1]]
    )
    assert torch.allclose(got.values[0].flatten(), expected)


@pytest.mark.parametrize("explainer", [KernelSHAP(), ExactShapley()])
def test_a_single_feature_gets_the_whole_output_difference(explainer):
    got = explainer.explain(
        lambda rows: rows**2, torch.tensor([[3.0]]), torch.tensor([[1.0], [2.0]])
    )
    assert got.values.item() == pytest.approx(6.5)
    assert got.base.item() == pytest.approx(2.5)


def test_kernel_shap_with_equal_seeds_gives_equal_values():
    model = network(10)
    x = data(2, 10)
    background = data(3, 10, 1)
    state = torch.get_rng_state()
    first, again = (KernelSHAP(samples=40).explain(model, x, background) for _ in range(2))
    other = KernelSHAP(samples=40).explain(model, x, background, generator=seed(5))
    assert torch.equal(first.values, again.values)
    assert not torch.allclose(first.values, other.values)
    assert torch.equal(torch.get_rng_state(), state)
    assert not first.values.requires_grad


@pytest.mark.reference
def test_kernel_shap_agrees_with_the_shap_package():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import shap
    model = network(7)
    x = data(3, 7)
    background = data(6, 7, 1)

    def predict(rows):
        return model(torch.as_tensor(rows, dtype=torch.float64)).detach().numpy()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        explainer = shap.KernelExplainer(predict, background.numpy())
        theirs = torch.tensor(
            explainer.shap_values(x.numpy(), l1_reg=False, nsamples=2**7, silent=True)
        )
    for target in range(3):
        ours = KernelSHAP().explain(model, x, background, targets=torch.full((3,), target)).values
        assert torch.allclose(ours, theirs[:, :, target], atol=1e-4)


@pytest.mark.parametrize(
    "change, field",
    [
        ({"background": torch.zeros(2, 5)}, "background.shape"),
        ({"background": torch.zeros(0, 12)}, "background.shape"),
        ({"groups": torch.zeros(5)}, "groups.shape"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "targets"),
        ({"targets": torch.zeros(2)}, "targets"),
        ({"samples": 20}, "samples"),
        ({"predict": lambda rows: rows.view(-1, 3, 4)}, "predict"),
    ],
)
def test_kernel_shap_refuses_an_invalid_argument_and_names_it(change, field):
    given = {"predict": network(12, dtype=torch.float32), "background": torch.zeros(3, 12)} | change
    explainer = KernelSHAP(samples=given.pop("samples", 2048))
    with pytest.raises(ConfigError, match=f"^{field}"):
        explainer.explain(inputs=torch.ones(2, 12), **given)


@pytest.mark.parametrize(
    "make, field",
    [
        (lambda: KernelSHAP(samples=1), "samples"),
        (lambda: KernelSHAP(chunk=0), "chunk"),
        (lambda: ExactShapley(chunk=-1), "chunk"),
    ],
)
def test_an_explainer_refuses_an_invalid_field_and_names_it(make, field):
    with pytest.raises(ConfigError, match=f"^{field} = "):
        make()


def test_exact_shapley_refuses_too_many_features():
    with pytest.raises(ConfigError, match="KernelSHAP"):
        ExactShapley().explain(network(17), data(1, 17), data(1, 17))
