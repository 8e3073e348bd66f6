"""Sum clipped gradients by the added rule, and compare with records one by one."""

import torch
from torch import nn

from perdure.privacy.clipping import Clip, clipped_gradient_sum, clipped_sum


def compare(slopes, shape):
    """Compare both sums for a layer of so many slopes, on records of this shape."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.PReLU(slopes), nn.Flatten(), nn.LazyLinear(1))
    x = torch.randn(9, *shape)
    model(x)
    params = dict(model.named_parameters())
    clip = Clip(norm=0.5)

    def loss(values, x):
        return torch.func.functional_call(model, values, x[None]).square().sum()

    def rows(values, record):
        return torch.func.grad(loss)(values, record["x"])

    expected = clipped_sum(rows, params, {"x": x}, clip, chunk=9)
    found = clipped_gradient_sum(model, params, lambda: model(x).square().sum(1), 9, clip)
    assert found is not None, "the rule is not used"
    for name in params:
        torch.testing.assert_close(found[name], expected[name])


compare(1, (6,))
compare(6, (6,))
compare(4, (4, 5))
