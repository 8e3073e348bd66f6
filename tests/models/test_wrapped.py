"""Models of any library behind one input and one output tensor, with features from the same
pass.
"""

from collections import OrderedDict, namedtuple
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from perdure import Learner, Privacy
from perdure.contract.forward import Forward
from perdure.data import Batch, split
from perdure.errors import ConfigError, StrategyError
from perdure.models import Wrapped, mlp, wrap
from perdure.privacy.clipping import Clip, clipped_gradient_sum
from perdure.privacy.guard import independence
from perdure.strategies import EWC, SLDA, Naive

SGD = partial(torch.optim.SGD, lr=0.1)
Answer = namedtuple("Answer", ["logits", "hidden"])


class Net(nn.Module):
    """Two layers that return any kind of value and then write into their features."""

    def __init__(self, answer=lambda logits, hidden: logits):
        super().__init__()
        self.body = nn.Linear(5, 6)
        self.act = nn.Tanh()
        self.score = nn.Linear(6, 4)
        self.answer = answer
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        hidden = self.act(self.body(x))
        return self.answer(self.score(hidden), hidden)


class Written(Net):
    def forward(self, x):
        return self.score(self.body(x).relu_())


class Masked(nn.Module):
    """The mean of embeddings where the mask is 1."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, input_ids, attention_mask):
        weights = attention_mask.unsqueeze(-1)
        return {"logits": (self.table(input_ids) * weights).sum(1) / weights.sum(1)}


def points():
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("answer", "output"),
    [
        (lambda logits, hidden: logits, None),
        (lambda logits, hidden: (logits, hidden), 0),
        (lambda logits, hidden: [hidden, logits], -1),
        (lambda logits, hidden: {"hidden": hidden, "logits": logits}, "logits"),
        (lambda logits, hidden: OrderedDict(logits=logits), "logits"),
        (Answer, "logits"),
        (Answer, 0),
        (lambda logits, hidden: SimpleNamespace(logits=logits), "logits"),
    ],
)
def test_wrap_takes_the_output_from_any_return_value(answer, output):
    net = Net(answer)
    hidden = torch.tanh(net.body(points()))
    assert torch.equal(wrap(net, output=output)(points()), net.score(hidden))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output": "scores"}, "output = 'scores' .*of this dict: 'hidden', 'logits'"),
        ({"output": 0}, "output = 0 .*of this dict: 'hidden', 'logits'"),
        ({}, "output = None .*of this dict: 'hidden', 'logits'"),
    ],
)
def test_wrap_refuses_a_missing_output(settings, message):
    net = Net(lambda logits, hidden: {"hidden": hidden, "logits": logits, "loss": None})
    with pytest.raises(ConfigError, match=message) as refusal:
        wrap(net, **settings)(points())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output": 1.5}, 'output = 1.5 .*a name such as "logits"'),
        ({"head": "fc"}, "head = 'fc' .*a name among .*body, act, score"),
        ({"features": 3}, "features = 3 .*a name among"),
        ({"features": "act"}, "'act' is a Tanh, .*; give feature_size=LENGTH"),
        ({"features": "body", "head": "score"}, "both name a layer"),
        ({"padding": "0"}, "padding = '0' .*a whole number, or None"),
        ({"input_name": 1}, "input_name = 1 .*a keyword"),
    ],
)
def test_wrap_refuses_an_invalid_argument(settings, message):
    with pytest.raises(ConfigError, match=message):
        wrap(Net(), **settings)


def test_wrap_refuses_a_class_in_place_of_a_model():
    with pytest.raises(ConfigError, match=r"model = .*a torch\.nn\.Module"):
        wrap(nn.Linear)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"features": "score"}, "the model's outputs; .*write head='score' to use the input"),
        ({"features": "act", "feature_size": 7}, r"shape \(6, 6\) for 6 records.*feature_size"),
    ],
)
def test_wrap_refuses_features_of_another_size_than_feature_size(layer, message):
    with pytest.raises(ConfigError, match=message):
        wrap(Net(), **layer).features(points())


def test_the_error_of_a_model_without_features_names_the_fix(toy_stream):
    learner = Learner(model=wrap(Net()), strategy=SLDA(), optimizer=SGD, epochs=1)
    with pytest.raises(StrategyError, match=r"perdure\.models\.wrap\(model, head=LAYER\)"):
        learner.fit(toy_stream())
    assert not hasattr(wrap(Net()), "features")


@pytest.mark.parametrize(
    "layer", [{"head": "score"}, {"features": "body"}, {"features": "act", "feature_size": 6}]
)
def test_wrapped_logits_and_features_need_one_forward_pass(layer):
    net = Net(lambda logits, hidden: (logits,))
    model = wrap(net, output=0, **layer)
    before = net.body(points())
    logits, features = Forward(model).with_features(points())
    assert net.passes == 1 and model.feature_size == 6
    assert torch.equal(features, before if layer.get("features") == "body" else before.tanh())
    assert torch.equal(logits, net.score(before.tanh()))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_wrapped_features_are_copied_before_in_place_writes():
    net = Written()
    expected = net.body(points())
    assert torch.equal(wrap(net, features="body").features(points()), expected)


def test_wrapped_features_use_given_parameters_under_vmap():
    model = wrap(Net(), head="score")
    changed = {name: value.detach() + 1 for name, value in model.named_parameters()}

    def value(params, row):
        logits, features = Forward(model, params).with_features(row[None])
        return logits.sum() + features.square().sum()

    each = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0))(changed, points())
    model.load_state_dict(changed)
    for i, row in enumerate(points()):
        logits, features = model.with_features(row[None])
        loss = logits.sum() + features.square().sum()
        for own, grad in zip(each, torch.autograd.grad(loss, [*model.parameters()]), strict=True):
            torch.testing.assert_close(each[own][i], grad)


@pytest.mark.parametrize("shape", [(6, 1, 1), (3, 6)])
def test_wrapped_features_drop_axes_of_length_1(shape):
    net = nn.Sequential(nn.Linear(5, 18), nn.Unflatten(1, shape) if shape == (3, 6) else nn.Tanh())
    if shape == (6, 1, 1):
        net = nn.Sequential(nn.Linear(5, 6), nn.Unflatten(1, shape))
    model = wrap(nn.Sequential(net, nn.Flatten()), features="0", feature_size=6)
    assert model.features(points()).shape == ((6, 6) if shape == (6, 1, 1) else (6, 3, 6))


def test_wrap_passes_inputs_and_mask_by_keyword():
    net = Masked()
    tokens = torch.tensor([[3, 4, 0, 0], [1, 2, 5, 6]])
    model = wrap(net, output="logits", input_name="input_ids", padding=0)
    expected = torch.stack([net.table(tokens[0, :2]).mean(0), net.table(tokens[1]).mean(0)])
    torch.testing.assert_close(model(tokens), expected)


@pytest.mark.parametrize(
    ("answer", "fix"),
    [
        (lambda logits, hidden: {"loss": hidden.sum(), "logits": logits}, "output='logits'"),
        (lambda logits, hidden: (logits, hidden), "output=0"),
    ],
)
def test_an_unwrapped_hugging_face_model_gives_a_hint_to_wrap(toy_stream, answer, fix):
    learner = Learner(model=Net(answer), strategy=Naive(), optimizer=SGD, epochs=1)
    with pytest.raises(ConfigError, match=rf"perdure\.models\.wrap\(model, {fix}\)") as refusal:
        learner.fit(toy_stream())
    assert "\n" not in str(refusal.value)


def pair():
    """Return a classifier, and the same layers behind `wrap`."""
    own = mlp(input_shape=(5,), num_classes=4, hidden=(6,), seed=0)
    layers = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))
    layers.load_state_dict(
        {
            f"{new}.{kind}": own.state_dict()[f"{old}.{kind}"].clone()
            for new, old in (("0", "body.1"), ("2", "head"))
            for kind in ("weight", "bias")
        }
    )
    return own, wrap(layers, head="2")


@pytest.mark.parametrize("strategy", [SLDA(), EWC(strength=10.0)])
def test_a_wrapped_classifier_trains_like_the_plain_classifier(toy_data, strategy):
    stream = split(toy_data, scenario="class", experiences=2)
    results = []
    for model in pair():
        learner = Learner(model=model, strategy=strategy, optimizer=SGD, epochs=1, batch_size=8)
        results.append((learner.fit(stream), *(value.detach() for value in model.parameters())))
    assert all(map(torch.equal, *results))


def test_layers_of_a_wrapped_model_use_their_clipping_rules(toy_data):
    own, wrapped = pair()
    assert isinstance(wrapped, Wrapped) and independence(wrapped) == "by construction"
    batch = Batch.current(toy_data.train, 0)

    def losses(forward):
        logits, features = forward.with_features(batch.inputs)
        return logits.square().sum(1) + features.square().sum(1)

    sums = []
    for model in (own, wrapped):
        params = dict(model.named_parameters())
        of = partial(losses, Forward(model))
        sums.append(clipped_gradient_sum(model, params, of, len(batch), Clip(norm=0.5)))
    assert all(map(torch.equal, *(found.values() for found in sums)))


@pytest.mark.parametrize(("layer", "strategy"), [({"head": "2"}, SLDA()), ({}, Naive())])
def test_a_wrapped_model_trains_under_privacy(toy_data, layer, strategy):
    stream = split(toy_data, scenario="class", experiences=2)
    learner = Learner(
        model=wrap(pair()[1].model, **layer),
        strategy=strategy,
        optimizer=SGD,
        epochs=1,
        batch_size=8,
        privacy=Privacy(noise_multiplier=1.0, seed=0),
    )
    assert torch.isfinite(learner.fit(stream)).all()
