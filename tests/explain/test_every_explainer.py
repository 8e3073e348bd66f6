"""Properties of `Explainer.explain` that every explainer must have, found from the files of
explainers.
"""

import pytest
import torch
from torch import nn

from perdure.explain import find, names

every = pytest.mark.parametrize("name", names())
INPUTS = torch.rand(4, 2, 3, generator=torch.Generator().manual_seed(1))
BACKGROUND = torch.zeros(1, 2, 3)


def network():
    """A model with a convolution, for the explainers that need one."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        layers = nn.Conv1d(2, 4, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    return nn.Sequential(*layers)


predict = network()


def explained(name, inputs, targets=None):
    generator = torch.Generator().manual_seed(0)
    explainer = find(name)()
    return explainer.explain(predict, inputs, BACKGROUND, targets=targets, generator=generator)


@every
def test_attributions_have_the_shape_of_the_inputs(name):
    result = explained(name, INPUTS)
    assert result.values.shape == INPUTS.shape
    assert result.values.dtype == INPUTS.dtype
    assert result.base.shape == result.targets.shape == (4,)
    assert torch.isfinite(result.values).all()
    assert not result.values.requires_grad


@every
def test_the_largest_output_is_explained_by_default(name):
    assert torch.equal(explained(name, INPUTS).targets, predict(INPUTS).argmax(1))
    targets = torch.tensor([2, 0, 1, 2])
    assert torch.equal(explained(name, INPUTS, targets).targets, targets)


@every
def test_a_row_has_equal_attributions_alone_and_in_a_batch(name):
    whole = explained(name, INPUTS)
    alone = explained(name, INPUTS[:1])
    assert torch.allclose(whole.values[:1], alone.values, atol=1e-5)
