"""Public rules that assign records to experiences, and the sizes that follow from them."""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256

import torch
from torch import Tensor

from perdure.data.datasets.base import Dataset
from perdure.data.experience import Experience, Stream, size_of_each
from perdure.data.records import Records
from perdure.errors import ConfigError
from perdure.utils.hashing import canonical, canonical_text, hashed, shifted

NAMELESS = "data"
"""Default name of a data set, which other data sets may have, too."""
OF_NAMELESS = "data without a name: "
"""Prefix of the rule of a data set without a name, which may hold for other data sets, too."""


def hashable(stream: Stream) -> bool:
    """Return True if the training records have ids of their own, which can be hashed."""
    return not any(experience.train.ids_by_position for experience in stream)


def placing_rule(kind: str, data: Dataset, **facts: object) -> str:
    """Return a digest of the public rule that decides the partition of each record.

    It is computed from public facts only: the name of the data set, its declared size, and all
    settings that decide the partition of a record. A counted size is not used, because it would
    change with one record. The rule of a data set without a name begins with `OF_NAMELESS`.

    Args:
        kind: name of the scenario.
        data: the source.
        facts: public settings of the scenario.
    """
    size = None if data.train.size_counted else data.train.declared_size
    whole = {"data": data.name, "size": size, "classes": data.num_classes}
    rule = sha256(canonical_text(canonical({"rule": kind, **whole, **facts})).encode()).hexdigest()
    return f"{OF_NAMELESS}{rule}" if data.name == NAMELESS else rule


def public_coin(ids: Tensor, *, seed: int, purpose: int = 0) -> Tensor:
    """Hash record ids to public random numbers in [0, 1), (n,) float64 on the CPU.

    Guarantee: none; everyone can compute the numbers. They decide the experience of a record, and
    are never used for noise or for secret membership.

    Args:
        ids: (n,) int64 record ids.
        seed: public seed.
        purpose: number of the use, so that different uses have independent numbers.

    Source: see `perdure.utils.hashing`.
    """
    return shifted(hashed(ids.cpu(), seed, purpose), 11).double() * 2.0**-53


def arrival_order(
    num_classes: int, class_order: Sequence[int] | None, seed: int | None
) -> tuple[int, ...]:
    """Return the classes in the order of their arrival: as given, or random from a public seed.

    Raises:
        ConfigError: if the order is no permutation, or is given together with a seed.
    """
    if class_order is None:
        if seed is None:
            return tuple(range(num_classes))
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randperm(num_classes, generator=generator).tolist())
    if seed is not None:
        raise ConfigError.of("seed", seed, "None where class_order is given")
    if sorted(class_order) != list(range(num_classes)):
        raise ConfigError.of(
            "class_order", tuple(class_order), f"every class 0 .. {num_classes - 1} once"
        )
    return tuple(class_order)


def placed(records: Records, rows: Tensor, index: int, rule: str) -> Records:
    """Take the rows of experience `index` as a separate partition, with its public rule."""
    taken = records.take(rows.to(records.inputs.device))
    return replace(taken, partition=f"experience-{index}", placed_by=rule)


def expected_sizes(
    data: Dataset, declared_size: int | Sequence[int] | None, shares: Sequence[float]
) -> list[int | None]:
    """Return the declared size of every experience: given, or a share of the data set's size.

    None if neither the caller nor the data set declares a size.
    """
    if declared_size is not None or data.train.size_counted:
        return size_of_each(declared_size, len(shares))
    return [max(1, round(data.train.declared_size * share)) for share in shares]


def with_sizes(parts: Sequence[Experience], sizes: Sequence[int | None]) -> tuple[Experience, ...]:
    """Return the experiences with these declared sizes; None keeps the size of an experience."""
    return tuple(
        replace(part, train=part.train.declared(size))
        for part, size in zip(parts, sizes, strict=True)
    )
