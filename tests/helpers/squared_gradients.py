"""Small models, batches and checks for tests of squared gradients."""

import torch
import torch.nn.functional as F
from torch import nn

from perdure.contract.forward import Forward
from perdure.data.records import Batch, Records
from perdure.models.classifiers import cnn, mlp


def batch(n=7, shape=(5,), classes=3):
    place = torch.Generator().manual_seed(1)
    labels = torch.randint(0, classes, (n,), generator=place)
    return Batch.current(Records(inputs=torch.rand(n, *shape, generator=place), labels=labels), 0)


def fisher_terms(forward, batch):
    log_p = torch.log_softmax(forward(batch.inputs), dim=1)
    return -log_p, log_p.exp().detach()


def small(model="mlp"):
    if model == "cnn":
        return cnn(input_shape=(1, 8, 8), num_classes=3, seed=2, width=4).eval()
    return mlp(input_shape=(5,), num_classes=3, hidden=(6, 4), seed=2, activation="tanh").eval()


def by_hand(module, terms, batch, size=torch.square):
    """Return (n, *parameter) rows, with one backward pass for every record and term."""
    rows = {name: [] for name, _ in module.named_parameters()}
    for i in range(len(batch)):
        losses, weights = terms(Forward(module), batch.take(slice(i, i + 1)))
        sums = [torch.zeros_like(value) for value in module.parameters()]
        for loss, weight in zip(losses[0], weights[0], strict=True):
            gradients = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
            sums = [
                total + weight * size(gradient)
                for total, gradient in zip(sums, gradients, strict=True)
            ]
        for name, total in zip(rows, sums, strict=True):
            rows[name].append(total)
    return {name: torch.stack(values) for name, values in rows.items()}


def assert_same(mine, theirs, atol=1e-7):
    assert list(mine) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name].float(), value.float(), rtol=1e-4, atol=atol)


def summed(query, module, data, clip=None):
    params = {name: value.detach() for name, value in module.named_parameters()}
    return query.summed(module, params, data.tensors(), clip)


class Twice(nn.Module):
    """A model that calls one layer twice, so that its gradient is the sum of two outer products."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Sequence(nn.Module):
    """A linear layer at several positions of one record."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 3)

    def forward(self, x):
        return self.layer(x[:, :, None]).mean(1)


def tied():
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3))
    model[2].weight = model[0].weight
    return model


class Transposed(nn.Module):
    """An autoencoder whose encoder weight is also used in the decoder."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(5, 4)
        self.head = nn.Linear(9, 3)

    def forward(self, x):
        z = self.encoder(x)
        rest = x - F.linear(z, self.encoder.weight.t())
        return self.head(torch.cat([z, rest], 1))


class Weighed(nn.Module):
    """A model that adds the norm of a layer's weight to its output."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        return self.layer(x) * self.layer.weight.square().mean()


class Reweighted(nn.Module):
    """A model that calls a layer with a weight computed from its own weight."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        doubled = {"weight": 2 * self.layer.weight, "bias": self.layer.bias}
        return torch.func.functional_call(self.layer, doubled, x)


class Named(nn.Module):
    """A model that calls a layer with a keyword argument."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        return self.layer(input=x)


def layers():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def hooked():
    """Return a model whose layer output is tripled by a hook."""
    model = layers()
    model[0].register_forward_hook(lambda layer, args, output: 3 * output)
    return model


def hooked_before():
    """Return a model whose layer input is tripled by a hook."""
    model = layers()
    model[2].register_forward_pre_hook(lambda layer, args: (3 * args[0],))
    return model


def replaced():
    """Return a model with a method of one layer replaced on the object."""
    model = layers()
    layer = model[0]
    layer.forward = lambda x: F.linear(x, 2 * layer.weight, layer.bias)
    return model


def computed():
    """Return a model with a weight that is computed from another parameter before every call."""
    model = layers()
    layer = model[0]
    layer.base = layer.weight
    del layer.weight
    layer.weight = 2 * layer.base.detach()

    def double(layer, args):
        layer.weight = 2 * layer.base

    layer.register_forward_pre_hook(double)
    return model


FAST = (hooked, hooked_before, Named)
"""Models whose layers are used as built, whatever runs around them."""
ESCAPING = (tied, Transposed, Weighed, Reweighted)
"""Models whose losses depend on a weight past the calls of its layer."""
BY_ROWS = (Transposed, Weighed, Reweighted, replaced, computed)
"""Models whose gradient of a weight is no outer product at its layer's call."""
