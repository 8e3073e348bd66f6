"""Small models, batches and checks for tests of squared gradients."""

import torch
from torch import nn

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


def assert_same(mine, theirs, atol=1e-7):
    assert list(mine) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name].float(), value.float(), rtol=1e-4, atol=atol)


def summed(query, module, data, clip=None):
    params = {name: value.detach() for name, value in module.named_parameters()}
    return query.summed(module, params, data.tensors(), clip)


class Twice(nn.Module):
    """Calls one layer twice, so that its gradient is the sum of two outer products."""

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
