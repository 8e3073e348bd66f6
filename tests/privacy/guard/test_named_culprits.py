"""Errors for coupled records name the model, the losses and the fix."""

from functools import partial

import pytest
import torch
from torch import nn

from perdure.errors import GuardError
from perdure.learner.learner import Learner
from perdure.privacy.guard.loss_checks import check_losses, check_rows
from perdure.privacy.settings import Privacy
from perdure.strategies import Naive

CURE = r"give Privacy\(custom_forward=\"record-by-record\"\)$"


class Mixing(nn.Module):
    """A model that subtracts a mean, or calls another layer for batches of odd size."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.body = nn.Linear(5, 6)
        self.other = nn.Linear(5, 6)
        self.head = nn.Linear(6, 4)

    def features(self, x):
        if self.how == "chooses" and len(x) % 2:
            return self.other(x).tanh()
        rows = self.body(x)
        return rows - rows.mean(0) if self.how == "mean" else rows

    def forward(self, x):
        return self.head(self.features(x))


def learner_of(how, **privacy):
    return Learner(
        model=Mixing(how),
        strategy=Naive(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        iterations=1,
        batch_size=8,
        privacy=Privacy(noise_multiplier=1.0, delta=1e-3, seed=0, **privacy),
    )


@pytest.mark.parametrize("how", ["mean", "chooses"])
def test_the_coupled_records_error_names_the_model_and_the_fix(toy_stream, how):
    with pytest.raises(GuardError, match=rf"the forward of Mixing, or Naive\.losses\(\).*{CURE}"):
        learner_of(how).prepare(toy_stream())
    learner_of(how, custom_forward="record-by-record").prepare(toy_stream())


def test_the_error_of_the_drop_one_check_names_the_fix():
    model = Mixing("chooses").train()
    inputs = torch.rand(6, 5)
    labels = torch.zeros(6, dtype=torch.int64)

    def losses(x, y):
        return model(x).sum(1)

    with pytest.raises(
        GuardError, match=f"calls different layers if one record is removed.*{CURE}"
    ):
        check_rows(model, losses, inputs, labels, "the losses")
    with pytest.raises(GuardError, match=f"couples records: removing one record.*{CURE}"):
        check_losses(lambda x, y: x.sum(1) - x.mean(), inputs, labels, "the losses")
