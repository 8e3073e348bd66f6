"""Extreme eigenvalues of the Hessian, beside the dense Hessian; saddle points."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.autograd.functional import hessian
from torch.func import functional_call

from helpers.shared_training import toy_stream
from perdure import Learner, Privacy
from perdure.data import digits, joint
from perdure.doctor import Curvature, Monitor, Trace, hessian_extremes
from perdure.doctor.curvature import ritz_values
from perdure.doctor.rules import find
from perdure.errors import ConfigError, PrivacyError
from perdure.models import mlp
from perdure.strategies import Naive

STREAM = joint(digits(declared_size=1_250))


def learner_of(privacy=None, **given):
    model = mlp(input_shape=(1, 8, 8), num_classes=10, seed=0, hidden=(4,), activation="tanh")
    options = {"optimizer": partial(torch.optim.SGD, lr=0.1), "iterations": 1, "batch_size": 16}
    return Learner(model=model, strategy=Naive(), privacy=privacy, **options | given)


@pytest.fixture(scope="module")
def prepared():
    model = mlp(input_shape=(6,), num_classes=4, seed=0, hidden=(3,), activation="tanh").double()
    learner = Learner(model=model, strategy=Naive(), optimizer=torch.optim.SGD, epochs=1)
    learner.prepare(toy_stream())
    return learner


def test_extremes_equal_those_of_the_dense_hessian(prepared):
    rows = prepared.stream[1].test
    found = hessian_extremes(prepared, experience=1, steps=100)
    names = list(prepared.params)
    shapes = [value.shape for value in prepared.params.values()]
    flat = torch.cat([value.detach().flatten() for value in prepared.params.values()])

    def loss(vector):
        parts = vector.split([shape.numel() for shape in shapes])
        values = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        outputs = functional_call(prepared.model, values, (rows.inputs,))
        return torch.nn.functional.cross_entropy(outputs, rows.labels)

    dense = torch.linalg.eigvalsh(hessian(loss, flat))
    assert found.smallest == pytest.approx(float(dense[0]), abs=1e-9)
    assert found.largest == pytest.approx(float(dense[-1]), abs=1e-9)
    assert found.smallest < 0 < found.largest
    assert found.loss == pytest.approx(float(loss(flat)))
    slope = torch.func.grad(loss)(flat).norm()
    assert found.gradient_norm == pytest.approx(float(slope))


def test_ritz_values_of_few_steps_lie_between_the_extremes():
    table = torch.randn(40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = table + table.T
    exact = torch.linalg.eigvalsh(table)
    start = torch.ones(40, dtype=torch.float64)
    some = ritz_values(lambda vector: table @ vector, start, 8)
    assert len(some) == 8
    assert exact[0] < some[0] < some[-1] < exact[-1]
    every = ritz_values(lambda vector: table @ vector, start, 1000)
    torch.testing.assert_close(every, exact)


def test_extremes_on_private_training_records_are_refused():
    learner = learner_of(privacy=Privacy(noise_multiplier=1.0, delta=1e-4, seed=0))
    learner.prepare(STREAM)
    with pytest.raises(PrivacyError, match="records"):
        hessian_extremes(learner, STREAM[0].train)
    assert hessian_extremes(learner, steps=2).largest > 0


def test_a_wrong_number_of_steps_is_refused(prepared):
    with pytest.raises(ConfigError, match="steps = 0"):
        hessian_extremes(prepared, steps=0)


def test_equal_weights_are_found_to_be_a_saddle_point():
    """With all weights 0 only the bias of the head has a gradient, whatever the records are."""
    learner = learner_of(iterations=60)
    monitor = Monitor(rules=["saddle_point", "loss_plateau"])
    learner.callbacks = [monitor]
    for value in learner.params.values():
        value.detach().zero_()
    learner.fit(STREAM)
    found = {finding.rule: finding for finding in monitor.findings}
    assert "saddle point" in found, found
    assert found["saddle point"].remedy.changes == {"training.gradient_noise": 0.01}
    assert "loss plateau" not in found


def test_a_slope_or_a_bowl_is_no_saddle_point():
    rule = find("saddle_point")()
    saddle = Curvature(smallest=-0.5, largest=1.0, loss=2.0, gradient_norm=1e-3)
    trace = Trace(experience=0, steps=9, done=9, private=False, names=(), matrices=())
    assert rule.watch(replace(trace, curvature=saddle)).measured == pytest.approx(0.5)
    for change in ({"smallest": -0.01}, {"gradient_norm": 1.0}):
        assert rule.watch(replace(trace, curvature=replace(saddle, **change))) is None
    assert rule.watch(trace) is None
