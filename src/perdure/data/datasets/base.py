"""Data sets as resident tensors: two that need no download, and three read from a data root.

The data root is the argument, else the environment variable PERDURE_DATA, else the user's cache folder
(XDG_CACHE_HOME or ~/.cache, and perdure within it). Ids are indices into the published source: those of the
test part go on where those of the training part end, so that one id never names two records.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from perdure.data.datasets import formats
from perdure.data.records import Records
from perdure.errors import ConfigError, DataError
from perdure.utils.atomic_files import save_tensors

NAMES = ("digits", "breast-cancer", "mnist", "cifar10", "adult")

MNIST_FILES = {"train": "train", "test": "t10k"}
MNIST_TRAIN_IMAGES_MD5 = "6bbc9ace898e44ae57da46a324031adb"
MNIST_TRAIN_IMAGES_BYTES = 16 + 60_000 * 28 * 28
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_FILES = {"train": tuple(f"data_batch_{k}.bin" for k in range(1, 6)), "test": ("test_batch.bin",)}
ADULT_URL = "https://archive.ics.uci.edu/dataset/2/adult"


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Training and test records of one source, with what is public about them.

    Args:
        name: as in `load`.
        train: inputs (n, ...) float32, labels in 0 .. num_classes-1.
        test: the same for the test part. It is declared public.
        num_classes: how many classes there are, fixed in advance.
        input_shape: shape of one input: (channels, height, width) or (features,).
        public_facts: what was used of the data and is declared public, one sentence each.

    Raises:
        DataError: when records do not have that shape or those labels.
    """

    name: str
    train: Records
    test: Records
    num_classes: int
    input_shape: tuple[int, ...]
    public_facts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part, records in (("train", self.train), ("test", self.test)):
            shape, labels = tuple(records.inputs.shape[1:]), records.labels
            if shape != self.input_shape:
                raise DataError(f"{self.name} {part} inputs have shape {shape}; allowed: {self.input_shape}")
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
                raise DataError(f"{self.name} {part} labels leave the range 0 .. {self.num_classes - 1}")


def load(name: str, root: str | Path | None = None, seed: int = 0) -> Dataset:
    """Load a data set by name.

    Args:
        name: digits, breast-cancer, mnist, cifar10 or adult.
        root: data root, for the last three; see the head of this module.
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


def digits(*, seed: int = 0, test_share: float = 0.3) -> Dataset:
    """1,797 handwritten digits of 8 x 8 pixels, inputs (1, 8, 8) in [0, 1]; part of scikit-learn.

    Args:
        seed: of the stratified split.
        test_share: share of each class that goes to the test part.

    Raises:
        ConfigError: when `test_share` is not between 0 and 1.

    Source: Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits", UCI.
    """
    from sklearn.datasets import load_digits

    table = load_digits()
    images = torch.from_numpy(table.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(table.target).long()
    return _stratified("digits", images, labels, seed, test_share, facts=())


def breast_cancer(*, seed: int = 0, test_share: float = 0.3) -> Dataset:
    """569 tumours, 30 measurements each, malignant (0) or benign (1); part of scikit-learn.

    Guarantee: none for the scaling. Each column is standardised with its mean and standard deviation over the
    whole published table; these 60 numbers are *declared public*. For records of your own, declare such
    constants in advance or release them.

    Args:
        seed: of the stratified split.
        test_share: share of each class that goes to the test part.

    Raises:
        ConfigError: when `test_share` is not between 0 and 1.

    Source: Wolberg, Mangasarian, Street 1995, "Breast cancer Wisconsin (diagnostic)", UCI.
    """
    from sklearn.datasets import load_breast_cancer

    table = load_breast_cancer()
    columns = torch.from_numpy(table.data)
    scaled = (columns - columns.mean(0)) / columns.std(0, correction=0)
    fact = "columns are standardised with means and deviations of the whole published table, declared public"
    labels = torch.from_numpy(table.target).long()
    return _stratified("breast-cancer", scaled.float(), labels, seed, test_share, facts=(fact,))


def mnist(root: str | Path | None = None) -> Dataset:
    """70,000 handwritten digits, inputs (1, 28, 28) in [0, 1].

    Reads the IDX files in ROOT/MNIST/raw, gzipped or not. Where the files are missing, torchvision's
    downloader is tried.

    Raises:
        DataError: when the files are missing and cannot be downloaded, or are damaged.

    Source: LeCun, Bottou, Bengio, Haffner 1998, "Gradient-based learning applied to document recognition".
    """
    base = data_root(root)
    folder = base / "MNIST" / "raw"
    if not all(_mnist_file(folder, stem, kind) for stem in MNIST_FILES.values() for kind in (3, 1)):
        _download_mnist(base)
    parts = [_mnist_part(folder, stem) for stem in MNIST_FILES.values()]
    return _from_source("mnist", *parts, num_classes=10)


def cifar10(root: str | Path | None = None) -> Dataset:
    """60,000 colour images of ten classes, inputs (3, 32, 32) in [0, 1], not normalised.

    Looked for in this order: ROOT/cifar-10-batches-bin (the binary version; the pickled version is never
    opened), ROOT/cifar10-jpeg.zip (train|test/CLASS/NAME.jpg; JPEG moves pixels a little, so compare with
    figures on the same files only; decoded once and cached), a download of the binary version.

    Raises:
        DataError: when the files are missing and cannot be downloaded, or are damaged.

    Source: Krizhevsky 2009, "Learning multiple layers of features from tiny images".
    """
    base = data_root(root)
    folder, archive = base / "cifar-10-batches-bin", base / "cifar10-jpeg.zip"
    if not folder.is_dir() and archive.is_file():
        return _cifar10_from_zip(archive)
    if not folder.is_dir():
        _download_cifar10(base)
    parts = [formats.read_cifar_binary([folder / name for name in names]) for names in CIFAR10_FILES.values()]
    return _from_source("cifar10", *((_unit(images), labels) for images, labels in parts), num_classes=10)


def adult(root: str | Path | None = None) -> Dataset:
    """48,842 people of the 1994 census, inputs (105,) in [0, 1], label 1 for an income above 50K.

    Reads ROOT/adult/adult.data and adult.test. Categories are those of the data set's documentation and
    ranges are declared in advance, so that nothing is taken from the records.

    Raises:
        DataError: when a file is missing, or a row is not as documented.

    Source: Becker and Kohavi 1996, "Adult", UCI Machine Learning Repository.
    """
    folder = data_root(root) / "adult"
    if not all((folder / name).is_file() for name in ("adult.data", "adult.test")):
        raise DataError(f"no adult.data and adult.test in {folder}; get them from {ADULT_URL}")
    parts = [formats.read_adult(folder / name) for name in ("adult.data", "adult.test")]
    fact = "category lists and column ranges are declared in advance"
    return _from_source("adult", *parts, num_classes=2, facts=(fact,))


def cache_folder() -> Path:
    """Folder for what can be computed again: XDG_CACHE_HOME or ~/.cache, and perdure within it."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "perdure"


def data_root(root: str | Path | None = None) -> Path:
    """Where data sets are looked for: the argument, else PERDURE_DATA, else the user's cache folder."""
    chosen = root or os.environ.get("PERDURE_DATA")
    return Path(chosen) if chosen else cache_folder()


def _from_source(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    num_classes: int,
    facts: tuple[str, ...] = (),
) -> Dataset:
    """Build a data set whose source publishes its own split: test ids follow the training ids."""
    after = torch.arange(len(test[0])) + len(train[0])
    return Dataset(
        name=name,
        train=Records(inputs=train[0], labels=train[1], partition=name),
        test=Records(inputs=test[0], labels=test[1], ids=after, partition=f"{name}-test"),
        num_classes=num_classes,
        input_shape=tuple(train[0].shape[1:]),
        public_facts=facts,
    )


def _stratified(
    name: str, inputs: Tensor, labels: Tensor, seed: int, test_share: float, *, facts: tuple[str, ...]
) -> Dataset:
    """Build a data set by a seeded split that takes the same share of every class; ids index the source."""
    if not 0 < test_share < 1:
        raise ConfigError.of("test_share", test_share, "a number between 0 and 1, both excluded")
    generator = torch.Generator().manual_seed(seed)
    num_classes = int(labels.max()) + 1
    in_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(num_classes):
        rows = (labels == label).nonzero().squeeze(1)
        in_test[rows[torch.randperm(len(rows), generator=generator)[: round(test_share * len(rows))]]] = True
    source = Records(inputs=inputs, labels=labels, partition=name)
    test = source.take(in_test)
    return Dataset(
        name=name,
        train=source.take(~in_test),
        test=Records(inputs=test.inputs, labels=test.labels, ids=test.ids, partition=f"{name}-test"),
        num_classes=num_classes,
        input_shape=tuple(inputs.shape[1:]),
        public_facts=facts,
    )


def _unit(images: Tensor) -> Tensor:
    """Bytes to float32 in [0, 1]."""
    return images.float().div_(255)


def _mnist_file(folder: Path, stem: str, dimensions: int) -> Path | None:
    """Path of an MNIST file without .gz where it or its gzipped form exists, else None."""
    path = folder / f"{stem}-{'images' if dimensions == 3 else 'labels'}-idx{dimensions}-ubyte"
    return path if path.is_file() or path.with_name(path.name + ".gz").is_file() else None


def _mnist_part(folder: Path, stem: str) -> tuple[Tensor, Tensor]:
    images_path, labels_path = (folder / f"{stem}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))
    content = formats.file_bytes(images_path)
    published_size = stem == "train" and len(content) == MNIST_TRAIN_IMAGES_BYTES
    if published_size and hashlib.md5(content, usedforsecurity=False).hexdigest() != MNIST_TRAIN_IMAGES_MD5:
        raise DataError(f"{images_path} does not have the published MD5 {MNIST_TRAIN_IMAGES_MD5}; get it again")
    images = formats.parse_idx(content, str(images_path))
    labels = formats.parse_idx(formats.file_bytes(labels_path), str(labels_path))
    if images.dim() != 3 or labels.dim() != 1:
        raise DataError(f"{folder} has {stem} images of shape {tuple(images.shape)}; allowed: (n, 28, 28)")
    return _unit(images.unsqueeze(1)), labels.long()


def _download_mnist(base: Path) -> None:
    """Have torchvision fetch MNIST into the data root."""
    from torchvision.datasets import MNIST

    try:
        MNIST(str(base), download=True)
    except (OSError, RuntimeError) as error:
        raise _not_found(base / "MNIST" / "raw", "MNIST", "put the four IDX files there", error) from error


def _download_cifar10(base: Path) -> None:
    """Have torchvision fetch the binary version of CIFAR-10 into the data root."""
    from torchvision.datasets.utils import download_and_extract_archive

    try:
        base.mkdir(parents=True, exist_ok=True)
        download_and_extract_archive(CIFAR10_URL, str(base), md5=CIFAR10_MD5)
    except (OSError, RuntimeError) as error:
        hint = f"unpack {CIFAR10_URL} or put cifar10-jpeg.zip there"
        raise _not_found(base, "CIFAR-10", hint, error) from error


def _not_found(place: Path, name: str, hint: str, error: Exception) -> DataError:
    reason = (str(error).splitlines() or [type(error).__name__])[-1]
    return DataError(
        f"no {name} in {place} and the download failed ({reason}); {hint}, or set PERDURE_DATA to the folder "
        f"that holds it"
    )


def _cifar10_from_zip(archive: Path) -> Dataset:
    cached = cache_folder() / f"cifar10-jpeg-{formats.zip_digest(archive)}.safetensors"
    tensors = _cached(cached, lambda: _decoded(archive))
    parts = [(_unit(tensors[f"{part}.images"]), tensors[f"{part}.labels"]) for part in CIFAR10_FILES]
    return _from_source("cifar10", *parts, num_classes=10)


def _decoded(archive: Path) -> dict[str, Tensor]:
    tensors = {}
    for part in CIFAR10_FILES:
        tensors[f"{part}.images"], tensors[f"{part}.labels"] = formats.read_image_zip(archive, part)
    return tensors


def _cached(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors at `path`; where they are not there or not readable, make them and keep them if that works."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with contextlib.suppress(OSError, SafetensorError):
        return load_file(path)
    tensors = make()
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, never the data
        save_tensors(path, tensors)
    return tensors
