"""Find a data set by its name."""

from pathlib import Path

from perdure.data.datasets.adult import adult
from perdure.data.datasets.base import Dataset
from perdure.data.datasets.cifar10 import cifar10
from perdure.data.datasets.embedded import breast_cancer, digits
from perdure.data.datasets.mnist import mnist
from perdure.errors import ConfigError

NAMES = ("digits", "breast-cancer", "mnist", "cifar10", "adult")


def load(name: str, root: str | Path | None = None, seed: int = 0) -> Dataset:
    """Load a data set by name.

    Args:
        name: digits, breast-cancer, mnist, cifar10 or adult.
        root: data root, for the last three; see `perdure.data.datasets.base`.
        seed: of the split into training and test part, for the first two.

    Raises:
        ConfigError: for another name.
        DataError: for files that are missing or damaged.

    >>> load("digits").input_shape
    (1, 8, 8)
    """
    match name:
        case "digits":
            return digits(seed=seed)
        case "breast-cancer":
            return breast_cancer(seed=seed)
        case "mnist":
            return mnist(root)
        case "cifar10":
            return cifar10(root)
        case "adult":
            return adult(root)
    raise ConfigError.of("dataset", name, NAMES)
