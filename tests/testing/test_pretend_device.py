"""A pretend accelerator gives the bits of the CPU: strategies, attacks, explainers, federation."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.pretend_device import DEVICE, on_cpu, pretend_device
from perdure import Learner, strategies
from perdure.adversarial import FGSM, PGD, robust_accuracy
from perdure.data import dirichlet
from perdure.explain import (
    LIME,
    DeepLiftSHAP,
    ExactShapley,
    GradCAM,
    GradientSHAP,
    IntegratedGradients,
    KernelSHAP,
    deletion_area,
)
from perdure.federated import Federation, run_federation
from perdure.strategies import EWC, Naive, Replay
from perdure.testing.conformance import CHECKS, ON_CUDA
from perdure.testing.fixtures import NotApplicable, StrategyFixture
from perdure.utils.seeding import seed_globally, undisturbed

IN_SHORT = ("naive",)
ALL = pytest.mark.deep(reason="all devices: every strategy on the pretend accelerator")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in IN_SHORT else ALL) for n in strategies.names()]
)
def test_each_strategy_passes_on_a_pretend_device(name):
    strategy = strategies.find(name).example()
    with pretend_device() as device:
        fixture = StrategyFixture(strategy=strategy, scenario="class", model=None, device=device)
        for check in ON_CUDA:
            with undisturbed():
                seed_globally(0)
                try:
                    CHECKS[check](fixture)
                except NotApplicable:
                    continue


def trained(stream, model, strategy, device, **options):
    """Return the parameters, the accuracies and the predictions of a learner, on the CPU."""
    learner = Learner(
        model=model,
        strategy=strategy,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        iterations=3,
        batch_size=8,
        device=device,
        show_progress=False,
        **options,
    )
    matrix = learner.fit(stream)
    values = {name: value.detach() for name, value in learner.model.named_parameters()}
    predicted = learner.predict(stream[0].test.inputs)
    return on_cpu((values, matrix, predicted)), learner


OPTIONS = {
    "ewc": (EWC(strength=10.0, fisher="empirical"), {}),
    "replay": (Replay(memory_size=8), {}),
    "adversary": (Naive(), {"adversary": PGD(epsilon=0.1, steps=2)}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_training_on_a_pretend_device_equals_the_cpu(name, toy_stream, toy_model):
    strategy, options = OPTIONS[name]
    stream = toy_stream()
    expected, _ = trained(stream, toy_model(stream), strategy, "cpu", **options)
    with pretend_device() as device:
        found, learner = trained(stream, toy_model(stream), strategy, device, **options)
        places = {value.device.type for value in learner.model.parameters()}
    assert places == {DEVICE}
    assert all(torch.equal(found[0][key], value) for key, value in expected[0].items())
    assert torch.equal(found[1], expected[1]) and torch.equal(found[2], expected[2])


def problem():
    """Return a small convolutional model, images and labels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)).eval()
    return model, torch.rand(4, 1, 6, 6), torch.tensor([0, 2, 1, 1])


ATTACKS = {
    "fgsm": FGSM(epsilon=0.1),
    "pgd": PGD(epsilon=0.1, steps=3, restarts=2),
    "l2": PGD(epsilon=0.5, steps=3, norm="l2"),
    "l1": PGD(epsilon=2.0, steps=3, norm="l1"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_on_a_pretend_device_equals_the_cpu(name):
    model, inputs, labels = problem()

    def attacked(model, inputs, labels):
        draws = torch.Generator().manual_seed(1)
        losses = lambda rows: F.cross_entropy(model(rows), labels, reduction="none")  # noqa: E731
        moved = ATTACKS[name].perturb(losses, inputs, generator=draws)
        share = robust_accuracy(model, inputs, labels, ATTACKS[name], generator=draws)
        return moved, share

    moved, share = attacked(model, inputs, labels)
    with pretend_device() as device:
        there = attacked(model.to(device), inputs.to(device), labels.to(device))
        assert there[0].device.type == DEVICE
        found = on_cpu(there[0])
    assert torch.equal(found, moved) and there[1] == share


EXPLAINERS = {
    "kernel_shap": KernelSHAP(samples=40, cells=3),
    "exact_shapley": ExactShapley(cells=2),
    "lime": LIME(samples=80),
    "lime of groups": LIME(samples=40, cells=3),
    "integrated_gradients": IntegratedGradients(steps=8),
    "gradient_shap": GradientSHAP(samples=8),
    "deep_lift_shap": DeepLiftSHAP(),
    "grad_cam": GradCAM(),
}


@pytest.mark.parametrize("name", EXPLAINERS)
def test_an_explanation_on_a_pretend_device_equals_the_cpu(name):
    model, inputs, _ = problem()

    def explained(model, inputs):
        background = torch.zeros_like(inputs[:2])
        found = EXPLAINERS[name].explain(model, inputs, background, targets="all")
        return found.values, deletion_area(model, inputs, found, background)

    values, areas = explained(model, inputs)
    with pretend_device() as device:
        there = explained(model.to(device), inputs.to(device))
        assert there[0].device.type == DEVICE
        found = on_cpu(there)
    assert torch.equal(found[0], values) and torch.equal(found[1], areas)


def test_a_federation_on_a_pretend_device_equals_the_cpu(toy_stream, toy_model, tmp_path):
    stream = toy_stream()
    streams = dirichlet(stream, clients=2, alpha=5.0, min_size=8)

    def ended(device):
        server = run_federation(
            partial(party, stream, toy_model, device),
            streams,
            Federation(clients=2, rounds=1, seed=0),
            folder=tmp_path / device,
            show_progress=False,
        )
        return on_cpu({n: v.detach() for n, v in server.learner.model.named_parameters()})

    expected = ended("cpu")
    with pretend_device() as device:
        found = ended(device)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def party(stream, toy_model, device, client=0, folder=None):
    return Learner(
        model=toy_model(stream),
        strategy=Naive(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        iterations=2,
        batch_size=8,
        blocks=1,
        client=client,
        folder=folder,
        device=device,
        show_progress=False,
    )


def test_tensors_of_two_devices_may_not_meet():
    with pretend_device() as device:
        here, there = torch.ones(3), torch.ones(3, device=device)
        with pytest.raises(RuntimeError, match="tensors on two devices"):
            here + there
        assert on_cpu(there + torch.tensor(2.0)).tolist() == [3.0] * 3
        assert on_cpu(there.to("cpu") + here).tolist() == [2.0] * 3
        model = nn.Linear(3, 2)
        with pytest.raises(RuntimeError, match="tensors on two devices"):
            model.to(device)(here)
