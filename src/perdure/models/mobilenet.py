"""MobileNet for small images: depthwise-separable convolutions, with few parameters and operations.

    block(x) = act(norm(pointwise(act(norm(depthwise(x))))))

A depthwise convolution (3 x 3) has one filter for each channel, and a pointwise one (1 x 1) mixes
channels. Together they have about 1/9 of the parameters of a 3 x 3 convolution. Differences from
the paper: a stem of stride 1, four blocks, and group normalisation, which uses one record at a
time, so that the model can be trained privately; depthwise convolutions have a clipping rule.

Source: Howard et al. 2017, "MobileNets: Efficient convolutional neural networks for mobile vision
applications", section 3.
"""

from torch import nn

from perdure.models.bodies import MeanOverPositions, dropout, norm_of_maps
from perdure.models.config import ACTIVATIONS, ModelConfig

BLOCKS = ((1, 2), (1, 1), (2, 2), (2, 1))
"""Output channels of each block, in units of the width, and its stride."""


def mobilenet_body(config: ModelConfig, channels: int) -> tuple[nn.Module, int]:
    """Make a small MobileNet up to the mean over positions.

    Args:
        config: configuration, of which activation, norm, width and dropout are used.
        channels: number of channels of an image.

    Returns:
        The body, and the length of its features.
    """
    before = config.width // 2
    layers = [*_convolved(config, channels, before, 3)]
    for factor, stride in BLOCKS:
        layers += _convolved(config, before, before, 3, stride=stride, groups=before)
        layers += _convolved(config, before, factor * config.width, 1)
        before = factor * config.width
    return nn.Sequential(*layers, MeanOverPositions(), *dropout(config)), before


def _convolved(
    config: ModelConfig, before: int, after: int, kernel: int, *, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """Make a convolution with its normalisation and activation."""
    kind = config.normalisation
    convolution = nn.Conv2d(
        before,
        after,
        kernel,
        stride=stride,
        padding=kernel // 2,
        groups=groups,
        bias=kind == "none",
    )
    return [convolution, norm_of_maps(kind, after), ACTIVATIONS[config.activation]()]
