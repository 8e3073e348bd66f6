"""Table `[data]` of a config: the data set, and its split into a stream of experiences."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from perdure.data.column_transforms import (
    ColumnTransform,
    Gaps,
    best_columns,
    column_scaling,
    principal_components,
)
from perdure.data.datasets.base import Dataset
from perdure.data.datasets.registry import GIVEN, find, load
from perdure.data.experience import Stream
from perdure.data.records import Records
from perdure.data.resampling import Method, resampled
from perdure.data.scenarios import (
    blurry,
    by_domain,
    by_time,
    joint,
    online,
    permuted,
    repetition,
    rotated,
    split,
)
from perdure.errors import ConfigError
from perdure.experiment.calls import arguments
from perdure.experiment.field_checks import COUNTS, check, counts
from perdure.experiment.from_tables import placed
from perdure.types import Scenario
from perdure.utils.checked_fields import CheckedFields

StreamName = Literal[
    "split", "permuted", "rotated", "blurry", "repetition", "by_time", "by_domain", "joint"
]
STREAMS: dict[StreamName, Callable[..., Stream]] = {
    "split": split,
    "permuted": permuted,
    "rotated": rotated,
    "blurry": blurry,
    "repetition": repetition,
    "by_time": by_time,
    "by_domain": by_domain,
    "joint": joint,
}
"""Functions that make a stream of a data set, by their names in a config."""
OF_LOADERS = (*GIVEN, "declared_size")
"""Parameters of a data set's function that cannot be in `DataConfig.options`."""
OF_STREAMS = {
    "scenario": "scenario",
    "experiences": "experiences",
    "increments": "increments",
    "class_order": "class_order",
    "first_identity": "first_identity",
    "angles": "angles",
    "blurry_share": "blurry_share",
    "disjoint_share": "disjoint_share",
    "first_probability": "first_probability",
    "repeat_probability": "repeat_probability",
    "attribute": "attribute",
    "boundaries": "boundaries",
    "order": "order",
    "declared_sizes": "declared_size",
}
"""Keys of `[data]` to the parameters of the functions in `STREAMS` that get their values."""
OF_ALL_RECORDS = ("permuted", "rotated", "joint")
"""Streams in which every experience has all records, and `declared_size` is the size of each."""
EXPERIENCES = 5
"""Default number of experiences, where no other key of `[data]` determines it."""


def keys_of(stream: StreamName) -> list[str]:
    """Return the keys of `[data]` that a stream has, among those in `OF_STREAMS`."""
    known = inspect.signature(STREAMS[stream]).parameters
    keys = [key for key, parameter in OF_STREAMS.items() if parameter in known]
    if stream in OF_ALL_RECORDS:
        keys.remove("declared_sizes")
    return keys


@dataclass(frozen=True, kw_only=True)
class DataConfig(CheckedFields):
    """Table `[data]` of a config: the data set, and its split into a stream of experiences.

    A key that is left out has the default of the function in `perdure.data` that `stream` names; a
    key that this function does not have is refused.

    Args:
        name: name of a data set, or "module:name" of a function that returns a
            `perdure.data.Dataset`.
        root: folder of the data; left out for the usual places.
        options: further arguments of the data set's function, such as {length = 32}.
        split_seed: seed of the split into training and test records, where the data set has no
            published one; the same for all seeds of a run.
        resample: method of `perdure.data.resampled` that balances the classes of the training
            records, before the stream is made; only without `[privacy]`. Left out for none.
        fit_on: records whose constants `impute`, `scale`, `columns` and `components` use: `train`,
            or `test`, the public test records; with `[privacy]` only `test`.
        impute: `mean` or `median` of a column, which replaces its missing numbers; only with
            `scale`.
        scale: scale every column to mean 0 and deviation 1.
        columns: number of columns to keep, those that tell most about the labels.
        components: number of principal components to which the columns are projected.
        declared_size: public number of training records; left out for the number that the data set
            declares.
        stream: function in `perdure.data` that makes the stream.
        seed: public seed of the class order, the permutations or the assignment of records to
            experiences; left out for the run's seed.
        scenario: `task`, `domain` or `class` (incremental learning); left out for `class` in
            `split`.
        experiences: number of experiences; left out for 5, where `increments`, `angles`,
            `boundaries` and domains do not say it.
        increments: number of new classes in each experience, for unequal ones.
        shuffle_classes: order the classes by the seed (split).
        class_order: classes in the order of training.
        first_identity: do not permute the first experience (permuted).
        angles: rotation of each experience in degrees (rotated).
        blurry_share: share of records that leave the experience of their class (blurry).
        disjoint_share: share of classes whose records never leave (blurry).
        first_probability: probability of the geometric distribution of first experiences
            (repetition).
        repeat_probability: probability that a class comes back in an experience (repetition).
        attribute: name of the records' attribute with the time or domain (by_time, by_domain).
        boundaries: public, ascending times at which a new experience begins (by_time).
        order: public numbers of the domains in the order of training (by_domain).
        declared_sizes: public number of training records of each experience.
        chunk: number of records of the pieces into which every experience is cut (online learning);
            under privacy, the declared size of a piece. Left out for whole experiences.
        exact: pieces have exactly `chunk` records; left out for true without `[privacy]`, where
            other records may move a record to another piece.
    """

    name: str = "digits"
    root: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    split_seed: int = 0
    resample: Method | None = None
    fit_on: Literal["train", "test"] = "train"
    impute: Gaps | None = None
    scale: bool = False
    columns: int | None = None
    components: int | None = None
    declared_size: int | None = None
    stream: StreamName = "split"
    seed: int | None = None
    scenario: Scenario | None = None
    experiences: int | None = None
    increments: tuple[int, ...] | None = None
    shuffle_classes: bool = False
    class_order: tuple[int, ...] | None = None
    first_identity: bool | None = None
    angles: tuple[float, ...] | None = None
    blurry_share: float | None = None
    disjoint_share: float | None = None
    first_probability: float | None = None
    repeat_probability: float | None = None
    attribute: str | None = None
    boundaries: tuple[float, ...] | None = None
    order: tuple[int, ...] | None = None
    declared_sizes: tuple[int, ...] | None = None
    chunk: int | None = None
    exact: bool | None = None

    def __post_init__(self) -> None:
        loader = find(self.name, field="name")
        arguments(loader, self.options, "options", without=OF_LOADERS)
        check(self, "split_seed seed", lambda value: 0 <= value < 2**32, "0 to 4294967295")
        check(self, "experiences chunk declared_size columns components", counts, COUNTS)
        if self.impute and not self.scale:
            raise ConfigError.of("impute", self.impute, "none without scale = true")
        allowed = "numbers of new classes, each from 1, and at least one of them"
        check(self, "increments", lambda each: bool(each) and all(map(counts, each)), allowed)
        allowed = "numbers of records, each from 1, and at least one of them"
        check(self, "declared_sizes", lambda each: bool(each) and all(map(counts, each)), allowed)
        self._refuse_keys_of_other_streams()

    def _refuse_keys_of_other_streams(self) -> None:
        keys = keys_of(self.stream)
        for key in OF_STREAMS:
            value = getattr(self, key)
            if value is not None and key not in keys:
                allowed = f'with stream = "{self.stream}", only the keys {", ".join(keys)}'
                raise ConfigError.of(key, value, allowed)
        if self.shuffle_classes and self.stream != "split":
            raise ConfigError.of("shuffle_classes", True, 'false, or stream = "split"')

    def load(self) -> Dataset:
        """Load the data set.

        Raises:
            DataError: if its files are missing or damaged.
        """
        return load(
            self.name,
            self.root,
            seed=self.split_seed,
            declared_size=self.declared_size,
            options=self.options,
        )

    def open(self, *, seed: int, private: bool, without: int | None = None) -> Stream:
        """Load the data and make the stream.

        Args:
            seed: seed of the run.
            private: True if some arm has privacy; then no record may change the experience of
                another record.
            without: id of a training record to leave out, for an audit; None for none.

        Raises:
            ConfigError: if there is no such stream of these data.
            DataError: if the data are missing or damaged.
        """
        data = self.load()
        if without is not None:
            data = replace(data, train=data.train.take(data.train.ids != without))
        data = self._changed_columns(data)
        if self.resample is not None:
            balanced = resampled(data.train, method=self.resample, seed=self.split_seed)
            data = replace(data, train=balanced)
        seed = seed if self.seed is None else self.seed
        try:
            stream = STREAMS[self.stream](data, **self._arguments(seed))
            if self.chunk is not None:
                exact = not private if self.exact is None else self.exact
                stream = online(stream, chunk=self.chunk, seed=seed, exact=exact)
        except ConfigError as error:
            raise ConfigError(placed(str(error), "data", OF_STREAMS)) from error
        return stream

    def _changed_columns(self, data: Dataset) -> Dataset:
        """Scale, choose and project the columns by constants of `fit_on`."""
        made: list[Callable[[Records], ColumnTransform]] = []
        if self.scale:
            made.append(partial(column_scaling, impute=self.impute))
        if self.columns is not None:
            made.append(partial(best_columns, count=self.columns))
        if self.components is not None:
            made.append(partial(principal_components, count=self.components))
        for make in made:
            try:
                transform = make(data.train if self.fit_on == "train" else data.test)
            except ConfigError as error:
                raise ConfigError(f"data: {error}") from error
            data = transform.dataset(data)
        return data

    @property
    def reads_training_records(self) -> bool:
        """True if constants of training records change the columns."""
        changed = self.scale or self.columns is not None or self.components is not None
        return changed and self.fit_on == "train"

    def _arguments(self, seed: int) -> dict[str, object]:
        """Return the arguments for the function in `STREAMS` that makes the stream."""
        known = inspect.signature(STREAMS[self.stream]).parameters
        given: dict[str, object] = {
            parameter: value
            for key, parameter in OF_STREAMS.items()
            if (value := getattr(self, key)) is not None
        }
        if self.stream == "split":
            given.setdefault("scenario", "class")
        if "experiences" in known and not {"experiences", "increments", "boundaries"} & set(given):
            given["experiences"] = EXPERIENCES
        if "seed" in known and (self.stream != "split" or self.shuffle_classes):
            given["seed"] = seed
        return given
