"""Bodies of the built-in classifiers: multilayer perceptron, small CNN and ResNet-18."""

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
    return nn.Sequential(
        nn.Flatten(), *fully_connected(sizes, ACTIVATIONS[config.activation])
    ), sizes[-1]


def fully_connected(
    sizes: tuple[int, ...], activation: type[nn.Module] = nn.ReLU
) -> list[nn.Module]:
    """Make fully connected layers with these widths, each followed by its activation."""
    return [
        part
        for before, after in pairwise(sizes)
        for part in (nn.Linear(before, after), activation())
    ]


def cnn_body(config: ModelConfig, channels: int) -> tuple[nn.Module, int]:
    """Make three convolutions with pooling; return them with the length of the features."""
    sizes = (channels, config.width // 2, config.width, 2 * config.width)
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Conv2d(before, after, 3, padding=1), _norm(config.norm, after)]
        layers += [ACTIVATIONS[config.activation](), nn.MaxPool2d(2)]
    return nn.Sequential(*layers[:-1], _MeanOverPositions()), sizes[-1]


def resnet_body(config: ModelConfig, channels: int) -> tuple[nn.Module, int]:
    """Make a ResNet-18 up to the mean over positions; return it with the length of the features."""
    sizes = [config.width * 2**stage for stage in range(4)]
    stem = nn.Conv2d(channels, sizes[0], 3, padding=1, bias=config.norm == "none")
    layers = [stem, _norm(config.norm, sizes[0]), nn.ReLU()]
    for stage, (before, after) in enumerate(pairwise([sizes[0], *sizes])):
        layers += [
            _Block(before, after, 1 if stage == 0 else 2, config.norm),
            _Block(after, after, 1, config.norm),
        ]
    return nn.Sequential(*layers, _MeanOverPositions()), sizes[-1]


def _norm(kind: Normalisation, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(math.gcd(LARGEST_GROUP_COUNT, channels), channels)
    return nn.Identity()


class _MeanOverPositions(nn.Module):
    """Mean over positions, from (n, channels, height, width) to (n, channels).

    Adaptive pooling does not run on every device.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(-2, -1))


class _Block(nn.Module):
    """Residual block: relu(norm(conv(relu(norm(conv(x))))) + shortcut(x))."""

    def __init__(self, before: int, after: int, stride: int, norm: Normalisation) -> None:
        super().__init__()
        bias = norm == "none"  # a normalisation has its own bias
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
