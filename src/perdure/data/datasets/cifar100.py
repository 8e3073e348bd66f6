"""CIFAR-100 from its published binary files."""

from pathlib import Path

from perdure.data.datasets.base import Dataset, bytes_to_unit, data_root, from_published_split
from perdure.data.datasets.cifar10 import read_cifar_binary
from perdure.errors import DataError
from perdure.utils.checked_arguments import checked_arguments

CIFAR100_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
CIFAR100_FOLDER = "cifar-100-binary"
CIFAR100_FILES = {"train": "train.bin", "test": "test.bin"}
LABEL_BYTES = 2
"""Bytes before the pixels of a record: number of the superclass, number of the class."""


@checked_arguments
def cifar100(root: str | Path | None = None, *, declared_size: int | None = None) -> Dataset:
    """60,000 colour images of a hundred classes, inputs (3, 32, 32) in [0, 1], not normalised.

    Reads ROOT/cifar-100-binary/train.bin and test.bin, the binary version; the pickled version is
    never opened, and nothing is downloaded. Labels are the 100 fine classes.

    Args:
        root: data root; see `perdure.data.datasets.base`.
        declared_size: public number of training records; None for the actual number.

    Raises:
        DataError: if the files are missing or damaged.

    Source: Krizhevsky 2009, "Learning multiple layers of features from tiny images".
    """
    folder = data_root(root) / CIFAR100_FOLDER
    if not folder.is_dir():
        raise DataError(
            f"no CIFAR-100 in {folder}; unpack {CIFAR100_URL} there, or set PERDURE_DATA to the "
            f"folder that contains {CIFAR100_FOLDER}"
        )
    train, test = (
        read_cifar_binary([folder / name], label_bytes=LABEL_BYTES)
        for name in CIFAR100_FILES.values()
    )
    return from_published_split(
        "cifar100",
        (bytes_to_unit(train[0]), train[1]),
        (bytes_to_unit(test[0]), test[1]),
        num_classes=100,
        declared_size=declared_size,
        value_range=(0.0, 1.0),
        size_published=True,
    )
