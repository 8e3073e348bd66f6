"""Models with a fixed full-width head and `features`: a multilayer perceptron, a small CNN, ResNet-18, a frozen body.

Any of them may have a generator beside it (`generative`).

The head never grows: growing it from labels that turned up would leak them. Normalisation is by group, which
looks at one record at a time; BatchNorm is there for runs without privacy and only when asked for. Nothing
works in place on what autograd or vmap needs, so `torch.func.functional_call`, `vmap` and `grad` all work.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.errors import ConfigError
from perdure.models.cosine_head import CosineHead
from perdure.models.frozen import Frozen, Transform, width
from perdure.utils.seeding import derive

Norm = Literal["none", "group", "batch"]
ModelName = Literal["mlp", "cnn", "resnet18", "generative"]
Activation = Literal["relu", "tanh", "gelu"]
Head = Literal["linear", "cosine"]

NORMS: tuple[Norm, ...] = ("none", "group", "batch")
MODELS: tuple[ModelName, ...] = ("mlp", "cnn", "resnet18", "generative")
ACTIVATIONS: dict[Activation, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}
HEADS: dict[Head, Callable[[int, int], nn.Linear | CosineHead]] = {"linear": nn.Linear, "cosine": CosineHead}
LARGEST_GROUP_COUNT = 16


class Classifier(nn.Module):
    """A body that makes features and a head over all classes: forward(x) = head(features(x)).

    Args:
        body: (n, ...) to (n, feature_size).
        feature_size: length of one feature vector.
        num_classes: full width of the head, public and fixed in advance.
        head: linear, or cosine (see `perdure.models.cosine_head.CosineHead`).
    """

    def __init__(self, body: nn.Module, feature_size: int, num_classes: int, head: Head = "linear") -> None:
        super().__init__()
        self.body = body
        self.feature_size, self.num_classes = feature_size, num_classes
        if head not in HEADS:
            raise ConfigError.of("head", head, HEADS)
        self.head = HEADS[head](feature_size, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Feature vectors (n, feature_size) of inputs (n, ...): all but the head."""
        features: Tensor = self.body(x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, num_classes) of inputs (n, ...)."""
        logits: Tensor = self.head(self.features(x))
        return logits


class Generative(Classifier):
    """A classifier with a variational autoencoder beside it; the two share no parameter.

    Kingma and Welling, Auto-Encoding Variational Bayes, ICLR 2014, with fully connected layers on the flattened input.

    Args:
        classifier: whose body and head these are from now on; they keep their names.
        input_shape: of one input, whose numbers lie in [0, 1].
        latent: length of a latent vector. hidden: units of each hidden layer of the encoder, and of the decoder.
    """

    def __init__(
        self, classifier: Classifier, input_shape: tuple[int, ...], latent: int, hidden: tuple[int, ...]
    ) -> None:
        super().__init__(classifier.body, classifier.feature_size, classifier.num_classes)
        self.head, self.input_shape, self.latent = classifier.head, input_shape, latent
        pixels = math.prod(input_shape)
        down, up = (pixels, *hidden), (latent, *reversed(hidden))
        self.encoder = nn.Sequential(nn.Flatten(), *_layers(down), nn.Linear(down[-1], 2 * latent))
        self.decoder = nn.Sequential(*_layers(up), nn.Linear(up[-1], pixels))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (n, latent) of the latent vectors that inputs (n, ...) may come from.

        Raises:
            ConfigError: for inputs of another shape than the generator was made for.
        """
        if tuple(x.shape[1:]) != self.input_shape:
            raise ConfigError.of(
                "input shape", tuple(x.shape[1:]), f"{self.input_shape}, as the generator was made for"
            )
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return mean, log_variance

    def decode(self, z: Tensor) -> Tensor:
        """Logits (n, ...) of the numbers of an input, each in [0, 1], from latent vectors (n, latent)."""
        logits: Tensor = self.decoder(z).unflatten(1, self.input_shape)
        return logits


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and its shape.

    Args:
        name: mlp, cnn, resnet18, or generative: an mlp with a variational autoencoder beside it.
        hidden: units of each hidden layer (mlp; of encoder and decoder too).
        activation: relu, tanh or gelu (mlp, cnn); encoder and decoder have relu.
        norm: none, group or batch (cnn, resnet18). Batch is refused under differential privacy.
        width: channels of ResNet-18's first stage; the CNN's layers have width/2, width and 2*width.
        latent: length of a latent vector (generative).
        head: linear, or cosine: logits by the angles between features and classes, without bias.

    Raises:
        ConfigError: naming the field.
    """

    name: ModelName = "mlp"
    hidden: tuple[int, ...] = (400, 400)
    activation: Activation = "relu"
    norm: Norm = "group"
    width: int = 64
    latent: int = 100
    head: Head = "linear"

    def __post_init__(self) -> None:
        choices = (("name", MODELS), ("activation", ACTIVATIONS), ("norm", NORMS), ("head", HEADS))
        for field, allowed in choices:
            value = getattr(self, field)
            if value not in allowed:
                raise ConfigError.of(field, value, allowed)
        if any(units < 1 for units in self.hidden):
            raise ConfigError.of("hidden", self.hidden, "positive whole numbers")
        if self.width < 2 or self.width % 2:
            raise ConfigError.of("width", self.width, "even numbers from 2")
        if self.latent < 1:
            raise ConfigError.of("latent", self.latent, "whole numbers from 1")


def build(config: ModelConfig, *, input_shape: Sequence[int], num_classes: int, seed: int) -> Classifier:
    """Make the model that `config` names; parameters are a function of `seed` alone.

    Args:
        config: which model.
        input_shape: of one input, (channels, height, width) or (features,).
        num_classes: full width of the head.
        seed: of the initialisation; the caller's generators are left as they are.

    Raises:
        ConfigError: when the model cannot take that input.

    >>> build(ModelConfig(hidden=(8,)), input_shape=(1, 8, 8), num_classes=10, seed=0).feature_size
    8
    """
    if num_classes < 1:
        raise ConfigError.of("num_classes", num_classes, "whole numbers from 1")
    with _seeded(seed):
        body, feature_size = _body(config, tuple(input_shape))
        classifier = Classifier(body, feature_size, num_classes, config.head)
    if config.name == "generative":
        return generative(
            classifier, input_shape=input_shape, latent=config.latent, hidden=config.hidden, seed=seed
        )  # fmt: skip
    return classifier


def mlp(
    *,
    input_shape: Sequence[int],
    num_classes: int,
    seed: int,
    hidden: tuple[int, ...] = (400, 400),
    activation: Activation = "relu",
    head: Head = "linear",
) -> Classifier:
    """Fully connected layers on the flattened input, PyTorch's initialisation. See `build`."""
    config = ModelConfig(name="mlp", hidden=hidden, activation=activation, head=head)
    return build(config, input_shape=input_shape, num_classes=num_classes, seed=seed)


def cnn(
    *,
    input_shape: Sequence[int],
    num_classes: int,
    seed: int,
    norm: Norm = "group",
    activation: Activation = "relu",
    width: int = 64,
    head: Head = "linear",
) -> Classifier:
    """Three 3 x 3 convolutions, two poolings, a mean over positions; some 100,000 parameters. See `build`."""
    config = ModelConfig(name="cnn", norm=norm, activation=activation, width=width, head=head)
    return build(config, input_shape=input_shape, num_classes=num_classes, seed=seed)


def resnet18(
    *,
    input_shape: Sequence[int],
    num_classes: int,
    seed: int,
    norm: Norm = "group",
    width: int = 64,
    head: Head = "linear",
) -> Classifier:
    """ResNet-18 for small images: a 3 x 3 stem of stride 1 and no max-pooling. See `build`.

    Source: He, Zhang, Ren, Sun 2016, "Deep residual learning", section 4.2 for the stem.
    """
    config = ModelConfig(name="resnet18", norm=norm, width=width, head=head)
    return build(config, input_shape=input_shape, num_classes=num_classes, seed=seed)


def frozen(
    features: nn.Module | Transform,
    *,
    input_shape: Sequence[int],
    num_classes: int,
    seed: int = 0,
    head: Head = "linear",
) -> Classifier:
    """Make a classifier of features that are never trained; only its head has parameters.

        frozen(RandomConvolutions(seed=0), input_shape=(1, 28, 28), num_classes=10)
        frozen(Scattering(), input_shape=(1, 28, 28), num_classes=10)
        frozen(backbone, input_shape=(3, 224, 224), num_classes=10)     # of timm or torchvision, without its head

    Guarantee: the features owe nothing to the records of the stream, and no step, round or checkpoint changes them.
    What a backbone learnt elsewhere, from other records, is not accounted.

    Args:
        features: (n, ...) to (n, ...), row by row; flattened. A module is copied and put into evaluation mode.
        input_shape: of one input. num_classes: full width of the head. seed: of the head's initialisation.
        head: linear, or cosine.

    Raises:
        ConfigError: when the features do not take that input, or mix records.
    """
    if num_classes < 1:
        raise ConfigError.of("num_classes", num_classes, "whole numbers from 1")
    body = Frozen(features)
    feature_size = width(body, tuple(input_shape))
    with _seeded(seed):
        return Classifier(body, feature_size, num_classes, head)


def generative(
    classifier: Classifier,
    *,
    input_shape: Sequence[int],
    latent: int = 100,
    hidden: tuple[int, ...] = (400, 400),
    seed: int = 0,
) -> Generative:
    """Put a generator beside a classifier, which keeps its parameters and their names.

        generative(mlp(input_shape=(1, 28, 28), num_classes=10, seed=0), input_shape=(1, 28, 28))

    Args:
        classifier: becomes a part of the model, not a copy of it.
        input_shape: of one input, whose numbers lie in [0, 1].
        latent: length of a latent vector. hidden: units of each hidden layer of the encoder; the decoder mirrors them.
        seed: of the generator's initialisation.

    Raises:
        ConfigError: naming the argument.
    """
    if latent < 1:
        raise ConfigError.of("latent", latent, "whole numbers from 1")
    if any(units < 1 for units in hidden):
        raise ConfigError.of("hidden", hidden, "positive whole numbers")
    with _seeded(derive(seed, "generator")):  # not that of the classifier's own layers, which may have the same shapes
        return Generative(classifier, tuple(input_shape), latent, hidden)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Initialise modules on the CPU from a seed, and leave the caller's generators as they are."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # not torch.manual_seed, which would also reseed every accelerator of the caller
        torch.default_generator.manual_seed(seed)
        yield


def _body(config: ModelConfig, input_shape: tuple[int, ...]) -> tuple[nn.Module, int]:
    """Body and the length of its features."""
    if config.name in ("mlp", "generative"):
        return _mlp_body(config, math.prod(input_shape))
    if len(input_shape) != 3 or min(input_shape[1:]) < 4:
        raise ConfigError.of("input_shape", input_shape, f"(channels, height, width) from 4 x 4 on for {config.name}")
    return (_cnn_body if config.name == "cnn" else _resnet_body)(config, input_shape[0])


def _mlp_body(config: ModelConfig, inputs: int) -> tuple[nn.Module, int]:
    sizes = (inputs, *config.hidden)
    return nn.Sequential(nn.Flatten(), *_layers(sizes, ACTIVATIONS[config.activation])), sizes[-1]


def _layers(sizes: tuple[int, ...], activation: type[nn.Module] = nn.ReLU) -> list[nn.Module]:
    """Fully connected layers between these sizes, each with its activation."""
    return [part for before, after in pairwise(sizes) for part in (nn.Linear(before, after), activation())]


def _cnn_body(config: ModelConfig, channels: int) -> tuple[nn.Module, int]:
    sizes = (channels, config.width // 2, config.width, 2 * config.width)
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Conv2d(before, after, 3, padding=1), _norm(config.norm, after)]
        layers += [ACTIVATIONS[config.activation](), nn.MaxPool2d(2)]
    return nn.Sequential(*layers[:-1], _MeanOverPositions()), sizes[-1]


def _resnet_body(config: ModelConfig, channels: int) -> tuple[nn.Module, int]:
    sizes = [config.width * 2**stage for stage in range(4)]
    stem = nn.Conv2d(channels, sizes[0], 3, padding=1, bias=config.norm == "none")
    layers = [stem, _norm(config.norm, sizes[0]), nn.ReLU()]
    for stage, (before, after) in enumerate(pairwise([sizes[0], *sizes])):
        layers += [
            _Block(before, after, 1 if stage == 0 else 2, config.norm),
            _Block(after, after, 1, config.norm),
        ]
    return nn.Sequential(*layers, _MeanOverPositions()), sizes[-1]


def _norm(kind: Norm, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(math.gcd(LARGEST_GROUP_COUNT, channels), channels)
    return nn.Identity()


class _MeanOverPositions(nn.Module):
    """(n, channels, height, width) to (n, channels). Adaptive pooling would not run on every device."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(-2, -1))


class _Block(nn.Module):
    """Residual block: relu(norm(conv(relu(norm(conv(x))))) + shortcut(x))."""

    def __init__(self, before: int, after: int, stride: int, norm: Norm) -> None:
        super().__init__()
        bias = norm == "none"  # a normalisation brings its own
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=bias)
        self.norm1 = _norm(norm, after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=bias)
        self.norm2 = _norm(norm, after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            projection = nn.Conv2d(before, after, 1, stride=stride, bias=bias)
            self.shortcut = nn.Sequential(projection, _norm(norm, after))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))
