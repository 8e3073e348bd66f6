"""Digits, small images that come with scikit-learn."""

from functools import cache

import torch
from torch import Tensor

from perdure.data.datasets.base import Dataset, from_stratified_split
from perdure.utils.checked_arguments import checked_arguments


@checked_arguments
def digits(*, seed: int = 0, test_share: float = 0.3, declared_size: int | None = None) -> Dataset:
    """1,797 handwritten digits of 8 x 8 pixels, inputs (1, 8, 8) in [0, 1]; part of scikit-learn.

    Args:
        seed: seed of the stratified split.
        test_share: share of each class in the test part.
        declared_size: public number of training records; None for the actual number.

    Raises:
        ConfigError: if `test_share` is not between 0 and 1.

    Source: Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits", UCI.
    """
    pixels, classes = _table()
    # each data set has tensors of its own
    images = pixels.float().div(16).unsqueeze(1)
    labels = classes.clone()
    return from_stratified_split(
        "digits",
        images,
        labels,
        seed=seed,
        test_share=test_share,
        declared_size=declared_size,
        value_range=(0.0, 1.0),
        size_published=True,
    )


@cache
def _table() -> tuple[Tensor, Tensor]:
    """Read pixels (1797, 8, 8) from 0 to 16 and classes (1797,); parsing their text takes long."""
    from sklearn.datasets import load_digits

    table = load_digits()
    return torch.from_numpy(table.images), torch.from_numpy(table.target).long()
