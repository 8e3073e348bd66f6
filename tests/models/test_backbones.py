"""Backbones of torchvision, timm and Hugging Face with random weights behind `wrap`."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from perdure import Learner, Privacy
from perdure.contract.forward import Forward
from perdure.data import Dataset, InputDomain, Records, split
from perdure.errors import ConfigError, GuardError
from perdure.models import low_rank, wrap
from perdure.privacy import fix
from perdure.strategies import EWC, SLDA, Naive

SGD = partial(torch.optim.SGD, lr=0.05)


def pictures():
    labels = torch.arange(16) % 4
    inputs = 0.1 * torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    inputs += labels[:, None, None, None] / 4
    records = Records(inputs=inputs, labels=labels, ids=torch.arange(16))
    data = Dataset(
        name="pictures",
        train=records,
        test=replace(records, inputs=records.inputs.clone(), ids=records.ids + 100),
        num_classes=4,
        input_shape=(3, 32, 32),
    )
    return split(data, scenario="class", experiences=2)


def texts():
    labels = torch.arange(24) % 2
    inputs = torch.randint(3, 20, (24, 8), generator=torch.Generator().manual_seed(0))
    inputs[:, 0] = labels + 1
    inputs[::2, 5:] = 0
    domain = InputDomain(
        shape=(8,), dtype=torch.int64, vocabulary=20, padding=0, sequence_axes=(0,)
    )
    records = Records(inputs=inputs, labels=labels, ids=torch.arange(24), domain=domain)
    data = Dataset(
        name="texts",
        train=records,
        test=replace(records, inputs=records.inputs.clone(), ids=records.ids + 100),
        num_classes=2,
        input_shape=(8,),
    )
    return split(data, scenario="class", experiences=2)


def learner(model, strategy, **settings):
    given = {"optimizer": SGD, "epochs": 1, "batch_size": 8} | settings
    return Learner(model=model, strategy=strategy, **given)


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    return BertForSequenceClassification(config)


def network():
    """Return a small ResNet of torchvision."""
    from torchvision.models.resnet import BasicBlock, ResNet

    torch.manual_seed(0)
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4)


@pytest.mark.deep(reason="deployment: trains a network of torchvision")
def test_a_wrapped_torchvision_network_trains():
    model = wrap(network(), head="fc")
    assert torch.isfinite(learner(model, SLDA()).fit(pictures())).all()
    assert torch.isfinite(learner(model, Naive(), warm_start=True).fit(pictures())).all()


@pytest.mark.deep(reason="deployment: inspects a network of torchvision in full")
def test_privacy_refuses_batch_norm_of_torchvision_until_fixed():
    privacy = Privacy(noise_multiplier=1.0, seed=0)
    with pytest.raises(GuardError, match=r"model.bn1 is BatchNorm2d.*perdure.privacy.fix"):
        learner(wrap(network(), head="fc"), Naive(), privacy=privacy).fit(pictures())
    model = wrap(fix(network()), head="fc")
    settings = {"privacy": privacy, "iterations": 1, "epochs": None}
    assert torch.isfinite(learner(model, Naive(), **settings).fit(pictures())).all()


@pytest.mark.deep(reason="deployment: timm takes seconds to import")
def test_a_wrapped_timm_network_trains_with_its_features():
    import timm

    timm.layers.set_fused_attn(False)  # fused attention has no rule for gradients of records
    torch.manual_seed(0)
    network = timm.create_model(
        "vit_tiny_patch16_224", num_classes=4, img_size=32, patch_size=16, depth=1
    )
    model = wrap(network, head="head")
    stream = pictures()
    inputs = stream[0].train.inputs
    logits, features = Forward(model).with_features(inputs)
    torch.testing.assert_close(
        features, network.forward_head(network.forward_features(inputs), True)
    )
    torch.testing.assert_close(logits, network(inputs))
    privacy = Privacy(noise_multiplier=1.0, seed=0)
    for settings in ({"privacy": privacy}, {"warm_start": True}):
        matrix = learner(model, EWC(strength=1.0), **settings).fit(stream)
        assert torch.isfinite(matrix).all()


@pytest.mark.deep(reason="deployment: transformers takes seconds to import")
def test_a_wrapped_hugging_face_model_trains():
    stream = texts()
    with pytest.raises(ConfigError, match=r"'SequenceClassifierOutput' .*wrap\(model, output='log"):
        learner(bert(), Naive()).fit(stream)
    adam = partial(torch.optim.Adam, lr=5e-3)
    model = wrap(bert(), output="logits", head="classifier", padding=0)
    learnt = learner(model, EWC(strength=1.0), optimizer=adam, epochs=4).fit(stream)
    assert learnt[0, 0] == 100 and model.feature_size == 16


@pytest.mark.deep(reason="deployment: transformers takes seconds to import")
def test_padding_does_not_change_a_wrapped_hugging_face_model():
    model = wrap(bert().eval(), output="logits", padding=0)
    inputs = torch.tensor([[5, 6, 7, 0, 0], [5, 6, 7, 8, 9]])
    torch.testing.assert_close(model(inputs)[0], model(inputs[:1, :3])[0])


@pytest.mark.deep(reason="deployment: transformers takes seconds to import")
def test_adapters_on_a_hugging_face_model_train_under_privacy():
    adapted = low_rank(bert(), modules=("query", "value"), rank=2, trained="classifier")
    model = wrap(adapted, output="logits", head="classifier", padding=0)
    privacy = Privacy(noise_multiplier=1.0, seed=0)
    matrix = learner(model, Naive(), privacy=privacy).fit(texts())
    assert torch.isfinite(matrix).all()
