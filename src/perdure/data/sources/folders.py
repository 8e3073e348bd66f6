"""Data sets from folders of images, with one sub-folder per class."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from perdure.data.datasets.base import Dataset
from perdure.data.sources.assembly import Part, Settings, dataset_of, share_of
from perdure.data.sources.ids import text_ids
from perdure.data.sources.inputs import Standardise, float_inputs
from perdure.errors import ConfigError, DataError
from perdure.utils.checked_arguments import checked_arguments

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Endings of the names of image files, in lower case."""
MODES = {1: "L", 3: "RGB"}


@checked_arguments
def from_folder(
    folder: str | Path,
    *,
    test: str | Path | float = 0.2,
    size: tuple[int, int] | None = None,
    channels: Literal[1, 3] = 3,
    classes: Sequence[str] | None = None,
    attributes: Mapping[str, Callable[[Path], float]] | None = None,
    standardise: Standardise | None = None,
    declared_size: int | None = None,
    seed: int = 0,
    name: str = "data",
) -> Dataset:
    """Build a data set from a folder of images, with one sub-folder for each class.

    Reads FOLDER/CLASS/.../IMAGE. Images become (channels, height, width) float32, bytes divided by
    255. The id of a record is a hash of its path inside the folder, so the id of an image does not
    depend on other images. Files whose ending is not that of an image are left out, and
    `Dataset.notes` says so.

    >>> from_folder("photos/train", test="photos/test", size=(64, 64))

    Guarantee: none for facts computed from the records, as in `from_arrays`. The test part is
    public.

    Args:
        folder: folder of the training images; if `test` is a share, folder of all images.
        test: folder of the test part; or the average share of images in the test part.
        size: (height, width) that every image is resized to, bilinear. Default: all images have
            one size.
        channels: 3 for colour, 1 for grey; images of the other kind are converted.
        classes: names of the sub-folders, their order gives the numbers. Default: all of them in
            alphabetical order.
        attributes: further facts of each image, such as "time", "domain" or "group": name to a
            function from its path inside the folder to a number.
        standardise: "declared" maps 0 .. 1 to -1 .. 1; (mean, deviation) are constants that you
            declare, one number or one for every channel; or a release, as in `from_arrays`.
            Default: no scaling.
        declared_size: public number of training records. Default: the number of images.
        seed: seed of the hash that draws the test part.
        name: name of the data set and of its partition. Other records, or other targets of the same
            records, need another name: a warm start compares names.

    Raises:
        ConfigError: if a setting is not allowed.
        DataError: if the folder has no classes or images, or if an image cannot be read or has
            another size (with its path).
    """
    _refuse_other_sizes(size, channels)
    notes: dict[str, None] = {}
    place = _folder(folder, "folder")
    names = list(classes) if classes is not None else _sub_folders(place)

    def part(place: Path, label: str) -> Part:
        files = _images(place, names, notes)
        inputs = _pixels([file for file, _ in files], size, channels)
        return Part(
            inputs=float_inputs(inputs, f"{label}images", notes),
            targets=[names[number] for _, number in files],
            ids=text_ids(f"{label}{file.relative_to(place).as_posix()}" for file, _ in files),
            attributes={
                key: [_fact(key, fact, file.relative_to(place)) for file, _ in files]
                for key, fact in (attributes or {}).items()
            },
            label=label,
        )

    train = part(place, "")
    rest: Part | float
    if isinstance(test, str | Path):
        if _folder(test, "test").resolve() == place.resolve():
            raise ConfigError.of("test", str(test), "another folder, or a share of the images")
        rest = part(Path(test), "test ")
    else:
        rest = share_of(test, others="a folder of its own")
    settings = Settings(
        name=name,
        classes=names,
        value_range=(0.0, 1.0),
        standardise=standardise,
        declared_size=declared_size,
        seed=seed,
        facts=() if classes is not None else ("the names of the sub-folders are declared public",),
    )
    return dataset_of(train, rest, settings, notes)


def _fact(name: str, fact: object, path: Path) -> object:
    """Return an attribute of an image by its path inside the folder."""
    if not callable(fact):
        allowed = "a function from the path of an image to a number"
        raise ConfigError.of(f"attributes[{name!r}]", fact, allowed)
    try:
        return fact(path)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"attributes[{name!r}] failed for {path}: {type(error).__name__}: {reason}; allowed: a "
            "function that returns a number for every image"
        ) from error


def _refuse_other_sizes(size: object, channels: object) -> None:
    if channels not in MODES or isinstance(channels, bool):
        raise ConfigError.of("channels", channels, "1 for grey, 3 for colour")
    if size is None:
        return
    whole = isinstance(size, tuple | list) and all(
        isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in size
    )
    if not whole or len(size) != 2:  # type: ignore[arg-type]
        raise ConfigError.of("size", size, "(height, width) in pixels, or None")


def _folder(path: object, field: str) -> Path:
    if not isinstance(path, str | Path):
        raise ConfigError.of(field, path, "a path of a folder")
    place = Path(path)
    if not place.is_dir():
        raise DataError(f"{place} is not a folder; allowed: a folder with one sub-folder per class")
    return place


def _sub_folders(place: Path) -> list[str]:
    names = sorted(each.name for each in place.iterdir() if each.is_dir() and each.name[0] != ".")
    if not names:
        raise DataError(f"{place} has no sub-folders; allowed: one for each class, with its images")
    return names


def _images(place: Path, names: Sequence[str], notes: dict[str, None]) -> list[tuple[Path, int]]:
    """Return the images below a folder in the order of their paths, each with its class."""
    other = [name for name in _sub_folders(place) if name not in names]
    if other:
        raise DataError(
            f"{place} has a sub-folder {other[0]!r}, which is no class of the training part; "
            f"allowed classes: {', '.join(names)}"
        )
    found = []
    left_out = 0
    for number, name in enumerate(names):
        files = [file for file in sorted((place / name).rglob("*")) if file.is_file()]
        images = [file for file in files if file.suffix.lower() in SUFFIXES]
        left_out += len(files) - len(images)
        found += [(file, number) for file in images]
    if left_out:
        notes[f"{left_out} files of {place} do not end like images and are left out"] = None
    if not found:
        raise DataError(
            f"{place} has no images; allowed: files that end in {' or '.join(SUFFIXES)}"
        )
    return found


def _pixels(files: Sequence[Path], size: tuple[int, int] | None, channels: int) -> Tensor:
    """Read the images as bytes (n, channels, height, width)."""
    first = _decoded(files[0], size, channels)
    made = torch.empty(len(files), channels, *first.shape[:2], dtype=torch.uint8)
    for row, file in enumerate(files):
        image = _decoded(file, size, channels)
        if image.shape != first.shape:
            raise DataError(
                f"{file} has {image.shape[0]} x {image.shape[1]} pixels, {files[0]} "
                f"{first.shape[0]} x {first.shape[1]}; allowed: one size; give size=(height, width)"
            )
        made[row] = torch.from_numpy(image.reshape(*image.shape[:2], channels)).permute(2, 0, 1)
    return made


def _decoded(file: Path, size: tuple[int, int] | None, channels: int) -> NDArray[Any]:
    """Read one image as bytes (height, width) or (height, width, 3)."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as opened:
            image = opened.convert(MODES[channels])
            if size is not None and image.size != size[::-1]:
                image = image.resize(size[::-1], Image.Resampling.BILINEAR)
            return np.array(image)
    except UnidentifiedImageError as error:
        raise DataError(f"{file} is not an image; repair or remove it") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(
            f"{file} cannot be read as an image: {error}; repair or remove it"
        ) from error
