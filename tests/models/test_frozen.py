"""Frozen bodies: their parameters are neither trained nor stored, and outputs equal the
backbone's.
"""

import pytest
import torch
from torch import nn

from perdure.data.scenarios import split
from perdure.errors import ConfigError, GuardError
from perdure.learner.learner import Learner
from perdure.models.classifiers import resnet18
from perdure.models.frozen import Fixed, FixedNorm, Frozen, frozen
from perdure.models.random_convolutions import RandomConvolutions
from perdure.models.scattering import Scattering
from perdure.privacy.guard.model_checks import check_buffers, check_model
from perdure.privacy.settings import Privacy
from perdure.strategies import NCM, Naive

SHAPE = (1, 8, 8)


def images(n=5, seed=0):
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed))


def backbone():
    """Return a network with dropout and with BatchNorm statistics of other data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = resnet18(input_shape=SHAPE, num_classes=4, seed=0, norm="batch", width=4).body
        model = nn.Sequential(model, nn.Dropout(0.5))
        for _ in range(3):
            model(torch.rand(16, *SHAPE))
    return model


BODIES = {
    "random convolutions": RandomConvolutions(filters=3, size=3, pool=2),
    "scattering": Scattering(orientations=2),
    "scattering, normalised": nn.Sequential(
        Fixed(Scattering(orientations=2)), nn.GroupNorm(1, 9, affine=False)
    ),
    "backbone": backbone(),
    "a function": torch.abs,
}


@pytest.fixture(params=BODIES.values(), ids=BODIES.keys())
def model(request):
    return frozen(request.param, input_shape=SHAPE, num_classes=10)


def test_a_frozen_model_stores_only_its_head(model):
    assert (
        {name for name, _ in model.named_parameters()}
        == {"head.weight", "head.bias"}
        == set(model.state_dict())
    )
    x = images()
    assert model.features(x).shape == (5, model.feature_size)
    torch.testing.assert_close(model(x), model.head(model.features(x)))


def test_the_guard_accepts_a_frozen_model_in_training_mode(model):
    x = images()
    before = model.features(x)
    check_model(model)
    check_buffers(model, x)
    assert torch.equal(model.train().features(x), before)
    assert not any(part.training for part in model.body.modules())


def test_frozen_model_rows_are_equal_alone_and_in_a_batch(model):
    x = images()
    params = dict(model.named_parameters())
    alone = torch.func.vmap(lambda row: torch.func.functional_call(model, params, (row[None],))[0])(
        x
    )
    torch.testing.assert_close(alone, model(x), rtol=1e-4, atol=1e-5)


def test_a_frozen_backbone_equals_its_evaluation_mode():
    given = backbone()
    names = [name for name, _ in given.named_parameters()]
    model = frozen(given, input_shape=SHAPE, num_classes=4)
    assert (
        given.training
        and names == [name for name, _ in given.named_parameters()]
        and len(names) > 20
    )
    torch.testing.assert_close(
        model.features(images()), given.eval()(images()), rtol=1e-4, atol=1e-5
    )
    assert any(isinstance(part, FixedNorm) for part in model.body.modules())


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("make", [nn.BatchNorm1d, nn.BatchNorm2d, nn.InstanceNorm2d])
def test_fixed_norms_equal_the_replaced_norms_in_evaluation_mode(make, affine):
    norm = make(3, affine=affine, track_running_stats=True)
    x = torch.randn(6, 3, 4, 4)[(...,) if make is not nn.BatchNorm1d else (..., 0)]
    for value in [*norm.parameters(), norm.running_mean]:
        nn.init.normal_(value)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    torch.testing.assert_close(FixedNorm(norm)(x), norm.eval()(x))


def test_norms_that_mix_records_in_evaluation_mode_are_refused():
    with pytest.raises(ConfigError, match=r"features contain .*BatchNorm2d.*mixes records"):
        Frozen(nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False)))


def test_private_training_accepts_only_the_frozen_backbone():
    from perdure.data.datasets.digits import digits

    stream = split(digits(), scenario="class", experiences=5)
    options = {
        "optimizer": torch.optim.SGD,
        "iterations": 1,
        "privacy": Privacy(noise_multiplier=1.0, seed=0),
    }
    with pytest.raises(GuardError, match="BatchNorm2d"):
        open_one = resnet18(input_shape=SHAPE, num_classes=10, seed=0, norm="batch", width=4)
        Learner(model=open_one, strategy=Naive(), **options).prepare(stream)
    for strategy in (NCM(), Naive()):
        learner = Learner(
            model=frozen(backbone(), input_shape=SHAPE, num_classes=10),
            strategy=strategy,
            **options,
        )
        before = learner.model.features(images())
        assert learner.fit(stream).isfinite().all()
        assert torch.equal(learner.model.features(images()), before)


def test_gradients_reach_the_images_through_a_frozen_backbone():
    x = images().requires_grad_()
    frozen(backbone(), input_shape=SHAPE, num_classes=4)(x).sum().backward()
    assert float(x.grad.abs().max()) > 0


def test_the_head_of_a_frozen_model_depends_only_on_the_seed():
    heads = [
        frozen(torch.abs, input_shape=SHAPE, num_classes=4, seed=s).head.weight for s in (1, 1, 2)
    ]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            Scattering(scales=3),
            "input_shape = .* a shape that the features can use .*sides above 8",
        ),
        (nn.Conv2d(3, 4, 3), "input_shape = "),
        (lambda x: x.sum(0), "features of two inputs have shape"),
    ],
)
def test_frozen_refuses_features_that_fail_on_the_input_shape(features, message):
    with pytest.raises(ConfigError, match=message):
        frozen(features, input_shape=SHAPE, num_classes=4)


def test_frozen_refuses_a_head_without_classes():
    with pytest.raises(ConfigError, match="num_classes = 0"):
        frozen(torch.abs, input_shape=SHAPE, num_classes=0)
