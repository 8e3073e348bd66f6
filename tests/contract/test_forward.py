import pytest
import torch
from torch import nn

from perdure.contract.forward import Forward
from perdure.models.classifier import Classifier


class Body(nn.Module):
    """A linear layer that counts its passes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 5)
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return self.layer(x)


class Written(Classifier):
    def forward(self, x):
        return self.head(self.features(x).relu_())


class Twice(Classifier):
    def forward(self, x):
        return self.head(self.features(x) + self.features(x.flip(0)))


class Scaled(Classifier):
    def forward(self, x):
        return self.head(self.features(2 * x))


class Past(Classifier):
    def forward(self, x):
        return self.head(self.body(x))


class Detached(Classifier):
    def forward(self, x):
        with torch.no_grad():
            features = self.features(x)
        return self.head(features)


def model(kind):
    torch.manual_seed(0)
    return kind(Body(), 5, 4)


def points():
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def test_logits_and_features_take_one_pass_through_the_body():
    own = model(Classifier)
    x = points()
    logits, features = Forward(own).with_features(x)
    assert own.body.passes == 1
    assert torch.equal(logits, own(x)) and torch.equal(features, own.features(x))
    (features.sum() + logits.sum()).backward()
    assert own.body.layer.weight.grad is not None and "features" not in vars(own)


@pytest.mark.parametrize("kind", [Written, Twice, Scaled, Past, Detached])
def test_features_are_computed_again_if_the_model_alters_them(kind):
    own = model(kind)
    x = points()
    logits, features = Forward(own).with_features(x)
    assert torch.equal(logits, own(x)) and torch.equal(features, own.features(x))
    assert features.requires_grad


def test_features_use_the_given_parameters_under_vmap_and_grad():
    own = model(Classifier)
    x = points()
    params = {name: value.detach() + 1 for name, value in own.named_parameters()}

    def value(params, row):
        logits, features = Forward(own, params).with_features(row[None])
        return logits.sum() + features.square().sum()

    def apart(params, row):
        forward = Forward(own, params)
        return forward(row[None]).sum() + forward.features(row[None]).square().sum()

    mine, theirs = (
        torch.func.vmap(torch.func.grad(each), in_dims=(None, 0))(params, x)
        for each in (value, apart)
    )
    for name, grad in mine.items():
        torch.testing.assert_close(grad, theirs[name])
    assert own.body.passes == 1 + 2


def test_a_forward_pass_that_fails_does_not_change_the_model():
    own = model(Classifier)
    with pytest.raises(RuntimeError):
        Forward(own).with_features(torch.zeros(2, 9))
    assert "features" not in vars(own)
