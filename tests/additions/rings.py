"""Rings, points of the plane on concentric circles."""

import math

import torch

from perdure.data.datasets.base import Dataset, from_stratified_split


def rings(*, seed: int = 0, test_share: float = 0.3) -> Dataset:
    """400 points on four circles, inputs (2,) in [0, 1], the label is the circle; made, not read.

    Args:
        seed: of the points and of the stratified split.
        test_share: share of each class that goes to the test part.

    Raises:
        ConfigError: when `test_share` is not between 0 and 1.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(4).repeat(100)
    angles = 2 * math.pi * torch.rand(len(labels), generator=generator)
    radii = (labels + 1) / 10
    points = 0.5 + radii[:, None] * torch.stack([angles.cos(), angles.sin()], 1)
    return from_stratified_split("rings", points, labels, seed=seed, test_share=test_share)
