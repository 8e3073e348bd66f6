"""Bodies of the built-in classifiers: multilayer perceptron, small CNN and ResNet-18.

Other files of models use their parts, too.
"""

import math
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from perdure.models.config import ACTIVATIONS, ModelConfig, Normalisation

LARGEST_GROUP_COUNT = 16
"""Most groups of a group normalisation, as in De et al. 2022.

The paper is "High-Accuracy Differentially Private Image Classification".
"""


def mlp_body(config: ModelConfig, inputs: int) -> tuple[nn.Module, int]:
    """Make a multilayer perceptron on flat inputs; return it with the length of its features."""
    sizes = (inputs, *config.hidden)
    kind = config.normalisation
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(sizes):
        # without options the parameters have the names and bits of a plain perceptron
        parts: list[nn.Module] = [nn.Linear(before, after)]
        parts += [] if kind == "none" else [norm_of_features(kind, after)]
        parts += [ACTIVATIONS[config.activation](), *dropout(config)]
        if config.skip and len(layers) > 1:
            shortcut = nn.Identity() if before == after else nn.Linear(before, after, bias=False)
            parts = [Residual(nn.Sequential(*parts), shortcut)]
        layers += parts
    return nn.Sequential(*layers), sizes[-1]


def fully_connected(sizes: tuple[int, ...]) -> list[nn.Module]:
    """Make fully connected layers with these widths, each followed by a ReLU."""
    return [
        part for before, after in pairwise(sizes) for part in (nn.Linear(before, after), nn.ReLU())
    ]


def cnn_body(config: ModelConfig, channels: int) -> tuple[nn.Module, int]:
    """Make convolutions with two poolings; return them with the length of the features."""
    widths = (config.width // 2, config.width, *[2 * config.width] * max(0, config.depth - 2))
    sizes = (channels, *widths[: config.depth])
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise(sizes)):
        parts = [nn.Conv2d(before, after, 3, padding=1), norm_of_maps(config.normalisation, after)]
        parts.append(ACTIVATIONS[config.activation]())
        if config.skip and number:
            shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1, bias=False)
            parts = [Residual(nn.Sequential(*parts), shortcut)]
        layers += parts
        if number < min(2, config.depth - 1):
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, MeanOverPositions(), *dropout(config)), sizes[-1]


def resnet_body(config: ModelConfig, channels: int) -> tuple[nn.Module, int]:
    """Make a ResNet-18 up to the mean over positions; return it with the length of the features."""
    sizes = [config.width * 2**stage for stage in range(4)]
    kind = config.normalisation
    stem = nn.Conv2d(channels, sizes[0], 3, padding=1, bias=kind == "none")
    layers = [stem, norm_of_maps(kind, sizes[0]), nn.ReLU()]
    for stage, (before, after) in enumerate(pairwise([sizes[0], *sizes])):
        layers += [
            _Block(before, after, 1 if stage == 0 else 2, kind),
            _Block(after, after, 1, kind),
        ]
    return nn.Sequential(*layers, MeanOverPositions(), *dropout(config)), sizes[-1]


def dropout(config: ModelConfig) -> list[nn.Module]:
    """Make the dropout layer of a model; none if no feature is dropped."""
    return [nn.Dropout(config.dropout)] if config.dropout else []


def norm_of_maps(kind: Normalisation, channels: int) -> nn.Module:
    """Make a normalisation of images (n, channels, height, width)."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(math.gcd(LARGEST_GROUP_COUNT, channels), channels)
    # one group is layer normalisation over channels and positions, for images of any size
    return nn.GroupNorm(1, channels) if kind == "layer" else nn.Identity()


def norm_of_features(kind: Normalisation, length: int) -> nn.Module:
    """Make a normalisation of feature vectors (n, length)."""
    if kind == "batch":
        return nn.BatchNorm1d(length)
    if kind == "group":
        # two numbers or more in each group, because one has no spread
        groups = 1 if length % 2 else math.gcd(LARGEST_GROUP_COUNT, length // 2)
        return nn.GroupNorm(groups, length)
    return nn.LayerNorm(length) if kind == "layer" else nn.Identity()


class Residual(nn.Module):
    """Layers with a connection around them: inner(x) + shortcut(x).

    Args:
        inner: layers of the main path.
        shortcut: identity, or a projection where widths differ.

    Source: He, Zhang, Ren, Sun 2016, "Deep residual learning", equations 1 and 2.
    """

    def __init__(self, inner: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both paths, in the shape of the layers' output (n, ...)."""
        total: Tensor = self.inner(x) + self.shortcut(x)
        return total


class MeanOverPositions(nn.Module):
    """Mean over positions, from (n, channels, height, width) to (n, channels).

    Adaptive pooling does not run on every device.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the means (n, channels)."""
        return x.mean(dim=(-2, -1))


class _Block(nn.Module):
    """Residual block: relu(norm(conv(relu(norm(conv(x))))) + shortcut(x))."""

    def __init__(self, before: int, after: int, stride: int, norm: Normalisation) -> None:
        super().__init__()
        bias = norm == "none"  # a normalisation has its own bias
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=bias)
        self.norm1 = norm_of_maps(norm, after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=bias)
        self.norm2 = norm_of_maps(norm, after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            projection = nn.Conv2d(before, after, 1, stride=stride, bias=bias)
            self.shortcut = nn.Sequential(projection, norm_of_maps(norm, after))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))
