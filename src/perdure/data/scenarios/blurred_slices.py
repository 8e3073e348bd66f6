"""Scenario with slices of the classes whose boundaries are blurred."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from perdure.data.datasets.base import Dataset, require_data_set
from perdure.data.experience import Stream
from perdure.data.records import Records
from perdure.data.scenarios.class_slices import split
from perdure.data.scenarios.places import (
    expected_sizes,
    hashable,
    placed,
    placing_rule,
    public_coin,
    with_sizes,
)
from perdure.errors import ConfigError
from perdure.utils.checked_arguments import checked_arguments


@checked_arguments
def blurry(
    data: Dataset,
    *,
    experiences: int | None = None,
    increments: Sequence[int] | None = None,
    blurry_share: float = 0.1,
    disjoint_share: float = 0.0,
    class_order: Sequence[int] | None = None,
    seed: int = 0,
    declared_size: int | Sequence[int] | None = None,
) -> Stream:
    """Make a class-incremental stream in which some records of a class are in other experiences.

    A record of a blurry class leaves the main experience of its class with probability
    `blurry_share`, and goes to one of the other experiences with equal probabilities. Test records
    are always in the main experience of their class.

    Guarantee: both random choices are a hash of the record's id and the public seed. So the
    experience of a record depends only on the record and public facts, and experiences are separate
    partitions. Records without given ids are hashed by their position; `assigned_by_record` is then
    False.

    Args:
        data: the source.
        experiences: number of experiences, at least 2; a divisor of the number of classes. Give
            this or `increments`.
        increments: number of classes per experience, as in `split`.
        blurry_share: expected share of records that leave, in [0, 1].
        disjoint_share: share of classes whose records never leave, in [0, 1]; `seed` chooses these
            classes.
        class_order: classes in the order of training. Default: 0 .. C-1.
        seed: public seed of the hash.
        declared_size: public number of training records of an experience, one for all or one each.
            Default: the number expected from the shares and the declared size of `data`; without
                one,
            the actual number.

    Raises:
        ConfigError: if a share is outside [0, 1], if the class order is not a permutation, if the
            slices do not add up to all classes, or if `declared_size` is neither one number nor one
            number per experience.

    Source: Bang et al. 2021, "Rainbow memory", section 3; disjoint classes: Koh et al. 2022,
    "Online continual learning on class incremental blurry task configuration with anytime
    inference".
    """
    require_data_set(data)
    for field, share in (("blurry_share", blurry_share), ("disjoint_share", disjoint_share)):
        if not 0 <= share <= 1:
            raise ConfigError.of(field, share, "numbers from 0 to 1")
    home = split(
        data,
        scenario="class",
        experiences=experiences,
        increments=increments,
        class_order=class_order,
    )
    if len(home) < 2:
        raise ConfigError.of("experiences", len(home), "whole numbers from 2")
    is_blurry = torch.ones(data.num_classes, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randperm(data.num_classes, generator=generator)
    is_blurry[choice[: round(disjoint_share * data.num_classes)]] = False
    visitors: set[int] = set(is_blurry.nonzero().flatten().tolist()) if blurry_share else set()
    place = _blurred_place(data.train, home, is_blurry, blurry_share, seed)
    sizes = expected_sizes(data, declared_size, _blurred_shares(home, is_blurry, blurry_share))
    rule = placing_rule(
        "blurry",
        data,
        slices=[part.classes for part in home],
        blurry=is_blurry.tolist(),
        share=blurry_share,
        seed=seed,
        sizes=sizes,
    )
    parts = [
        replace(
            part,
            train=placed(data.train, place == part.index, part.index, rule),
            classes=tuple(sorted({*part.classes, *visitors})),
        )
        for part in home
    ]
    return replace(
        home,
        name=f"blurry-{data.name}",
        experiences=with_sizes(parts, sizes),
        assigned_by_record=hashable(home),
    )


def _blurred_shares(home: Stream, is_blurry: Tensor, share: float) -> list[float]:
    """Return the expected share of all records in each experience, with equally large classes."""
    leaving = [share * int(is_blurry[list(part.classes)].sum()) for part in home]
    return [
        (len(part.classes) - out + (sum(leaving) - out) / (len(home) - 1)) / home.num_classes
        for part, out in zip(home, leaving, strict=True)
    ]


def _blurred_place(
    records: Records, home: Stream, is_blurry: Tensor, share: float, seed: int
) -> Tensor:
    """Return (n,) index of the experience that each record goes to."""
    home_of = torch.empty(home.num_classes, dtype=torch.int64)
    for part in home:
        home_of[list(part.classes)] = part.index
    labels = records.labels.cpu()
    leaves = is_blurry[labels] & (public_coin(records.ids, seed=seed, purpose=1) < share)
    others = public_coin(records.ids, seed=seed, purpose=2) * (len(home) - 1)
    return (home_of[labels] + torch.where(leaves, 1 + others.long(), 0)) % len(home)
