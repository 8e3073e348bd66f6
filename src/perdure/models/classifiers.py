"""Built-in models with a fixed full-width head and the method `features`.

They are a multilayer perceptron, a small CNN, a small MobileNet and ResNet-18.

Each of them can have an additional generator (`generative`).

The head never grows, because growing it with the labels that occur would reveal them. Normalisation
is group normalisation, which uses one record at a time; BatchNorm is available for runs without
privacy. No operation writes in place to values that autograd or vmap needs, so
`torch.func.functional_call`, `vmap` and `grad` all work.
"""

import math
from collections.abc import Sequence

from torch import nn

from perdure.errors import ConfigError
from perdure.models.bodies import cnn_body, mlp_body, resnet_body
from perdure.models.classifier import Classifier, Head
from perdure.models.config import (
    FULLY_CONNECTED,
    Activation,
    Initialisation,
    ModelConfig,
    Normalisation,
)
from perdure.models.initialisation import initialise
from perdure.models.mobilenet import mobilenet_body
from perdure.models.vae import generative
from perdure.utils.seeding import seeded


def build(
    config: ModelConfig, *, input_shape: Sequence[int], num_classes: int, seed: int
) -> Classifier:
    """Make the model of a `ModelConfig`; parameters depend on `seed` only.

    Args:
        config: configuration of the model.
        input_shape: shape of one input, (channels, height, width) or (features,).
        num_classes: full width of the head.
        seed: seed of the initial parameters; the generators of the caller do not change.

    Raises:
        ConfigError: if the model cannot use inputs of this shape.

    >>> build(ModelConfig(hidden=(8,)), input_shape=(1, 8, 8), num_classes=10, seed=0).feature_size
    8
    """
    if num_classes < 1:
        raise ConfigError.of("num_classes", num_classes, "whole numbers from 1")
    with seeded(seed):
        body, feature_size = _body(config, tuple(input_shape))
        classifier = Classifier(body, feature_size, num_classes, config.head)
        initialise(classifier, config.init, config.activation)
    if config.name == "generative":
        return generative(
            classifier,
            input_shape=input_shape,
            latent=config.latent,
            hidden=config.hidden,
            seed=seed,
        )
    return classifier


def mlp(
    *,
    input_shape: Sequence[int],
    num_classes: int,
    seed: int,
    hidden: tuple[int, ...] = (400, 400),
    activation: Activation = "relu",
    head: Head = "linear",
    norm: Normalisation = "none",
    init: Initialisation = "default",
    skip: bool = False,
    dropout: float = 0.0,
) -> Classifier:
    """Make a multilayer perceptron on the flattened input.

    Args:
        input_shape: shape of one input, (channels, height, width) or (features,).
        num_classes: full width of the head.
        seed: seed of the initial parameters, as in `build`, which describes the errors.
        hidden: width of each layer.
        activation: activation after each layer.
        head: `linear` or `cosine`.
        norm: normalisation after each hidden layer.
        init: initial weights; `default` is PyTorch's.
        skip: residual connections around every hidden layer but the first.
        dropout: share of features that is dropped after each hidden layer, in training.
    """
    config = ModelConfig(
        name="mlp",
        hidden=hidden,
        activation=activation,
        head=head,
        norm=norm,
        init=init,
        skip=skip,
        dropout=dropout,
    )
    return build(config, input_shape=input_shape, num_classes=num_classes, seed=seed)


def cnn(
    *,
    input_shape: Sequence[int],
    num_classes: int,
    seed: int,
    norm: Normalisation = "group",
    activation: Activation = "relu",
    width: int = 64,
    head: Head = "linear",
    init: Initialisation = "default",
    skip: bool = False,
    depth: int = 3,
    dropout: float = 0.0,
) -> Classifier:
    """Make a small CNN; by default with three convolutions and about 100,000 parameters.

    The convolutions are 3 x 3, with two poolings and a mean over positions.

    Args:
        input_shape: shape of one image, (channels, height, width).
        num_classes: full width of the head.
        seed: seed of the initial parameters, as in `build`, which describes the errors.
        norm: normalisation after each convolution.
        activation: activation after each normalisation.
        width: number of channels of the second convolution; the first has half as many, the third
            twice as many.
        head: `linear` or `cosine`.
        init: initial weights; `default` is PyTorch's.
        skip: residual connections around every convolution but the first.
        depth: number of convolutions; after the third all have the same width.
        dropout: share of features that is dropped before the head, in training.
    """
    config = ModelConfig(
        name="cnn",
        norm=norm,
        activation=activation,
        width=width,
        head=head,
        init=init,
        skip=skip,
        depth=depth,
        dropout=dropout,
    )
    return build(config, input_shape=input_shape, num_classes=num_classes, seed=seed)


def resnet18(
    *,
    input_shape: Sequence[int],
    num_classes: int,
    seed: int,
    norm: Normalisation = "group",
    width: int = 64,
    head: Head = "linear",
    init: Initialisation = "default",
    dropout: float = 0.0,
) -> Classifier:
    """Make a ResNet-18 for small images: a 3 x 3 stem of stride 1 and no max-pooling.

    Args:
        input_shape: shape of one image, (channels, height, width).
        num_classes: full width of the head.
        seed: seed of the initial parameters, as in `build`, which describes the errors.
        norm: normalisation after each convolution.
        width: number of channels of the first stage.
        head: `linear` or `cosine`.
        init: initial weights; `default` is PyTorch's.
        dropout: share of features that is dropped before the head, in training.

    Source: He, Zhang, Ren, Sun 2016, "Deep residual learning", section 4.2 for the stem.
    """
    config = ModelConfig(
        name="resnet18", norm=norm, width=width, head=head, init=init, dropout=dropout
    )
    return build(config, input_shape=input_shape, num_classes=num_classes, seed=seed)


def mobilenet(
    *,
    input_shape: Sequence[int],
    num_classes: int,
    seed: int,
    norm: Normalisation = "group",
    activation: Activation = "relu",
    width: int = 64,
    head: Head = "linear",
    init: Initialisation = "default",
    dropout: float = 0.0,
) -> Classifier:
    """Make a small MobileNet: a stem, and four depthwise-separable blocks for small images.

    It has the widths of the CNN, and less than half of its parameters and operations.

    Args:
        input_shape: shape of one image, (channels, height, width).
        num_classes: full width of the head.
        seed: seed of the initial parameters, as in `build`, which describes the errors.
        norm: normalisation after each convolution.
        activation: activation after each normalisation.
        width: number of channels of the first two blocks; the stem has half as many, the last two
            blocks twice as many.
        head: `linear` or `cosine`.
        init: initial weights; `default` is PyTorch's.
        dropout: share of features that is dropped before the head, in training.

    Source: Howard et al. 2017, "MobileNets".
    """
    config = ModelConfig(
        name="mobilenet",
        norm=norm,
        activation=activation,
        width=width,
        head=head,
        init=init,
        dropout=dropout,
    )
    return build(config, input_shape=input_shape, num_classes=num_classes, seed=seed)


def _body(config: ModelConfig, input_shape: tuple[int, ...]) -> tuple[nn.Module, int]:
    """Make the body of a model; return it with the length of its features."""
    if config.name in FULLY_CONNECTED:
        return mlp_body(config, math.prod(input_shape))
    if len(input_shape) != 3 or min(input_shape[1:]) < 4:
        raise ConfigError.of(
            "input_shape",
            input_shape,
            f"(channels, height, width), at least 4 x 4 pixels for {config.name}",
        )
    bodies = {"cnn": cnn_body, "resnet18": resnet_body, "mobilenet": mobilenet_body}
    return bodies[config.name](config, input_shape[0])
