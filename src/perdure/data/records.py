"""Records and batches: tensors with one row per record, and the identity of each row.

The tensors stay on their device.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from perdure.data.domain import InputDomain
from perdure.data.row_view import positions_of, rows_at, view_rows
from perdure.errors import ConfigError, DataError
from perdure.tasks import SingleLabel, Task
from perdure.utils.chunking import FEWEST_ROWS, filled


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Noisy sum over records that was released before training, such as constants for scaling.

    Args:
        entry: digest of the ledger entry to which the sum was charged.
        noise_multiplier: standard deviation of the noise divided by the sensitivity.
        simulated: True if the noise came from a seed that the user chose.
    """

    entry: str
    noise_multiplier: float
    simulated: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Records:
    """A set of records with one privacy history: a *partition*.

    Args:
        inputs: (n, ...) inputs of the model, in memory or in a memory-mapped file.
        labels: targets in the shape of the task: (n,) int64 classes for single-label records, (n,
            C) float32 of 0 and 1 for multi-label ones, (n, k) float32 for regression, (n, L) int64
            tokens for next-token ones.
        ids: (n,) int64, identity of each record at its *source*. Splits and transforms keep it, so
            a permuted copy of an image is still the same record. Default: 0 .. n-1.
        partition: name of the privacy history that these records share.
        declared_size: public size of the partition. Sampling rates and divisors use this number,
            never the actual number. Default: n, which then is public.
        size_counted: True if no size was declared, so that `declared_size` is the number of rows
            (set automatically).
        size_published: True for records of a published data set, whose number is public anyway (set
            by the data sets of `perdure.data`).
        ids_by_position: True if no ids were given, so that ids are row numbers: removing one row
            would change the ids of all later rows. Under privacy such ids may not decide which
            experience or client a record goes to (set automatically; see `perdure.data.scenarios`).
        drawn_by_position: True if a hash of row numbers chose these records from a table: removing
            one row would choose other records. Under privacy such records are refused (set
            automatically by `perdure.data.from_arrays` and its kin).
        coupled_by: function that chose or made these records by looking at all of them, such as
            "resampled(method='smote')": each may depend on others. Under privacy such records are
            refused (set automatically).
        placed_by: digest of the public rule that put these records into this partition; equal rules
            put a record into partitions of the same name. Set by the functions that split a data
            set; "" if the rule is not known. A warm start uses it to find out which records an
            earlier training used (see `perdure.learner.model_history`).
        domain: values that an input may have, declared without looking at records; None if not
            declared. Under privacy the guard needs it for inputs that are not floats.
        attributes: further facts of each record by name, such as "time", "domain" or "group", each
            (n,). A stream may be cut by them; models do not get them. They are as private as the
            records.
        numbered_by_records: attributes whose values were found in the records and numbered in their
            order, so that one record more may give others other numbers. Under privacy no
            experience and no client may follow from them.
        weights: (n,) factor of each record's loss, at least 0 and as private as the record; it may
            depend on the record and on declared numbers only (see `GroupWeights`). None for 1.
        task: meaning of the labels: loss, metric and shape.
        public_facts: facts that were found in the records instead of declared, such as the classes,
            one sentence each. They are public thereby, and the privacy statement names them.
        spent: releases that all of these records were exposed to before, such as constants for
            scaling. A private learner charges them to its ledger, and plans for them.

    Raises:
        DataError: if lengths or types do not fit.
    """

    inputs: Tensor
    labels: Tensor
    ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    partition: str = "records"
    declared_size: int = 0
    size_counted: bool = False
    size_published: bool = False
    ids_by_position: bool = False
    drawn_by_position: bool = False
    coupled_by: str = ""
    placed_by: str = ""
    domain: InputDomain | None = None
    attributes: Mapping[str, Tensor] = field(default_factory=dict)
    numbered_by_records: tuple[str, ...] = ()
    weights: Tensor | None = None
    task: Task = field(default_factory=SingleLabel)
    public_facts: tuple[str, ...] = ()
    spent: tuple[Spent, ...] = ()

    _fits: set[tuple[int, ...]] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("inputs", "labels", "ids"):
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                raise DataError(
                    f"{name} are a {type(value).__name__}; allowed: a tensor, such as "
                    f"torch.as_tensor({name}); perdure.data.from_arrays takes arrays and lists"
                )
            if not value.dim():
                raise DataError(f"{name} are one number; allowed: one row per record, (n, ...)")
        n = len(self.inputs)
        if len(self.labels) != n:
            raise DataError(f"{n} inputs but {len(self.labels)} labels; give one label per input")
        if not isinstance(self.task, Task):
            raise ConfigError.of("task", self.task, "an object of a task, such as SingleLabel()")
        self.task.check(self.labels)
        if len(self.ids) == 0 and n:
            object.__setattr__(self, "ids", torch.arange(n, device=self.inputs.device))
            object.__setattr__(self, "ids_by_position", True)
        if len(self.ids) != n:
            raise DataError(f"{n} inputs but {len(self.ids)} ids; give one id per input")
        if self.ids.dtype != torch.int64 or self.ids.dim() != 1:
            raise DataError(
                f"ids are {self.ids.dtype} of shape {tuple(self.ids.shape)}; allowed: int64 "
                f"({n},); convert them with ids.long().flatten()"
            )
        self._check_attributes()
        if self.declared_size <= 0:
            object.__setattr__(self, "declared_size", n)
            object.__setattr__(self, "size_counted", True)
        elif self.declared_size != n:
            object.__setattr__(self, "size_counted", False)
        if self.domain is not None and not self.domain.fits(self.inputs):
            given = f"shape {tuple(self.inputs.shape[1:])} and {self.inputs.dtype}"
            raise DataError(
                f"inputs have {given}; the declared domain has shape {self.domain.shape} and "
                f"{self.domain.dtype}; declare the domain of these inputs"
            )

    def _check_attributes(self) -> None:
        n = len(self.inputs)
        for name, value in self.attributes.items():
            if not isinstance(value, Tensor) or value.shape != (n,):
                given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise DataError(
                    f"attribute {name!r} is {given}; allowed: a tensor ({n},), one value per record"
                )
        weights = self.weights
        if weights is not None:
            fits = isinstance(weights, Tensor) and weights.shape == (n,)
            if not fits or not bool((weights.isfinite() & (weights >= 0)).all()):
                raise DataError(
                    f"weights of {self.partition} do not fit; allowed: a tensor ({n},) of finite "
                    "numbers from 0, one per record"
                )

    def __len__(self) -> int:
        return len(self.inputs)

    def __repr__(self) -> str:
        return (
            f"Records({len(self)} of shape {tuple(self.inputs.shape[1:])}, "
            f"partition={self.partition!r})"
        )

    def take(self, index: Tensor | slice) -> "Records":
        """Take rows with their ids; the declared size becomes the number of taken rows.

        Inputs, and targets of several numbers, are not copied: the result refers to these records
        (see `perdure.data.row_view`). Single numbers per record, such as ids, are copied.

        Args:
            index: int64 positions (k,), a boolean mask (n,), or a slice.

        Raises:
            DataError: if a position does not exist, or a mask has another length.
        """
        positions = positions_of(index, len(self)).to(self.inputs.device)

        def taken(rows: Tensor) -> Tensor:
            return view_rows(rows, positions) if rows.dim() > 1 else rows[positions]

        # Rows of checked records need no checks, which take a tenth of a millisecond: a stream may
        # have thousands of pieces.
        part = object.__new__(type(self))
        kept = {each.name: getattr(self, each.name) for each in fields(self)}
        size = {"declared_size": len(positions), "size_counted": True}
        vars(part).update(kept | self._rows(taken) | size | {"_fits": set()})
        return part

    def map(self, change: Callable[[Tensor], Tensor]) -> "Records":
        """Apply `change` to inputs, labels, ids, attributes and weights, each (n, ...).

        Examples of a change are an index, or a move to another device.

        Args:
            change: function that selects or moves the same rows of every tensor, in the same order.
        """
        return replace(self, **self._rows(change))

    def _rows(self, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Return the changed tensors by field."""
        return {
            "inputs": change(self.inputs),
            "labels": change(self.labels),
            "ids": change(self.ids),
            "attributes": {name: change(value) for name, value in self.attributes.items()},
            "weights": None if self.weights is None else change(self.weights),
        }

    def undeclared(self, classes: tuple[int, ...]) -> str:
        """Describe targets that the declared outputs do not allow; "" if there are none.

        Records that passed are not checked again for the same outputs, because all pieces of an
        experience share their test records.
        """
        if classes in self._fits:
            return ""
        found = self.task.undeclared(self.labels, classes)
        if not found:
            self._fits.add(classes)
        return found

    def declared(self, size: int | None) -> "Records":
        """Return the same records with a declared size; None changes nothing.

        Raises:
            ConfigError: if the size is below 1.
        """
        if size is None:
            return self
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError.of("declared_size", size, "whole numbers from 1, or None")
        return replace(self, declared_size=size, size_counted=False)

    def to(self, device: torch.device | str) -> "Records":
        """Return the same records on another device; these records if they are there already."""
        rows = [self.inputs, self.labels, self.ids, *self.attributes.values()]
        rows += [] if self.weights is None else [self.weights]
        if all(each.to(device) is each for each in rows):
            return self
        return self.map(lambda rows: rows.to(device))


def require_type(value: object, kind: type, name: str, allowed: str) -> None:
    """Refuse a value of a wrong type; the message names the functions that make the right type.

    Args:
        value: value given by the user.
        kind: type that is allowed.
        name: name of the argument, for the message.
        allowed: description of the type.

    Raises:
        DataError: if the value has another type.
    """
    if not isinstance(value, kind):
        raise DataError(
            f"{name} is a {type(value).__name__}; allowed: {allowed}; perdure.data.from_arrays, "
            "from_torch and from_pandas make a data set of what you have"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Rows for a loss; every tensor has one row per record.

    Args:
        inputs: (n, ...) inputs.
        labels: targets in the shape of the task, such as (n,) int64 classes.
        ids: (n,) int64 record ids.
        tasks: (n,) int64, the experience each record came from.
        from_memory: (n,) bool, True for rows from memory, False for new rows.
        valid: (n,) bool, False for padding.
        stored: values that the memory stored with the row (for example logits for DER), name to (n,
            ...).
        weights: (n,) factor of each row's loss; None for 1.
    """

    inputs: Tensor
    labels: Tensor
    ids: Tensor
    tasks: Tensor
    from_memory: Tensor
    valid: Tensor
    stored: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Tensor | None = None

    def __len__(self) -> int:
        return self.inputs.shape[0]  # called several times per step; len() of a tensor is slow

    @classmethod
    def current(cls, records: Records, task: int) -> "Batch":
        """Make one batch of new rows from all of `records`."""
        n = len(records)
        device = records.inputs.device
        return cls(
            inputs=records.inputs,
            labels=records.labels,
            ids=records.ids,
            tasks=torch.full((n,), task, device=device),
            from_memory=torch.zeros(n, dtype=torch.bool, device=device),
            valid=torch.ones(n, dtype=torch.bool, device=device),
            weights=records.weights,
        )

    @cached_property
    def unpadded(self) -> bool:
        """True if no row is padding; False if this is not known without waiting for a device."""
        return self.valid.device.type == "cpu" and bool(self.valid.all())

    def tensors(self) -> dict[str, Tensor]:
        """Return all row tensors (n, ...) by name, ready for `torch.func.vmap`.

        The method `from_tensors` is the inverse.
        """
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "stored"}
        if self.weights is None:
            del own["weights"]
        return own | {f"stored.{name}": value for name, value in self.stored.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Batch":
        """Rebuild a batch from tensors (n, ...) that `tensors()` returned."""
        own = {name: value for name, value in tensors.items() if not name.startswith("stored.")}
        stored = {
            n.removeprefix("stored."): v for n, v in tensors.items() if n.startswith("stored.")
        }
        return cls(**own, stored=stored)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Apply `change`, such as an index or a device move, to every row tensor (n, ...)."""
        return Batch.from_tensors({name: change(value) for name, value in self.tensors().items()})

    def take(self, index: Tensor | slice) -> "Batch":
        """Take some of the rows.

        Args:
            index: positions (k,), a boolean mask (n,), or a slice.
        """
        if isinstance(index, Tensor) and index.dtype == torch.int64 and index.dim() == 1:
            return self.at(torch.where(index < 0, index + len(self), index))
        return self.map(lambda rows: rows[index])

    def at(self, places: Tensor) -> "Batch":
        """Take the rows at int64 positions (k,), none negative; fast enough for every step."""
        # several times as fast as indexing with brackets, if rows are long
        rows = places.to(self.inputs.device)
        return Batch(
            inputs=rows_at(self.inputs, rows),
            labels=rows_at(self.labels, rows),
            ids=self.ids.index_select(0, rows),
            tasks=self.tasks.index_select(0, rows),
            from_memory=self.from_memory.index_select(0, rows),
            valid=self.valid.index_select(0, rows),
            stored={name: rows_at(value, rows) for name, value in self.stored.items()},
            weights=None if self.weights is None else self.weights.index_select(0, rows),
        )

    def among(self, mask: Tensor) -> "Batch":
        """Take the rows of a boolean mask (n,); they are a view if they are next to each other."""
        places = torch.nonzero(mask).flatten()
        if len(places) and int(places[-1]) - int(places[0]) + 1 == len(places):
            first = int(places[0])
            return self.take(slice(first, first + len(places)))
        return self.at(places)


def filled_batch(batch: Batch, least: int = FEWEST_ROWS) -> Batch:
    """Repeat the first row at the end of a batch until it has `least` rows."""
    return batch if len(batch) >= least else Batch.from_tensors(filled(batch.tensors(), least))


def batch_of_one(tensors: Mapping[str, Tensor]) -> Batch:
    """Make a batch of one row from the tensors of one record, without batch dimension."""
    return Batch.from_tensors({name: value.unsqueeze(0) for name, value in tensors.items()})
