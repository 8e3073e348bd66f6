"""Groups of records, for measures of fairness, and weights of records by group.

A group is a value of an attribute of the records (`Records.attributes`), a whole number from 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from perdure.data.experience import Stream
from perdure.data.records import Records
from perdure.errors import ConfigError, DataError, PrivacyError
from perdure.tasks import SingleLabel
from perdure.utils.checked_fields import CheckedFields

MOST = 1000
"""Most groups of an attribute."""


@dataclass(frozen=True, kw_only=True)
class Groups(CheckedFields):
    """Groups of records that are compared on public test records.

    Args:
        attribute: name among `Records.attributes`; its values are whole numbers from 0.
        names: names of the groups 0, 1, 2, ...; empty for their numbers.
        positive: class that counts as selected, for selection rates; left out for 1 where there are
            two classes, and for accuracies alone where there are more.
    """

    attribute: str
    names: tuple[str, ...] = ()
    positive: int | None = None

    def __post_init__(self) -> None:
        if self.positive is not None and self.positive < 0:
            raise ConfigError.of("positive", self.positive, "a class, from 0, or None")

    def name_of(self, group: int) -> str:
        """Return the name of a group, or its number as text."""
        return self.names[group] if group < len(self.names) else str(group)


@dataclass(frozen=True, kw_only=True)
class GroupWeights(CheckedFields):
    """Weights of records by group, from declared counts.

        counts:         w[g] = N / (G n[g])                 every group has the same total weight
        class_counts:   w[g, y] = n[g] n[y] / (N n[g, y])   group and class are independent

    A weight multiplies the loss of its record, also when memory replays the record.

    Guarantee: the weight of a record depends on its own group and class and on declared numbers
    only, so under privacy it costs nothing: each record is clipped after its weight. Counted
    numbers depend on all records, and are refused under privacy.

    Args:
        attribute: name among `Records.attributes`; its values are whole numbers from 0.
        counts: declared number of records of each group; "balanced" counts the training records of
            each experience, "reweighing" counts them by group and class.
        class_counts: declared number of records of each group (rows) and class (columns), instead
            of `counts`. A cell of 0 has the weight 1.

    Raises:
        ConfigError: if a number is not allowed, or rows have different lengths.

    Source: Kamiran and Calders 2012, "Data preprocessing techniques for classification without
    discrimination", section 4.2 (reweighing).
    """

    attribute: str
    counts: tuple[float, ...] | Literal["balanced", "reweighing"] = "balanced"
    class_counts: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.class_counts is not None and self.counts != "balanced":
            raise ConfigError.of("counts", self.counts, "left out beside class_counts")
        counts = self.counts
        if not isinstance(counts, str) and not (counts and all(0 < each < 1e12 for each in counts)):
            raise ConfigError.of("counts", counts, "one declared number above 0 for each group")
        rows = self.class_counts
        if rows is None:
            return
        same = len({len(row) for row in rows}) == 1
        fits = same and all(0 <= each < 1e12 for row in rows for each in row)
        if not fits or not sum(map(sum, rows)):
            allowed = "one row for each group, with a declared number from 0 for each class"
            raise ConfigError.of("class_counts", rows, allowed)

    @property
    def counted(self) -> bool:
        """True if counts come from the training records."""
        return self.class_counts is None and isinstance(self.counts, str)

    def declared(self, records: Records, num_classes: int) -> "GroupWeights":
        """Return the same weights with the counts of these records as declared numbers.

        Args:
            records: public records, because the counts become settings.
            num_classes: number of classes.
        """
        group = group_of(records, self.attribute).cpu()
        shape = (int(group.max()) + 1 if len(group) else 1, num_classes)
        cells = torch.zeros(shape, dtype=torch.float64)
        if self.counts == "reweighing":
            labels = records.labels.cpu()
            cells.index_put_((group, labels), torch.ones(()).double(), accumulate=True)
            rows = tuple(tuple(row) for row in cells.tolist())
            return GroupWeights(attribute=self.attribute, class_counts=rows)
        found = torch.bincount(group).clamp(min=1).double()
        return replace(self, counts=tuple(found.tolist()))

    def of(self, records: Records) -> Tensor:
        """Return the weight (n,) float32 of each record.

        Raises:
            ConfigError: if there is no count of a group or class, or the task has no classes for
                `class_counts`.
            DataError: if the records do not have the attribute.
        """
        group = group_of(records, self.attribute)
        table = self._table().to(group.device)
        _refuse_outside(group, len(table), f"{self.attribute} of {records.partition}")
        if table.dim() == 1:
            return table[group]
        if not isinstance(records.task, SingleLabel):
            allowed = "counts of groups, because only single-label records have one class each"
            raise ConfigError.of("class_counts", f"{records.task.name} records", allowed)
        _refuse_outside(records.labels, table.shape[1], f"labels of {records.partition}")
        return table[group, records.labels]

    def _table(self) -> Tensor:
        """Weight of every group (G,), or of every group and class (G, C)."""
        if self.class_counts is not None:
            cells = torch.tensor(self.class_counts, dtype=torch.float64)
            expected = cells.sum(1, keepdim=True) * cells.sum(0, keepdim=True) / cells.sum()
            return torch.where(cells > 0, expected / cells.clamp(min=1e-12), 1.0).float()
        counts = torch.tensor(self.counts, dtype=torch.float64)
        return (counts.sum() / len(counts) / counts).float()


def group_of(records: Records, attribute: str) -> Tensor:
    """Return the group (n,) int64 of each record.

    Raises:
        DataError: if the records do not have the attribute, or its values are not whole numbers
            from 0 to `MOST`.
    """
    if attribute not in records.attributes:
        known = ", ".join(records.attributes) or "none"
        raise DataError(
            f"{records.partition} has no attribute {attribute!r}; its attributes: {known}; give "
            f"training and test records Records(attributes={{{attribute!r}: tensor}})"
        )
    values = records.attributes[attribute]
    group = values.long()
    if not bool(((group == values) & (group >= 0) & (group < MOST)).all()):
        raise DataError(
            f"values of the attribute {attribute!r} of {records.partition} are no groups; allowed: "
            f"whole numbers from 0 to {MOST - 1}; number the groups"
        )
    return group


def _refuse_outside(values: Tensor, width: int, name: str) -> None:
    if len(values) and int(values.max()) >= width:
        raise ConfigError.of(f"counts for {name}", f"{width} numbers", "one for each value")


def weighted(stream: Stream, chosen: GroupWeights | None, *, private: bool) -> Stream:
    """Return the stream with the weight of every training record.

    Args:
        stream: stream whose training records have the attribute.
        chosen: weights of groups; None for the weights that the records have.
        private: True to refuse counted numbers.

    Raises:
        ConfigError: if only some of the experiences have weights, or if records have weights beside
            `chosen`.
        PrivacyError: under privacy, if counts come from the records.
    """
    own = [each.train.weights is not None for each in stream]
    if chosen is None:
        if any(own) and not all(own):
            given = f"none in experience {own.index(False)}"
            raise ConfigError.of("weights of records", given, "weights in all experiences, or none")
        return stream
    if any(own):
        given = f"given beside weights of records in experience {own.index(True)}"
        raise ConfigError.of("group_weights", given, "one of the two")
    if private and chosen.counted:
        raise PrivacyError(
            f"group_weights with counts={chosen.counts!r} count private records, which no ledger "
            "entry covers; give declared counts, or counts of public records"
        )
    parts = []
    for experience in stream:
        train = experience.train
        known = chosen.declared(train, stream.num_classes) if chosen.counted else chosen
        parts.append(replace(experience, train=replace(train, weights=known.of(train))))
    return replace(stream, experiences=tuple(parts))


def counts_of(records: Sequence[Records], attribute: str) -> tuple[int, ...]:
    """Count the records of each group over several sets of public records."""
    group = torch.cat([group_of(each, attribute).cpu() for each in records])
    return tuple(torch.bincount(group).tolist())
