"""Signs of hidden gradients: honest models show none, and a model that hides them is found."""

import pytest
import torch
from torch import nn

from perdure.adversarial import PGD, check_masking


def seed(value=0):
    return torch.Generator().manual_seed(value)


@pytest.fixture(scope="module")
def task():
    """Return a linear model, inputs in [0, 1] and its own predictions as labels."""
    weight = torch.randn(10, 3, generator=seed(1))
    inputs = torch.rand(60, 10, generator=seed(2))
    model = nn.Linear(10, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(weight.T)
    return model, inputs, model(inputs).argmax(1)


def failed(checks):
    return {check.name for check in checks if not check.passed}


def test_an_honest_model_shows_no_sign_of_hidden_gradients(task):
    model, inputs, labels = task
    attack = PGD(epsilon=0.05, steps=5)
    checks = check_masking(
        model, inputs, labels, attack, generator=seed(), surrogate=lambda rows: model(rows)
    )
    assert len(checks) == 6
    assert {name for name in failed(checks) if "another model" not in name} == set()
    assert all(0 < check.reference < 100 for check in checks)
    assert "leaves" in str(checks[0])


def test_a_model_of_rounded_inputs_is_found_to_hide_gradients(task):
    model, inputs, labels = task

    def rounded(rows):
        # no gradient passes through the rounding
        return model((rows * 16).round() / 16 + 0 * rows)

    labels = rounded(inputs).argmax(1)
    checks = check_masking(
        rounded, inputs, labels, PGD(epsilon=0.1, steps=5), generator=seed(), surrogate=model
    )
    assert {"an attack without limit", "an attack on another model"} <= failed(checks)
    assert "WARNING" in str(next(check for check in checks if not check.passed))


def test_masking_is_checked_without_bounds_too(task):
    checks = check_masking(*task, PGD(epsilon=0.05, bounds=None, steps=5), generator=seed())
    assert failed(checks) == set()
    free = next(check for check in checks if check.name == "an attack without limit")
    assert free.robust_accuracy == 0
