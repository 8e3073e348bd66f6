"""MNIST from its published IDX files."""

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from perdure.data.datasets.base import (
    Dataset,
    bytes_to_unit,
    data_root,
    download_failed,
    file_bytes,
    from_published_split,
)
from perdure.errors import DataError
from perdure.utils.checked_arguments import checked_arguments

MNIST_FILES = {"train": "train", "test": "t10k"}
MNIST_TRAIN_IMAGES_MD5 = "6bbc9ace898e44ae57da46a324031adb"
MNIST_TRAIN_IMAGES_BYTES = 16 + 60_000 * 28 * 28

UNSIGNED_BYTE = 0x08


@checked_arguments
def mnist(root: str | Path | None = None, *, declared_size: int | None = None) -> Dataset:
    """70,000 handwritten digits, inputs (1, 28, 28) in [0, 1].

    Reads the IDX files in ROOT/MNIST/raw, gzipped or not. If the files are missing, torchvision
    downloads them.

    Args:
        root: data root; see `perdure.data.datasets.base`.
        declared_size: public number of training records; None for the actual number.

    Raises:
        DataError: if the files are missing and cannot be downloaded, or are damaged.

    Source: LeCun, Bottou, Bengio, Haffner 1998, "Gradient-based learning applied to document
    recognition".
    """
    base = data_root(root)
    folder = base / "MNIST" / "raw"
    if not all(_mnist_file(folder, stem, kind) for stem in MNIST_FILES.values() for kind in (3, 1)):
        _download_mnist(base)
    train, test = (_mnist_part(folder, stem) for stem in MNIST_FILES.values())
    return from_published_split(
        "mnist",
        train,
        test,
        num_classes=10,
        declared_size=declared_size,
        value_range=(0.0, 1.0),
        size_published=True,
    )


def _mnist_file(folder: Path, stem: str, dimensions: int) -> Path | None:
    """Path of an MNIST file without .gz, if the file or its gzipped form exists; None if not."""
    path = folder / f"{stem}-{'images' if dimensions == 3 else 'labels'}-idx{dimensions}-ubyte"
    return path if path.is_file() or path.with_name(path.name + ".gz").is_file() else None


def _mnist_part(folder: Path, stem: str) -> tuple[Tensor, Tensor]:
    images_path, labels_path = (
        folder / f"{stem}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")
    )
    content = file_bytes(images_path)
    published_size = stem == "train" and len(content) == MNIST_TRAIN_IMAGES_BYTES
    if (
        published_size
        and hashlib.md5(content, usedforsecurity=False).hexdigest() != MNIST_TRAIN_IMAGES_MD5
    ):
        raise DataError(
            f"{images_path} does not have the published MD5 {MNIST_TRAIN_IMAGES_MD5}; download it "
            "again"
        )
    images = parse_idx(content, str(images_path))
    labels = parse_idx(file_bytes(labels_path), str(labels_path))
    if images.dim() != 3 or labels.dim() != 1:
        raise DataError(
            f"{folder} has {stem} images of shape {tuple(images.shape)}; allowed: (n, 28, 28)"
        )
    return bytes_to_unit(images.unsqueeze(1)), labels.long()


def _download_mnist(base: Path) -> None:
    """Download MNIST into the data root with torchvision."""
    from torchvision.datasets import MNIST

    try:
        MNIST(str(base), download=True)
    except (OSError, RuntimeError) as error:
        raise download_failed(
            base / "MNIST" / "raw", "MNIST", "put the four IDX files there", error
        ) from error


def parse_idx(content: bytes, source: str) -> Tensor:
    """Parse an array of unsigned bytes in the IDX format.

    Layout: two zero bytes, the element type, the number of dimensions; each dimension as a
    big-endian 32-bit integer; then the elements, last dimension fastest.

    Args:
        content: the whole file, unzipped.
        source: name of the file, for the error message.

    Returns:
        uint8 tensor with the dimensions in the header.

    Raises:
        DataError: if the magic number or the length is wrong.

    Source: LeCun, Cortes, Burges, "The MNIST database of handwritten digits", file formats.
    """
    if len(content) < 4 or content[:3] != bytes([0, 0, UNSIGNED_BYTE]):
        raise DataError(
            f"{source} is not an IDX file of bytes (it starts with {content[:4].hex()}); download "
            "it again"
        )
    header = 4 + 4 * content[3]
    shape = [int.from_bytes(content[start : start + 4], "big") for start in range(4, header, 4)]
    if len(content) - header != math.prod(shape):
        raise DataError(
            f"{source} holds {len(content)} bytes, but its header promises {header} + {shape}; "
            "download it again"
        )
    body = np.frombuffer(content[header:], dtype=np.uint8)
    return torch.from_numpy(body.reshape(shape).copy())
