"""CIFAR-10 from its published binary files, or from an archive of JPEG images."""

import hashlib
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from perdure.data.datasets.base import (
    Dataset,
    bytes_to_unit,
    cache_folder,
    data_root,
    download_failed,
    file_bytes,
    from_published_split,
    load_or_make,
)
from perdure.errors import DataError
from perdure.utils.checked_arguments import checked_arguments

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_FILES = {
    "train": tuple(f"data_batch_{k}.bin" for k in range(1, 6)),
    "test": ("test_batch.bin",),
}
CIFAR_PIXEL_BYTES = 3 * 32 * 32
CIFAR_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


@checked_arguments
def cifar10(root: str | Path | None = None, *, declared_size: int | None = None) -> Dataset:
    """60,000 colour images of ten classes, inputs (3, 32, 32) in [0, 1], not normalised.

    The files are searched in this order: ROOT/cifar-10-batches-bin (the binary version; the pickled
    version is never opened); ROOT/cifar10-jpeg.zip (train|test/CLASS/NAME.jpg, decoded once and
    cached; JPEG changes pixels a little, so compare results on the same files only); a download of
    the binary version.

    Args:
        root: data root; see `perdure.data.datasets.base`.
        declared_size: public number of training records; None for the actual number.

    Raises:
        DataError: if the files are missing and cannot be downloaded, or are damaged.

    Source: Krizhevsky 2009, "Learning multiple layers of features from tiny images".
    """
    base = data_root(root)
    folder = base / "cifar-10-batches-bin"
    archive = base / "cifar10-jpeg.zip"
    if not folder.is_dir() and archive.is_file():
        return _cifar10_from_zip(archive, declared_size)
    if not folder.is_dir():
        _download_cifar10(base)
    parts = [
        read_cifar_binary([folder / name for name in names]) for names in CIFAR10_FILES.values()
    ]
    train, test = ((bytes_to_unit(images), labels) for images, labels in parts)
    return _unit_images(train, test, declared_size)


def _download_cifar10(base: Path) -> None:
    """Download the binary version of CIFAR-10 into the data root with torchvision."""
    from torchvision.datasets.utils import download_and_extract_archive

    try:
        base.mkdir(parents=True, exist_ok=True)
        download_and_extract_archive(CIFAR10_URL, str(base), md5=CIFAR10_MD5)
    except (OSError, RuntimeError) as error:
        hint = f"unpack {CIFAR10_URL} or put cifar10-jpeg.zip there"
        raise download_failed(base, "CIFAR-10", hint, error) from error


def _cifar10_from_zip(archive: Path, declared_size: int | None) -> Dataset:
    cached = cache_folder() / f"cifar10-jpeg-{zip_digest(archive)}.safetensors"
    tensors = load_or_make(cached, lambda: _decoded(archive))
    train, test = (
        (bytes_to_unit(tensors[f"{part}.images"]), tensors[f"{part}.labels"])
        for part in CIFAR10_FILES
    )
    return _unit_images(train, test, declared_size)


def _unit_images(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], declared_size: int | None
) -> Dataset:
    return from_published_split(
        "cifar10",
        train,
        test,
        num_classes=10,
        declared_size=declared_size,
        value_range=(0.0, 1.0),
        size_published=True,
    )


def _decoded(archive: Path) -> dict[str, Tensor]:
    tensors = {}
    for part in CIFAR10_FILES:
        tensors[f"{part}.images"], tensors[f"{part}.labels"] = read_image_zip(archive, part)
    return tensors


def read_cifar_binary(paths: list[Path], *, label_bytes: int = 1) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) int64 of files in the binary version of CIFAR.

    Each record is the label bytes and 3072 pixel bytes, red then green then blue, row by row.

    Args:
        paths: paths of the files.
        label_bytes: number of label bytes, of which the last one is the class.

    Raises:
        DataError: if a file is not a whole number of records.

    Source: Krizhevsky 2009, "Learning multiple layers of features from tiny images"; binary
    version.
    """
    size = label_bytes + CIFAR_PIXEL_BYTES
    content = [(path, file_bytes(path)) for path in paths]
    for path, data in content:
        if not data or len(data) % size:
            raise DataError(
                f"{path} has {len(data)} bytes, which is not a multiple of {size}; download it "
                "again"
            )
    joined = np.frombuffer(b"".join(data for _, data in content), dtype=np.uint8)
    rows = torch.from_numpy(joined.reshape(-1, size).copy())
    return rows[:, label_bytes:].reshape(-1, 3, 32, 32), rows[:, label_bytes - 1].long()


def read_image_zip(archive: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) int64 of the files PART/CLASS/NAME.jpg.

    The images are in the order of their names.

    A label is the index of the class in alphabetical order, which is the order of CIFAR-10.

    Raises:
        DataError: if the archive is damaged, has no images of `part`, or has an image of an unknown
            class or size.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            names = sorted(
                n for n in opened.namelist() if n.startswith(f"{part}/") and n.endswith(".jpg")
            )
            images = [_decode(opened.read(name), f"{archive}:{name}") for name in names]
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{archive} cannot be read: {error}; download it again") from error
    if not images:
        raise DataError(
            f"{archive} has no file {part}/CLASS/NAME.jpg; expected the classes {CIFAR_CLASSES}"
        )
    return torch.stack(images), torch.tensor([_class_of(name, archive) for name in names])


def zip_digest(archive: Path) -> str:
    """Short digest of an archive's file names and check sums.

    Archives with equal content have equal digests; the content itself is not read.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = [f"{entry.filename} {entry.CRC}" for entry in opened.infolist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{archive} cannot be read: {error}; download it again") from error
    return hashlib.sha256("\n".join(entries).encode()).hexdigest()[:16]


def _decode(content: bytes, source: str) -> Tensor:
    from PIL import Image, UnidentifiedImageError

    try:
        pixels = np.array(Image.open(BytesIO(content)).convert("RGB"))
    except UnidentifiedImageError as error:
        raise DataError(f"{source} is not an image; download the archive again") from error
    if pixels.shape != (32, 32, 3):
        raise DataError(f"{source} has shape {pixels.shape}; allowed: (32, 32, 3)")
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _class_of(name: str, archive: Path) -> int:
    folder = name.split("/")[1]
    if folder not in CIFAR_CLASSES:
        raise DataError(f"{archive} has a class {folder!r}; allowed: {', '.join(CIFAR_CLASSES)}")
    return CIFAR_CLASSES.index(folder)
