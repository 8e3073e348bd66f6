"""Properties of `Attack.perturb` that every attack must have, found from the files of attacks."""

import pytest
import torch

from perdure.adversarial import find, names

# AutoAttack works on logits and has tests of its own
LOSSES = [name for name in names() if not find(name).OWN_LOSSES]

EPSILON = 0.2
every = pytest.mark.parametrize("name", LOSSES)
norms = pytest.mark.parametrize("norm", ["linf", "l2", "l1"])


def losses(rows):
    """Return losses (n,), each of which depends on its row only."""
    return torch.sin(3 * rows).sum(1) * rows.square().sum(1)


def moved(name, norm, inputs, bounds=(0.0, 1.0)):
    attack = find(name)(epsilon=EPSILON, norm=norm, bounds=bounds)
    return attack.perturb(losses, inputs, generator=torch.Generator().manual_seed(0))


@every
@norms
def test_every_attack_stays_in_the_epsilon_ball_and_bounds(name, norm):
    inputs = torch.rand(20, 5, generator=torch.Generator().manual_seed(1))
    before = inputs.clone()
    result = moved(name, norm, inputs)
    change = result - inputs
    order = {"linf": float("inf"), "l2": 2, "l1": 1}[norm]
    length = torch.linalg.vector_norm(change, ord=order, dim=1)
    assert length.max() <= EPSILON + 1e-5
    assert change.abs().max() > 0.01
    assert result.min() >= 0
    assert result.max() <= 1
    assert torch.equal(inputs, before)


@every
@norms
def test_an_attack_with_epsilon_0_leaves_inputs_unchanged(name, norm):
    inputs = torch.rand(3, 5, generator=torch.Generator().manual_seed(1))
    attack = find(name)(epsilon=0.0, norm=norm)
    result = attack.perturb(losses, inputs, generator=torch.Generator().manual_seed(0))
    assert torch.equal(result, inputs)


@every
@norms
def test_the_perturbation_of_a_row_depends_only_on_that_row(name, norm):
    inputs = torch.rand(6, 5, generator=torch.Generator().manual_seed(2))
    others = inputs.clone()
    others[1:] = 1 - others[1:]
    assert torch.allclose(moved(name, norm, inputs)[0], moved(name, norm, others)[0], atol=1e-6)
