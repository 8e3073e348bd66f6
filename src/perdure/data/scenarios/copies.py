"""Scenarios in which every experience has all records: unchanged, permuted, or rotated."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.data.datasets.base import Dataset, require_data_set
from perdure.data.experience import Experience, Stream
from perdure.data.row_view import changed_rows
from perdure.data.scenarios.places import placing_rule
from perdure.errors import ConfigError
from perdure.tasks import SingleLabel, refuse_other_tasks
from perdure.types import SCENARIOS, Scenario
from perdure.utils.checked_arguments import checked_arguments


@checked_arguments
def joint(data: Dataset, *, declared_size: int | None = None) -> Stream:
    """Make a stream of one experience with all records, as an upper bound for other streams.

    Guarantee: records keep the partition of the data set.

    Args:
        data: the source.
        declared_size: public number of training records. Default: as in `data`.
    """
    require_data_set(data)
    rule = placing_rule("whole", data, sizes=declared_size)
    whole = Experience(
        index=0,
        train=replace(data.train.declared(declared_size), placed_by=rule),
        test=data.test,
        classes=tuple(range(data.num_classes)),
    )
    return Stream(
        name=f"joint-{data.name}",
        scenario="domain",
        experiences=(whole,),
        num_classes=data.num_classes,
        input_shape=data.input_shape,
        assigned_by_record=True,
    )


@checked_arguments
def permuted(
    data: Dataset,
    *,
    experiences: int,
    seed: int = 0,
    first_identity: bool = True,
    scenario: Scenario = "domain",
    declared_size: int | None = None,
) -> Stream:
    """Make experiences with all records each, whose inputs are permuted in different fixed orders.

    Guarantee: a copy keeps the id of the record and the partition of the data set. One image is one
    record, and its privacy costs in all experiences add up.

    Args:
        data: the source. Inputs below 256 MiB are copied in memory, once per experience; larger
            inputs are permuted batch by batch.
        experiences: number of experiences, at least 1.
        seed: seed of the permutations.
        first_identity: do not permute the first experience.
        scenario: domain keeps the labels and a head over the C classes; task and class give
            experience e the labels y + e*C, and a head over C * experiences.
        declared_size: public number of training records, all of which are in every experience.
            Default: as in `data`.

    Raises:
        ConfigError: if there are no experiences, or the scenario is not known.

    Source: Goodfellow et al. 2014, "An empirical investigation of catastrophic forgetting".
    """
    require_data_set(data)
    if experiences < 1:
        raise ConfigError.of("experiences", experiences, "whole numbers from 1")
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(data.input_shape)
    orders = [torch.randperm(size, generator=generator) for _ in range(experiences)]
    if first_identity:
        orders[0] = torch.arange(size)
    changes = [partial(permute, order=order) for order in orders]
    return _copies(data, f"permuted-{data.name}", scenario, changes, declared_size)


@checked_arguments
def rotated(
    data: Dataset,
    *,
    angles: Sequence[float] = (0.0, 45.0, 90.0, 135.0),
    declared_size: int | None = None,
) -> Stream:
    """Make experiences with all images each, rotated by another angle (domain-incremental).

    Guarantee: as for `permuted`, the privacy costs of one image add up.

    Args:
        data: the source, inputs (channels, height, width). Inputs below 256 MiB are copied in
            memory, once per angle; larger inputs are rotated batch by batch.
        angles: degrees, counter-clockwise, one experience each.
        declared_size: public number of training records, all of which are in every experience.
            Default: as in `data`.

    Raises:
        ConfigError: if there are no angles, or inputs are not images.

    Source: Lopez-Paz and Ranzato 2017, "Gradient episodic memory", section 5.1.
    """
    require_data_set(data)
    if len(data.input_shape) != 3:
        raise ConfigError.of(
            "input_shape", data.input_shape, "(channels, height, width), to be rotated"
        )
    if not angles:
        raise ConfigError.of("angles", tuple(angles), "at least one angle in degrees")
    changes = [partial(rotate, degrees=angle) for angle in angles]
    return _copies(data, f"rotated-{data.name}", "domain", changes, declared_size)


def permute(inputs: Tensor, *, order: Tensor) -> Tensor:
    """Reorder the values of every input (n, ...) by an order of shape (size of one input,)."""
    return inputs.flatten(1)[:, order.to(inputs.device)].reshape(inputs.shape)


def rotate(images: Tensor, *, degrees: float) -> Tensor:
    """Rotate images (n, channels, height, width) counter-clockwise, bilinear, zeros outside."""
    if degrees % 360 == 0:
        return images
    sine = math.sin(math.radians(degrees))
    cosine = math.cos(math.radians(degrees))
    # grid_sample scales both axes to -1 .. 1; without the ratio, other images than squares would be
    # sheared
    ratio = images.shape[-2] / images.shape[-1]
    turn = images.new_tensor([[cosine, -sine * ratio, 0.0], [sine / ratio, cosine, 0.0]])
    grid = F.affine_grid(turn.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _copies(
    data: Dataset,
    name: str,
    scenario: Scenario,
    changes: Sequence[Callable[[Tensor], Tensor]],
    declared_size: int | None,
) -> Stream:
    """Make a stream with one experience per change of the inputs, each with all records."""
    if scenario not in SCENARIOS:
        raise ConfigError.of("scenario", scenario, SCENARIOS)
    if scenario != "domain":
        reason = 'every copy has classes of its own; scenario="domain" keeps the labels'
        refuse_other_tasks(data.task, (SingleLabel,), name, reason)
    step = 0 if scenario == "domain" else data.num_classes
    rule = placing_rule("whole", data, sizes=declared_size)
    parts = []
    for index, change in enumerate(changes):
        train, test = (
            replace(
                records,
                inputs=changed_rows(records.inputs, change),
                labels=records.labels + index * step if step else records.labels,
                placed_by=rule,
                # a rotated image has zeros in its corners
                domain=records.domain and records.domain.including(0.0),
            )
            for records in (data.train.declared(declared_size), data.test)
        )
        classes = tuple(range(index * step, index * step + data.num_classes))
        parts.append(Experience(index=index, train=train, test=test, classes=classes))
    return Stream(
        name=name,
        scenario=scenario,
        experiences=tuple(parts),
        num_classes=data.num_classes + step * (len(parts) - 1),
        input_shape=data.input_shape,
        assigned_by_record=True,
    )
