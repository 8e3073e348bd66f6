"""Explanations of the predictors of trained strategies, beside the sum over all orders."""

from functools import partial

import pytest
import torch

from perdure import Learner, Privacy
from perdure.data import Dataset, Records, split
from perdure.explain import LIME, DeepLiftSHAP, ExactShapley, IntegratedGradients, KernelSHAP
from perdure.models import mlp
from perdure.strategies import ICaRL, Naive

FEATURES = 10


def blobs():
    """Four classes, each with one bright feature, in two experiences."""
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat(30)
    inputs = torch.rand(120, FEATURES, generator=draws) / 2
    inputs[torch.arange(120), labels] += 1.0
    ids = torch.arange(120)
    parts = [
        Records(inputs=inputs[rows], labels=labels[rows], ids=ids[rows], partition=name)
        for name, rows in (("train", slice(0, 80)), ("test", slice(80, 120)))
    ]
    return Dataset(
        name="blobs", train=parts[0], test=parts[1], input_shape=(FEATURES,), num_classes=4
    )


def trained(strategy, scenario, **options):
    stream = split(blobs(), scenario=scenario, experiences=2)
    learner = Learner(
        model=mlp(
            input_shape=(FEATURES,),
            num_classes=stream.num_classes,
            hidden=(8,),
            seed=0,
        ),
        strategy=strategy,
        optimizer=partial(torch.optim.SGD, lr=0.2),
        iterations=30,
        batch_size=16,
        seed=0,
        show_progress=False,
        **options,
    )
    learner.fit(stream)
    return learner, stream


def worth(predict, x, background):
    """Values (1024, outputs) of all coalitions of ten features."""
    members = (torch.arange(2**FEATURES)[:, None] >> torch.arange(FEATURES)) % 2 == 1
    rows = torch.where(members[:, None], x, background).flatten(0, 1)
    with torch.no_grad():
        return members, predict(rows).view(len(members), len(background), -1).double().mean(1)


def by_orders(predict, x, background):
    """Shapley values (features, outputs) by the definition, one feature at a time."""
    members, values = worth(predict, x, background)
    index = torch.arange(len(members))
    sizes = members.sum(1)
    orders = torch.lgamma(torch.arange(1.0, FEATURES + 2, dtype=torch.float64))  # log of factorials
    found = []
    for feature in range(FEATURES):
        without = index[~members[:, feature]]
        gain = values[without + 2**feature] - values[without]
        size = sizes[without]
        share = (orders[size] + orders[FEATURES - size - 1] - orders[FEATURES]).exp()
        found.append((share[:, None] * gain).sum(0))
    return torch.stack(found)


SETTINGS = {
    "icarl": lambda: trained(ICaRL(memory_size=20), "class"),
    "private": lambda: trained(
        Naive(), "class", privacy=Privacy(noise_multiplier=1.0, clip_norm=1.0, delta=1e-3, seed=0)
    ),
    "task": lambda: trained(Naive(), "task"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_shap_of_a_predictor_equals_brute_force(setting):
    learner, stream = SETTINGS[setting]()
    predict = learner.predictor(0, after=1)
    x = stream[0].test.inputs[:3]
    background = torch.zeros(2, FEATURES)
    background[1] = 0.25
    allowed = predict(x)[0].detach() > -1e8
    # The predictor of the first task allows its own classes only.
    assert allowed.tolist() == ([True] * 2 + [False] * 2 if setting == "task" else [True] * 4)
    shown = [i for i, each in enumerate(allowed.tolist()) if each]
    wanted = torch.stack([by_orders(predict, each, background) for each in x])
    for explainer in (KernelSHAP(), ExactShapley()):
        for target in shown:
            found = explainer.explain(predict, x, background, targets=target)
            scale = wanted[:, :, target].abs().max()
            assert (found.values - wanted[:, :, target]).abs().max() <= 1e-6 * scale
            assert found.additivity_gap.abs().max() <= 1e-5 * scale
            assert scale > 1e-2
    for gradients in (IntegratedGradients(steps=200), DeepLiftSHAP()):
        found = gradients.explain(predict, x, background, targets=shown[0])
        scale = wanted[:, :, shown[0]].abs().max()
        # rules for layers know no distances, so they add up for plain logits only
        exact = gradients is not DeepLiftSHAP() and setting != "icarl"
        assert torch.isfinite(found.values).all() and found.values.abs().max() > 1e-3
        assert not exact or found.additivity_gap.abs().max() <= 1e-2 * scale
    slopes = LIME(noise_scale=0.1).explain(predict, x, targets=shown[0])
    assert torch.isfinite(slopes.values).all() and slopes.values.abs().max() > 1e-3
