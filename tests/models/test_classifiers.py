"""Classifiers: shapes, seeds, features and head, per-record gradients, and no BatchNorm by
default.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from perdure.errors import ConfigError
from perdure.models.classifier import Classifier
from perdure.models.classifiers import build, cnn, mlp, mobilenet, resnet18
from perdure.models.config import ModelConfig
from perdure.models.vae import Generative, generative

DIGITS = (1, 8, 8)
CONFIGS = {
    "mlp": ModelConfig(hidden=(16, 8)),
    "cnn": ModelConfig(name="cnn", width=8),
    "cnn without norm": ModelConfig(name="cnn", width=8, norm="none", activation="gelu"),
    "resnet18": ModelConfig(name="resnet18", width=4),
    "generative": ModelConfig(name="generative", hidden=(16, 8), latent=3),
    "generative, cosine head": ModelConfig(
        name="generative", hidden=(16, 8), latent=3, head="cosine"
    ),
    "mlp, cosine head": ModelConfig(hidden=(16, 8), activation="tanh", head="cosine"),
    "cnn, cosine head": ModelConfig(name="cnn", width=8, head="cosine"),
    "residual mlp": ModelConfig(
        hidden=(8, 8, 6), skip=True, norm="layer", activation="silu", init="orthogonal"
    ),
    "residual cnn": ModelConfig(
        name="cnn", width=8, depth=4, skip=True, activation="prelu", norm="layer", init="he"
    ),
    "mobilenet": ModelConfig(name="mobilenet", width=8, activation="leaky_relu", init="xavier"),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def model(request) -> Classifier:
    return build(request.param, input_shape=DIGITS, num_classes=10, seed=0)


@pytest.mark.parametrize("shape", [DIGITS, (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_every_classifier_accepts_every_image_size(config, shape):
    model = build(config, input_shape=shape, num_classes=7, seed=0)
    x = torch.rand(3, *shape)
    assert model(x).shape == (3, 7)
    assert model.features(x).shape == (3, model.feature_size)


def test_the_mlp_accepts_tabular_inputs():
    assert mlp(input_shape=(30,), num_classes=2, hidden=(5,), seed=0)(torch.rand(4, 30)).shape == (
        4,
        2,
    )


def test_an_mlp_without_hidden_layers_is_linear():
    model = mlp(input_shape=(30,), num_classes=2, hidden=(), seed=0)
    x = torch.rand(4, 30)
    torch.testing.assert_close(model(x), x @ model.head.weight.T + model.head.bias)


def test_the_model_output_is_the_head_applied_to_the_features(model):
    x = torch.rand(5, *DIGITS)
    assert torch.equal(model(x), model.head(model.features(x)))


def test_model_parameters_depend_only_on_the_seed(model):
    again = [
        build(config, input_shape=DIGITS, num_classes=10, seed=0) for config in CONFIGS.values()
    ]
    matching = [m for m in again if str(m) == str(model)]
    for (name, value), other in zip(
        model.named_parameters(), matching[0].parameters(), strict=True
    ):
        assert torch.equal(value, other), name
    other_seed = [
        build(config, input_shape=DIGITS, num_classes=10, seed=1) for config in CONFIGS.values()
    ]
    matching = [m for m in other_seed if str(m) == str(model)]
    assert not torch.equal(model.head.weight, matching[0].head.weight)


def test_building_a_model_does_not_change_the_global_generator():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    mlp(input_shape=DIGITS, num_classes=2, seed=99)
    assert torch.equal(torch.rand(2), expected)


def test_the_mlp_has_the_default_initialisation_of_pytorch():
    ours = mlp(input_shape=(6,), num_classes=3, hidden=(4,), seed=5)
    torch.manual_seed(5)
    hidden = nn.Linear(6, 4)
    head = nn.Linear(4, 3)
    x = torch.rand(2, 6)
    assert torch.equal(ours(x), head(F.relu(hidden(x))))


def test_per_record_gradients_add_up_to_the_batch_gradient(model):
    """float64 is used because normalisation over few numbers amplifies rounding."""
    model = model.double()
    x = torch.rand(6, *DIGITS, dtype=torch.float64)
    y = torch.arange(6)
    params = {name: value.detach() for name, value in model.named_parameters()}

    def total_loss(params, x, y):
        return F.cross_entropy(functional_call(model, params, (x,)), y, reduction="sum")

    def record_loss(params, x, y):
        return total_loss(params, x.unsqueeze(0), y.unsqueeze(0))

    per_record = vmap(grad(record_loss), in_dims=(None, 0, 0))(params, x, y)
    batch = grad(total_loss)(params, x, y)
    for name in params:
        assert per_record[name].shape == (6, *params[name].shape)
        torch.testing.assert_close(per_record[name].sum(0), batch[name], rtol=1e-8, atol=1e-10)


def test_the_output_of_a_record_does_not_depend_on_other_records(model):
    """BatchNorm in training mode would fail this test."""
    x = torch.rand(4, *DIGITS)
    model.train()
    torch.testing.assert_close(model(x)[:2], model(x[:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [cnn, mobilenet, resnet18])
def test_models_have_batch_norm_only_if_norm_is_batch(make):
    def kinds(norm):
        model = make(input_shape=DIGITS, num_classes=2, seed=0, width=4, norm=norm)
        return {type(module) for module in model.modules()}

    assert nn.BatchNorm2d in kinds("batch")
    assert nn.BatchNorm2d not in kinds("group")
    assert nn.GroupNorm in kinds("group")


def test_default_models_have_the_documented_number_of_parameters():
    """The CNN has about 100,000 parameters, and ResNet-18 with a small stem the usual
    11,173,962.
    """
    small = cnn(input_shape=(1, 28, 28), num_classes=10, seed=0)
    large = resnet18(input_shape=(3, 32, 32), num_classes=10, seed=0)
    assert 80_000 < sum(p.numel() for p in small.parameters()) < 120_000
    assert sum(p.numel() for p in large.parameters()) == 11_173_962


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "vgg"),
        ("norm", "instance"),
        ("activation", "swish"),
        ("init", "zeros"),
        ("depth", 0),
        ("dropout", 1.0),
        ("hidden", (4, 0)),
        ("width", 5),
        ("latent", 0),
        ("head", "cone"),
    ],
)
def test_the_model_config_refuses_an_invalid_value_and_names_it(field, value):
    with pytest.raises(ConfigError, match=rf"^{field} = .* is not allowed; allowed: [^\n]*$"):
        ModelConfig(**{field: value})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "cnn", "hidden": (4,)}, r"hidden = \(4,\) .* cnn has no hidden; .*: mlp, gen"),
        ({"name": "resnet18", "activation": "tanh"}, "activation = 'tanh' .* resnet18 has no act"),
        ({"width": 32}, "width = 32 .* mlp has no width; models with it: cnn, resnet18, mobilenet"),
        ({"depth": 4}, "depth = 4 .* mlp has no depth; models with it: cnn$"),
        ({"name": "mobilenet", "skip": True}, "skip = True .* mobilenet has no skip"),
        ({"hidden": (4,), "skip": True}, "skip = True .* one layer; give two or more in hidden"),
        ({"name": "cnn", "depth": 1, "skip": True}, "skip = True .* two or more in depth"),
        ({"hidden": (4, 1), "norm": "layer"}, r"hidden = \(4, 1\) .* 2 units or more with norm"),
    ],
)
def test_fields_without_meaning_for_a_model_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**given)


# --------------------------------------------------------------------------- options


GAINS = {"relu": 2**0.5, "leaky_relu": (2 / 1.0001) ** 0.5, "tanh": 5 / 3}


@pytest.mark.parametrize("activation", GAINS)
def test_initial_weights_have_the_gain_of_the_activation(activation):
    def weights(init):
        model = mlp(
            input_shape=(300,),
            num_classes=200,
            hidden=(400,),
            activation=activation,
            init=init,
            seed=0,
        )
        assert not model.body[1].bias.any() and not model.head.bias.any()
        return model.body[1].weight.detach(), model.head.weight.detach()

    gain = GAINS[activation]
    body, head = weights("he")
    assert float(body.std() * 300**0.5) == pytest.approx(gain, rel=0.01)
    assert float(head.std() * 400**0.5) == pytest.approx(1, rel=0.01)
    body, _ = weights("xavier")
    assert float(body.abs().max()) == pytest.approx(gain * (6 / 700) ** 0.5, rel=0.01)
    body, head = weights("orthogonal")
    torch.testing.assert_close(body.T @ body, gain**2 * torch.eye(300), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(head @ head.T, torch.eye(200), rtol=1e-3, atol=1e-4)


def test_residual_layers_add_their_projected_input():
    model = mlp(input_shape=(5,), num_classes=2, hidden=(4, 4, 3), skip=True, seed=0)
    x = torch.rand(2, 5)
    first, same, other = model.body[1], model.body[3], model.body[4]
    state = F.relu(first(x))
    state = state + F.relu(same.inner[0](state))
    state = F.relu(other.inner[0](state)) + state @ other.shortcut.weight.T
    torch.testing.assert_close(model.features(x), state)
    assert isinstance(same.shortcut, nn.Identity) and other.shortcut.bias is None


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_the_cnn_has_as_many_convolutions_as_its_depth(depth):
    model = cnn(input_shape=DIGITS, num_classes=2, width=8, depth=depth, seed=0)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    widths = [4, 8, 16, 16, 16][:depth]
    assert [m.out_channels for m in convolutions] == widths and model.feature_size == widths[-1]


@pytest.mark.parametrize("norm", ["none", "layer", "group"])
def test_an_mlp_normalises_each_record_by_itself(norm):
    model = mlp(input_shape=(5,), num_classes=2, hidden=(8, 6), norm=norm, seed=0)
    kinds = [type(m) for m in model.modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm)]
    assert kinds == {"none": [], "layer": [nn.LayerNorm] * 2, "group": [nn.GroupNorm] * 2}[norm]
    x = torch.rand(3, 5)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))
    # a group of one number would always be 0
    assert float(model.features(x).detach().abs().max()) > 0


def test_mobilenet_is_built_of_depthwise_separable_convolutions():
    model = mobilenet(input_shape=DIGITS, num_classes=10, seed=0)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)][1:]
    for depthwise, pointwise in zip(convolutions[::2], convolutions[1::2], strict=True):
        assert depthwise.groups == depthwise.in_channels == depthwise.out_channels
        assert pointwise.kernel_size == (1, 1) and pointwise.groups == 1
    whole = cnn(input_shape=DIGITS, num_classes=10, seed=0)
    sizes = [sum(p.numel() for p in each.parameters()) for each in (model, whole)]
    assert 2 * sizes[0] < sizes[1] and model.feature_size == whole.feature_size


def test_the_cnn_refuses_tables_and_the_mlp_needs_a_class():
    with pytest.raises(ConfigError, match="input_shape"):
        cnn(input_shape=(30,), num_classes=2, seed=0)
    with pytest.raises(ConfigError, match="num_classes"):
        mlp(input_shape=(30,), num_classes=0, seed=0)


# --------------------------------------------------------------------------- a generator beside it


def test_a_generator_can_be_added_to_any_classifier():
    x = torch.rand(3, *DIGITS)
    for plain in (
        mlp(input_shape=DIGITS, num_classes=10, hidden=(5,), seed=0),
        cnn(input_shape=DIGITS, num_classes=10, width=8, seed=0),
    ):
        expected = plain(x)
        model = generative(plain, input_shape=DIGITS, latent=4, hidden=(7, 6), seed=0)
        mean, log_variance = model.encode(x)
        assert mean.shape == log_variance.shape == (3, model.latent) == (3, 4)
        assert model.decode(mean).shape == x.shape
        assert torch.equal(model(x), expected) and model.feature_size == plain.feature_size
        own = {
            name: value
            for name, value in model.named_parameters()
            if not name.startswith(("encoder.", "decoder."))
        }
        assert own.keys() == dict(plain.named_parameters()).keys()
        assert all(value is own[name] for name, value in plain.named_parameters()), (
            "it is the same classifier"
        )


def test_the_decoder_mirrors_the_encoder():
    plain = mlp(input_shape=(11,), num_classes=2, hidden=(5,), seed=0)
    model = generative(plain, input_shape=(11,), latent=3, hidden=(7, 6))
    shapes = [
        tuple(v.shape) for n, v in model.named_parameters() if n.endswith("weight") and "coder" in n
    ]
    assert shapes == [(7, 11), (6, 7), (6, 6), (6, 3), (7, 6), (11, 7)]
    linear = generative(plain, input_shape=(11,), latent=3, hidden=())
    assert linear.encode(torch.rand(2, 11))[0].shape == (2, 3) and linear.decode(
        torch.rand(2, 3)
    ).shape == (2, 11)


def test_generator_parameters_depend_only_on_the_seed():
    def made(seed):
        config = ModelConfig(name="generative", hidden=(6,), latent=2)
        return build(config, input_shape=(9,), num_classes=2, seed=seed)

    one = made(0).state_dict()
    again = made(0).state_dict()
    other = made(1).state_dict()
    assert isinstance(made(0), Generative)
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    assert not torch.equal(one["decoder.0.weight"], other["decoder.0.weight"])
    plain = mlp(input_shape=(9,), num_classes=2, hidden=(6,), seed=0).state_dict()
    assert all(torch.equal(value, one[name]) for name, value in plain.items()), (
        "the classifier begins as it would alone"
    )
    assert not torch.equal(one["encoder.1.weight"], one["body.1.weight"])


def test_a_generator_refuses_invalid_inputs_by_name():
    plain = mlp(input_shape=DIGITS, num_classes=2, hidden=(5,), seed=0)
    with pytest.raises(
        ConfigError, match=r"input shape = \(8, 8\).*\(1, 8, 8\), as the generator was made for"
    ):
        generative(plain, input_shape=DIGITS, latent=2).encode(torch.rand(3, 8, 8))
    with pytest.raises(ConfigError, match="latent = 0 is not allowed"):
        generative(plain, input_shape=DIGITS, latent=0)
    with pytest.raises(ConfigError, match=r"hidden = \(0,\) is not allowed"):
        generative(plain, input_shape=DIGITS, hidden=(0,))
