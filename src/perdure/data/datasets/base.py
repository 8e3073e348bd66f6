"""Type of a data set, and the folders for published files and caches.

The data root is the argument `root`, or the environment variable PERDURE_DATA, or the user's cache
folder (`perdure` in XDG_CACHE_HOME or ~/.cache). Ids are indices into the published source: ids of
the test part follow the ids of the training part, so that no id is used for two records.
"""

import contextlib
import gzip
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from perdure.data.domain import InputDomain
from perdure.data.record_identity import refuse_test_ids_in_training
from perdure.data.records import Records, require_type
from perdure.errors import ConfigError, DataError
from perdure.tasks import Task
from perdure.utils.atomic_files import save_tensors


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Training and test records of one source, with public facts about them.

    Args:
        name: name of the data set, as in `load`.
        train: inputs (n, ...) float32, labels in 0 .. num_classes-1, or targets of another task.
        test: test records, with inputs and labels like `train`; they are declared public.
        num_classes: number of classes, labels, targets or tokens, fixed in advance.
        input_shape: shape of one input: (channels, height, width) or (features,).
        public_facts: facts that were computed from the data and are declared public, one sentence
            each.
        categories: names of the values 0, 1, 2, ... of an attribute, by attribute: {"group": ("f",
            "m")}; the names of the classes have the key "target". Declared public.
        notes: changes that were made to the data when they were read, one sentence each; `print`
            shows them.

    Raises:
        DataError: if a part is empty, or has another shape, other labels or another task, or if a
            given id is in both parts.
    """

    name: str
    train: Records
    test: Records
    num_classes: int
    input_shape: tuple[int, ...]
    public_facts: tuple[str, ...] = ()
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part, records in (("train", self.train), ("test", self.test)):
            require_type(records, Records, f"{part} of data set {self.name}", "a perdure.Records")
            if records.task != self.task:
                raise DataError(
                    f"{self.name} has {self.task.name} training records but {records.task.name} "
                    "test records; give both the same task"
                )
            shape = tuple(records.inputs.shape[1:])
            if shape != self.input_shape:
                raise DataError(
                    f"{self.name} {part} inputs have shape {shape}; allowed: {self.input_shape}"
                )
            if not len(records):
                raise DataError(
                    f"{self.name} has no {part} records; allowed: at least one; give more records, "
                    "or another share for the test"
                )
            found = self.task.undeclared(records.labels, range(self.num_classes))
            if found:
                raise DataError(
                    f"{self.name} has {part} {found}; allowed: 0 .. {self.num_classes - 1}; number "
                    "them from 0, or give another num_classes"
                )
        refuse_test_ids_in_training(self.train, self.test, f"data set {self.name}")

    def __repr__(self) -> str:
        lines = [
            f"Dataset({self.name!r}, {len(self.train)} training and {len(self.test)} test records "
            f"of shape {self.input_shape}, {self.num_classes} classes)",
            *(f"  changed: {note}" for note in self.notes),
            *(f"  public: {fact}" for fact in self.public_facts),
        ]
        return "\n".join(lines)

    @property
    def task(self) -> Task:
        """Task of the records."""
        return self.train.task


def require_data_set(data: object) -> None:
    """Refuse a value that is not a `Dataset`; the message names the functions that make one.

    Args:
        data: value given by the user.

    Raises:
        DataError: if the value is not a `Dataset`.
    """
    require_type(data, Dataset, "data", "a perdure.data.Dataset")


def cache_folder() -> Path:
    """Folder for files that can be computed again: `perdure` in XDG_CACHE_HOME or in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "perdure"


def data_root(root: str | Path | None = None) -> Path:
    """Folder of data sets: the argument, or PERDURE_DATA, or the user's cache folder."""
    chosen = root or os.environ.get("PERDURE_DATA")
    return Path(chosen) if chosen else cache_folder()


def from_published_split(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    num_classes: int,
    facts: tuple[str, ...] = (),
    declared_size: int | None = None,
    value_range: tuple[float, float] | None = None,
    size_published: bool = False,
) -> Dataset:
    """Build a data set from a published split into training and test part.

    The ids of test records follow the ids of training records.

    Args:
        name: name of the data set and of its partition.
        train: inputs (n, ...) and labels (n,) to train on.
        test: inputs (m, ...) and labels (m,) to test on.
        num_classes: number of classes.
        facts: public facts on the data set, one sentence each.
        declared_size: public number of training records; None for the number of rows.
        value_range: smallest and largest number of an input, known from the source's definition.
        size_published: True if the source is published, so that the number of records is public.
    """
    ids = torch.arange(len(train[0]))
    after = torch.arange(len(test[0])) + len(train[0])
    domain = declared_domain(train[0], value_range)
    records = Records(
        inputs=train[0],
        labels=train[1],
        ids=ids,
        partition=name,
        domain=domain,
        size_published=size_published,
    )
    return Dataset(
        name=name,
        train=records.declared(declared_size),
        test=Records(
            inputs=test[0], labels=test[1], ids=after, partition=f"{name}-test", domain=domain
        ),
        num_classes=num_classes,
        input_shape=tuple(train[0].shape[1:]),
        public_facts=facts,
    )


def from_stratified_split(
    name: str,
    inputs: Tensor,
    labels: Tensor,
    *,
    seed: int,
    test_share: float,
    facts: tuple[str, ...] = (),
    declared_size: int | None = None,
    value_range: tuple[float, float] | None = None,
    size_published: bool = False,
) -> Dataset:
    """Build a data set by a random split with the same share of every class in the test part.

    Ids are positions in the source. The split depends on positions in the published table, so it is
    a public fact about this table. The private data are the remaining training records.

    Args:
        name: name of the data set and of its partition.
        inputs: (n, ...) inputs.
        labels: (n,) labels, whole numbers from 0.
        seed: seed of the split.
        test_share: share of every class in the test part, between 0 and 1.
        facts: public facts on the data set, one sentence each.
        declared_size: public number of training records; None for the number of rows.
        value_range: smallest and largest number of an input, known from the source's definition.
        size_published: True if the source is published, so that the number of records is public.

    Raises:
        ConfigError: if `test_share` is not between 0 and 1.
    """
    if not 0 < test_share < 1:
        raise ConfigError.of("test_share", test_share, "a number between 0 and 1, both excluded")
    generator = torch.Generator().manual_seed(seed)
    num_classes = int(labels.max()) + 1
    in_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(num_classes):
        rows = (labels == label).nonzero().squeeze(1)
        in_test[
            rows[torch.randperm(len(rows), generator=generator)[: round(test_share * len(rows))]]
        ] = True
    ids = torch.arange(len(labels))
    domain = declared_domain(inputs, value_range)
    source = Records(
        inputs=inputs,
        labels=labels,
        ids=ids,
        partition=name,
        domain=domain,
        size_published=size_published,
    )
    test = source.take(in_test)
    return Dataset(
        name=name,
        train=source.take(~in_test).declared(declared_size),
        test=Records(
            inputs=test.inputs,
            labels=test.labels,
            ids=test.ids,
            partition=f"{name}-test",
            domain=domain,
        ),
        num_classes=num_classes,
        input_shape=tuple(inputs.shape[1:]),
        public_facts=facts,
    )


def declared_domain(inputs: Tensor, value_range: tuple[float, float] | None) -> InputDomain | None:
    """Domain of inputs (n, ...) with a declared range; None if no range is declared."""
    if value_range is None:
        return None
    return InputDomain(shape=tuple(inputs.shape[1:]), dtype=inputs.dtype, range=value_range)


def bytes_to_unit(images: Tensor) -> Tensor:
    """Convert bytes (n, ...) to float32 in [0, 1], in the same shape."""
    return images.float().div_(255)


def download_failed(place: Path, name: str, hint: str, error: Exception) -> DataError:
    """Build the error for a failed download, with folder, data set, reason and fix."""
    reason = (str(error).splitlines() or [type(error).__name__])[-1]
    return DataError(
        f"no {name} in {place} and the download failed ({reason}); {hint}, or set PERDURE_DATA to "
        "the folder that contains it"
    )


def load_or_make(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Load tensors from `path`; if that fails, make them and save them.

    An error while saving is ignored.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with contextlib.suppress(OSError, SafetensorError):
        return load_file(path)
    tensors = make()
    with contextlib.suppress(OSError):  # without a cache nothing is lost but time
        save_tensors(path, tensors)
    return tensors


def file_bytes(path: Path) -> bytes:
    """Content of the file `path`, or unzipped content of `path` with .gz appended.

    Raises:
        DataError: if neither can be read.
    """
    zipped = path.with_name(path.name + ".gz")
    try:
        return path.read_bytes() if path.exists() else gzip.decompress(zipped.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} (or .gz) cannot be read: {error}; put a complete copy there"
        ) from error
