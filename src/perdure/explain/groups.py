"""Groups of features that are explained together: superpixels, one-hot groups, tokens.

A group is a number; the groups of a batch are one tensor in the shape of one instance.
"""

import typing
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.utils.extras import imported

Segmentation = Literal["slic", "watershed"]
SEGMENTATIONS: tuple[Segmentation, ...] = typing.get_args(Segmentation)
"""Methods of scikit-image that cut an image into superpixels."""


def grid_groups(shape: Sequence[int], cells: int) -> Tensor:
    """Cut images into a grid of square cells; a pixel's channels are in one group.

    Args:
        shape: (..., height, width) of one image.
        cells: number of cells along each side.

    Returns:
        Groups in the given shape, from 0 to cells^2 - 1, row by row.

    Raises:
        ConfigError: if there are more cells than pixels along a side.

    >>> grid_groups((2, 4), 2)
    tensor([[0, 0, 1, 1],
            [2, 2, 3, 3]])
    """
    sides = tuple(shape)[-2:]
    if len(sides) < 2:
        raise ConfigError.of("shape", tuple(shape), "(..., height, width), the shape of one image")
    if not 1 <= cells <= min(sides):
        raise ConfigError.of("cells", cells, f"1 to {min(sides)}, cells along a side of the image")
    rows, columns = (torch.arange(side) * cells // side for side in sides)
    return (rows[:, None] * cells + columns).expand(tuple(shape)).clone()


def column_groups(sizes: Sequence[int]) -> Tensor:
    """Group neighbouring columns of a table, such as the columns of one one-hot code.

    Args:
        sizes: number of columns of each group, from left to right; 1 for a single number.

    Returns:
        Groups (n,) of the n columns, from 0 on.

    Raises:
        ConfigError: if a group has no columns.

    >>> column_groups([1, 3, 2])
    tensor([0, 1, 1, 1, 2, 2])
    """
    if not sizes or min(sizes) < 1:
        raise ConfigError.of("sizes", list(sizes), "the number of columns of each group, 1 or more")
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(list(sizes)))


def token_groups(shape: Sequence[int]) -> Tensor:
    """Group the numbers of each token of a sequence.

    Args:
        shape: (length,) of token numbers, or (length, ...) of embeddings.

    >>> token_groups((2, 3))
    tensor([[0, 0, 0],
            [1, 1, 1]])
    """
    length, *rest = shape
    return torch.arange(length).view(-1, *(1 for _ in rest)).expand(tuple(shape)).clone()


def segment_groups(image: Tensor, count: int, *, method: Segmentation = "slic") -> Tensor:
    """Cut one image into about `count` superpixels of similar colour, by scikit-image.

    Args:
        image: (height, width) or (channels, height, width) floats.
        count: wanted number of superpixels; their number may differ.
        method: "slic" clusters colours and places; "watershed" floods the edges of the mean channel
            from a grid of seeds.

    Returns:
        Groups in the shape of the image, from 0 on.

    Raises:
        ConfigError: if an argument is not allowed, or scikit-image is not installed.

    Source: Achanta et al. 2012, "SLIC superpixels compared to state-of-the-art methods";
    Neubert and Protzel 2014, "Compact watershed and preemptive SLIC".
    """
    if method not in SEGMENTATIONS:
        raise ConfigError.of("method", method, SEGMENTATIONS)
    if image.ndim not in (2, 3):
        raise ConfigError.of(
            "image.shape", tuple(image.shape), "(height, width) or (channels, height, width)"
        )
    pixels = image.shape[-1] * image.shape[-2]
    if not 1 <= count <= pixels:
        raise ConfigError.of("count", count, f"1 to {pixels}, the pixels of the image")
    segmentation = imported("skimage.segmentation", "explain", "segment_groups")
    colours = image.detach().cpu().double()
    if method == "slic":
        axis = None if image.ndim == 2 else 0
        found = segmentation.slic(colours.numpy(), n_segments=count, channel_axis=axis)
    else:
        filters = imported("skimage.filters", "explain", "segment_groups")
        edges = filters.sobel((colours if image.ndim == 2 else colours.mean(0)).numpy())
        found = segmentation.watershed(edges, markers=count, compactness=0.001)
    groups: Tensor = torch.unique(torch.as_tensor(found), return_inverse=True)[1]
    return groups.expand(image.shape).clone()
