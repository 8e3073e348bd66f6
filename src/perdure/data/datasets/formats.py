"""Readers of published files, bytes in and tensors out: IDX, CIFAR-10 (binary or zipped JPEG), UCI Adult."""

import csv
import gzip
import hashlib
import math
import zipfile
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from perdure.errors import DataError

UNSIGNED_BYTE = 0x08
CIFAR_RECORD_BYTES = 1 + 3 * 32 * 32
CIFAR_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip

ADULT_NUMERIC: dict[int, tuple[str, float, float]] = {
    0: ("age", 0, 100),
    2: ("fnlwgt", 0, 1_500_000),
    4: ("education-num", 1, 16),
    10: ("capital-gain", 0, 99_999),
    11: ("capital-loss", 0, 4_500),
    12: ("hours-per-week", 0, 100),
}
"""Column to name and declared public range. The ranges are round numbers, not extremes of the records."""

ADULT_CATEGORIES: dict[int, tuple[str, ...]] = {
    1: ("Private", "Self-emp-not-inc", "Self-emp-inc", "Federal-gov", "Local-gov", "State-gov",
        "Without-pay", "Never-worked"),
    3: ("Bachelors", "Some-college", "11th", "HS-grad", "Prof-school", "Assoc-acdm", "Assoc-voc", "9th",
        "7th-8th", "12th", "Masters", "1st-4th", "10th", "Doctorate", "5th-6th", "Preschool"),
    5: ("Married-civ-spouse", "Divorced", "Never-married", "Separated", "Widowed", "Married-spouse-absent",
        "Married-AF-spouse"),
    6: ("Tech-support", "Craft-repair", "Other-service", "Sales", "Exec-managerial", "Prof-specialty",
        "Handlers-cleaners", "Machine-op-inspct", "Adm-clerical", "Farming-fishing", "Transport-moving",
        "Priv-house-serv", "Protective-serv", "Armed-Forces"),
    7: ("Wife", "Own-child", "Husband", "Not-in-family", "Other-relative", "Unmarried"),
    8: ("White", "Asian-Pac-Islander", "Amer-Indian-Eskimo", "Other", "Black"),
    9: ("Female", "Male"),
    13: ("United-States", "Cambodia", "England", "Puerto-Rico", "Canada", "Germany",
         "Outlying-US(Guam-USVI-etc)", "India", "Japan", "Greece", "South", "China", "Cuba", "Iran",
         "Honduras", "Philippines", "Italy", "Poland", "Jamaica", "Vietnam", "Mexico", "Portugal", "Ireland",
         "France", "Dominican-Republic", "Laos", "Ecuador", "Taiwan", "Haiti", "Columbia", "Hungary",
         "Guatemala", "Nicaragua", "Scotland", "Thailand", "Yugoslavia", "El-Salvador", "Trinadad&Tobago",
         "Peru", "Hong", "Holand-Netherlands"),
}  # fmt: skip
"""Column to the categories that the data set's own documentation lists (spelt as there)."""

ADULT_COLUMNS = 15
ADULT_FEATURES = len(ADULT_NUMERIC) + sum(map(len, ADULT_CATEGORIES.values()))


def file_bytes(path: Path) -> bytes:
    """Content of `path`, or of `path` with .gz appended, unzipped.

    Raises:
        DataError: when neither can be read.
    """
    zipped = path.with_name(path.name + ".gz")
    try:
        return path.read_bytes() if path.exists() else gzip.decompress(zipped.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} (or .gz) cannot be read: {error}; put a complete copy there") from error


def parse_idx(content: bytes, source: str) -> Tensor:
    """Array of unsigned bytes in the IDX format.

    Layout: two zero bytes, the element type, the number of dimensions; each dimension as a big-endian 32-bit
    integer; then the elements, last dimension fastest.

    Args:
        content: the whole file, unzipped.
        source: its name, for the error message.

    Returns:
        uint8 tensor of the dimensions in the header.

    Raises:
        DataError: when the magic number or the length is wrong.

    Source: LeCun, Cortes, Burges, "The MNIST database of handwritten digits", file formats.
    """
    if len(content) < 4 or content[:3] != bytes([0, 0, UNSIGNED_BYTE]):
        raise DataError(f"{source} is not an IDX file of bytes (it starts {content[:4].hex()}); get it again")
    header = 4 + 4 * content[3]
    shape = [int.from_bytes(content[start : start + 4], "big") for start in range(4, header, 4)]
    if len(content) - header != math.prod(shape):
        raise DataError(f"{source} holds {len(content)} bytes, not the {header} + {shape} of its head; get it again")
    body = np.frombuffer(content[header:], dtype=np.uint8)
    return torch.from_numpy(body.reshape(shape).copy())


def read_cifar_binary(paths: list[Path]) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) int64 of files in CIFAR-10's binary version.

    Each record is one label byte and 3072 pixel bytes, red then green then blue, row by row.

    Raises:
        DataError: when a file is not a whole number of records.

    Source: Krizhevsky 2009, "Learning multiple layers of features from tiny images"; binary version.
    """
    content = [(path, file_bytes(path)) for path in paths]
    for path, data in content:
        if not data or len(data) % CIFAR_RECORD_BYTES:
            raise DataError(f"{path} has {len(data)} bytes, no multiple of {CIFAR_RECORD_BYTES}; get it again")
    joined = np.frombuffer(b"".join(data for _, data in content), dtype=np.uint8)
    rows = torch.from_numpy(joined.reshape(-1, CIFAR_RECORD_BYTES).copy())
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].long()


def read_image_zip(archive: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) uint8 and labels (n,) int64 of PART/CLASS/NAME.jpg, in the order of the names.

    A label is the place of its class in alphabetical order, which is CIFAR-10's own order.

    Raises:
        DataError: when the archive is damaged, has no images of `part`, or one of an unknown class or size.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            names = sorted(n for n in opened.namelist() if n.startswith(f"{part}/") and n.endswith(".jpg"))
            images = [_decode(opened.read(name), f"{archive}:{name}") for name in names]
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{archive} cannot be read: {error}; get it again") from error
    if not images:
        raise DataError(f"{archive} holds no {part}/CLASS/NAME.jpg; expected the classes {CIFAR_CLASSES}")
    return torch.stack(images), torch.tensor([_class_of(name, archive) for name in names])


def zip_digest(archive: Path) -> str:
    """Short digest of an archive's names and check sums: the same for the same content, read without it."""
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = [f"{entry.filename} {entry.CRC}" for entry in opened.infolist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{archive} cannot be read: {error}; get it again") from error
    return hashlib.sha256("\n".join(entries).encode()).hexdigest()[:16]


def _decode(content: bytes, source: str) -> Tensor:
    from PIL import Image, UnidentifiedImageError

    try:
        pixels = np.array(Image.open(BytesIO(content)).convert("RGB"))
    except UnidentifiedImageError as error:
        raise DataError(f"{source} is not an image; get the archive again") from error
    if pixels.shape != (32, 32, 3):
        raise DataError(f"{source} has shape {pixels.shape}; allowed: (32, 32, 3)")
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _class_of(name: str, archive: Path) -> int:
    folder = name.split("/")[1]
    if folder not in CIFAR_CLASSES:
        raise DataError(f"{archive} has a class {folder!r}; allowed: {', '.join(CIFAR_CLASSES)}")
    return CIFAR_CLASSES.index(folder)


def read_adult(path: Path) -> tuple[Tensor, Tensor]:
    """Features (n, 105) float32 in [0, 1] and labels (n,) int64 of one file of the UCI Adult table.

    Numeric columns come first, each clamped to its declared range and scaled by it; then one indicator per
    listed category. A missing category ("?") has no indicator set. The label is 1 for an income above 50K.

    Raises:
        DataError: with the line number, when a row has other columns, numbers or categories than documented.

    Source: Becker and Kohavi 1996, "Adult", UCI Machine Learning Repository.
    """
    rows = [_adult_row(row, f"{path}, line {line}") for line, row in _adult_lines(path)]
    if not rows:
        raise DataError(f"{path} holds no records; get it again")
    return torch.tensor([row for row, _ in rows]), torch.tensor([label for _, label in rows])


def _adult_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows with line numbers, without blank lines, header, or the remark on top of the original test file."""
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            for number, row in enumerate(csv.reader(lines, skipinitialspace=True), start=1):
                if row and row[0] != "age" and not row[0].startswith("|"):
                    yield number, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}; put a complete copy there") from error


def _adult_row(row: list[str], source: str) -> tuple[list[float], int]:
    if len(row) != ADULT_COLUMNS:
        raise DataError(f"{source} has {len(row)} columns; allowed: {ADULT_COLUMNS}")
    features = [_scaled(row[column], bounds, source) for column, bounds in ADULT_NUMERIC.items()]
    for column, categories in ADULT_CATEGORIES.items():
        features += _indicators(row[column], categories, source)
    income = row[-1].rstrip(".")
    if income not in ("<=50K", ">50K"):
        raise DataError(f"{source} has income {row[-1]!r}; allowed: <=50K, >50K")
    return features, int(income == ">50K")


def _scaled(text: str, bounds: tuple[str, float, float], source: str) -> float:
    name, low, high = bounds
    try:
        return min(max((float(text) - low) / (high - low), 0.0), 1.0)
    except ValueError as error:
        raise DataError(f"{source} has {name} = {text!r}; allowed: a number") from error


def _indicators(text: str, categories: tuple[str, ...], source: str) -> list[float]:
    if text != "?" and text not in categories:
        raise DataError(f"{source} has an unknown category {text!r}; allowed: ?, {', '.join(categories)}")
    return [float(text == category) for category in categories]
