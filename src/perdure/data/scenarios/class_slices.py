"""Scenario with slices of the classes, one slice per experience."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from perdure.data.datasets.base import Dataset, require_data_set
from perdure.data.experience import Experience, Stream
from perdure.data.scenarios.places import (
    arrival_order,
    expected_sizes,
    placed,
    placing_rule,
    with_sizes,
)
from perdure.errors import ConfigError
from perdure.tasks import SingleLabel, refuse_other_tasks
from perdure.types import SCENARIOS, Scenario
from perdure.utils.checked_arguments import checked_arguments


@checked_arguments
def split(
    data: Dataset,
    *,
    scenario: Scenario,
    experiences: int | None = None,
    increments: Sequence[int] | None = None,
    class_order: Sequence[int] | None = None,
    seed: int | None = None,
    declared_size: int | Sequence[int] | None = None,
) -> Stream:
    """Cut the classes into slices, one experience each: equal ones, or of given widths.

    Task- and class-incremental streams keep the labels and need a head over all C classes. In a
    domain-incremental stream a label is the *position within the slice*, and the head has C /
    experiences outputs (for example, pairs of digits become the classes even and odd).

    >>> stream = split(data, scenario="class", increments=(50, 10, 10, 10, 10, 10))

    Guarantee: the experience of a record depends only on its label and the public class order, so
    experiences are separate partitions.

    Args:
        data: the source.
        scenario: task, domain or class.
        experiences: number of experiences; a divisor of the number of classes. Give this or
            `increments`.
        increments: number of new classes in each experience, at least 1, with sum C; equal numbers
            in a domain-incremental stream.
        class_order: classes in the order of training. Default: 0 .. C-1, or a random order if
            `seed` is given.
        seed: seed of a random class order.
        declared_size: public number of training records of an experience, one for all or one each.
            Default: the share of its classes in the declared size of `data`; without one, the
                actual
            size.

    Raises:
        ConfigError: if the class order is not a permutation or is given together with a seed; if
            the classes cannot be cut into these slices; if `declared_size` is neither one number
            nor one number per experience.

    Source: van de Ven, Tuytelaars, Tolias 2022, "Three types of incremental learning".
    """
    require_data_set(data)
    if scenario not in SCENARIOS:
        raise ConfigError.of("scenario", scenario, SCENARIOS)
    reason = "it cuts by the class of a record; by_time, by_domain and joint serve every task"
    refuse_other_tasks(data.task, (SingleLabel,), "split", reason)
    order = arrival_order(data.num_classes, class_order, seed)
    widths = _slice_widths(data.num_classes, experiences, increments, scenario)
    ends = accumulate(widths)
    slices = [order[end - width : end] for end, width in zip(ends, widths, strict=True)]
    sizes = expected_sizes(data, declared_size, [width / len(order) for width in widths])
    rule = placing_rule("split", data, scenario=scenario, slices=slices, sizes=sizes)
    parts = [_slice_of(data, index, classes, rule) for index, classes in enumerate(slices)]
    width = widths[0]
    if scenario == "domain":
        position = torch.empty(data.num_classes, dtype=torch.int64)
        position[list(order)] = torch.arange(data.num_classes) % width
        parts = [_relabelled(part, position, tuple(range(width))) for part in parts]
    return Stream(
        name=f"split-{data.name}",
        scenario=scenario,
        experiences=with_sizes(parts, sizes),
        num_classes=width if scenario == "domain" else data.num_classes,
        input_shape=data.input_shape,
        assigned_by_record=True,
    )


def _slice_widths(
    num_classes: int, experiences: int | None, increments: Sequence[int] | None, scenario: Scenario
) -> list[int]:
    """Return the number of classes of each experience."""
    if (experiences is None) == (increments is None):
        given = f"experiences={experiences}, increments={increments}"
        raise ConfigError.of("slices", given, "exactly one of experiences and increments")
    if increments is None:
        divisors = [count for count in range(1, num_classes + 1) if num_classes % count == 0]
        if experiences not in divisors:
            raise ConfigError.of("experiences", experiences, divisors)
        return [num_classes // experiences] * experiences
    widths = list(increments)
    whole = all(isinstance(width, int) and width >= 1 for width in widths)
    if not whole or sum(widths) != num_classes:
        allowed = f"whole numbers from 1 that add up to {num_classes}, the number of classes"
        raise ConfigError.of("increments", tuple(widths), allowed)
    if scenario == "domain" and len(set(widths)) > 1:
        allowed = "equal ones in a domain-incremental stream, whose experiences share their labels"
        raise ConfigError.of("increments", tuple(widths), allowed)
    return widths


def _slice_of(data: Dataset, index: int, classes: tuple[int, ...], rule: str) -> Experience:
    train, test = (
        torch.isin(part.labels, part.labels.new_tensor(classes)) for part in (data.train, data.test)
    )
    return Experience(
        index=index,
        train=placed(data.train, train, index, rule),
        test=data.test.take(test),
        classes=classes,
    )


def _relabelled(part: Experience, table: Tensor, classes: tuple[int, ...]) -> Experience:
    """Replace the labels of an experience by the values that `table` has for them."""
    train, test = (
        replace(records, labels=table.to(records.labels.device)[records.labels])
        for records in (part.train, part.test)
    )
    return replace(part, train=train, test=test, classes=classes)
