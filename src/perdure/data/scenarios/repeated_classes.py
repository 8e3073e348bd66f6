"""Scenario with repeated classes: class-incremental with repetition."""

from collections.abc import Sequence

import torch
from torch import Tensor

from perdure.data.datasets.base import Dataset, require_data_set
from perdure.data.experience import Experience, Stream
from perdure.data.records import Records
from perdure.data.scenarios.places import (
    arrival_order,
    expected_sizes,
    placed,
    placing_rule,
    public_coin,
    with_sizes,
)
from perdure.errors import ConfigError
from perdure.tasks import SingleLabel, refuse_other_tasks
from perdure.utils.checked_arguments import checked_arguments


@checked_arguments
def repetition(
    data: Dataset,
    *,
    experiences: int,
    first_probability: float = 0.3,
    repeat_probability: float = 0.2,
    class_order: Sequence[int] | None = None,
    seed: int = 0,
    declared_size: int | Sequence[int] | None = None,
) -> Stream:
    """Make a class-incremental stream with repetition: classes arrive at random and come back.

        first(c) ~ Geometric(first_probability), at most experiences - 1
        c is in experience e > first(c) with probability repeat_probability

    The first class of the order arrives in experience 0. An experience without any class gets a
    class that arrived before. Every record is in one experience, chosen with equal probabilities
    among the experiences with its class. Test records are in the experience in which their class
    arrives. Experiences without test records have NaN in their columns of the accuracy matrix.

    Guarantee: the classes of the experiences follow from the public seed alone. The experience of a
    record depends only on its label and a hash of its id, so experiences are separate partitions.
    Records without given ids are hashed by their position; `assigned_by_record` is then False.

    Args:
        data: the source.
        experiences: number of experiences, at least 1.
        first_probability: probability in (0, 1] that a class that has not arrived yet arrives in
            the next experience; with 1 all classes arrive in experience 0.
        repeat_probability: probability in [0, 1] that a class is in a given experience after the
            one in which it arrives.
        class_order: order of the classes; the first one arrives in experience 0. Default: 0 .. C-1.
        seed: public seed of all random choices.
        declared_size: public number of training records of an experience, one for all or one each.
            Default: the number expected from the declared size of `data`, with equally large
                classes;
            without a declared size, the actual number.

    Raises:
        ConfigError: if a probability is out of range, if there are no experiences, if the class
            order is not a permutation, or if `declared_size` is neither one number nor one number
            per experience.

    Source: Hemati et al. 2023, "Class-incremental learning with repetition" (the sampling-based
    generator, every record once).
    """
    require_data_set(data)
    refuse_other_tasks(
        data.task, (SingleLabel,), "repetition", "it places by the class of a record"
    )
    if experiences < 1:
        raise ConfigError.of("experiences", experiences, "whole numbers from 1")
    if not 0 < first_probability <= 1:
        raise ConfigError.of("first_probability", first_probability, "above 0, at most 1")
    if not 0 <= repeat_probability <= 1:
        raise ConfigError.of("repeat_probability", repeat_probability, "numbers from 0 to 1")
    order = arrival_order(data.num_classes, class_order, None)
    table = _occurrences(order, experiences, first_probability, repeat_probability, seed)
    counts = table.sum(0)
    sizes = expected_sizes(data, declared_size, (table / counts).mean(1).tolist())
    place = _places(data.train, table, seed)
    arrives_in = table.long().argmax(0)
    rule = placing_rule("repetition", data, occurrences=table.tolist(), seed=seed, sizes=sizes)
    parts = [
        Experience(
            index=index,
            train=placed(data.train, place == index, index, rule),
            test=data.test.take(arrives_in.to(data.test.labels.device)[data.test.labels] == index),
            classes=tuple(table[index].nonzero().flatten().tolist()),
        )
        for index in range(experiences)
    ]
    return Stream(
        name=f"repetition-{data.name}",
        scenario="class",
        experiences=with_sizes(parts, sizes),
        num_classes=data.num_classes,
        input_shape=data.input_shape,
        assigned_by_record=not data.train.ids_by_position,
    )


def _occurrences(
    order: Sequence[int], experiences: int, first: float, repeat: float, seed: int
) -> Tensor:
    """Draw the classes of every experience: (T, C) bool, True if experience t has class c.

    Each class is in at least one experience.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(len(order), generator=generator, dtype=torch.float64)
    # inverse of the geometric distribution; log1p(-1) is -inf, and the quotient 0
    arrives = ((-uniform).log1p() / torch.tensor(-first, dtype=torch.float64).log1p()).floor()
    arrives = arrives.clamp(max=experiences - 1).long()
    arrives[order[0]] = 0
    moments = torch.arange(experiences)[:, None]
    again = torch.rand(experiences, len(order), generator=generator) < repeat
    table = (moments == arrives) | ((moments > arrives) & again)
    for index in (~table.any(1)).nonzero().flatten().tolist():
        seen = (arrives < index).nonzero().flatten()
        table[index, seen[int(torch.randint(len(seen), (), generator=generator))]] = True
    return table


def _places(records: Records, table: Tensor, seed: int) -> Tensor:
    """Return (n,) index of the experience of each record, one of the experiences with its class."""
    labels = records.labels.cpu()
    # rank-th experience with the class, the first being rank 1
    ranks = table.long().cumsum(0)
    counts = ranks[-1]
    rank = (public_coin(records.ids, seed=seed) * counts[labels]).long()
    homes = [table[:, label].nonzero().flatten() for label in range(table.shape[1])]
    width = int(counts.max())
    padded = torch.stack([torch.nn.functional.pad(home, (0, width - len(home))) for home in homes])
    return padded[labels, rank]
