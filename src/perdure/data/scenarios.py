"""Streams of experiences.

Splits by class, permuted and rotated copies, one-pass and blurry streams.

Which privacy history (*partition*) a record belongs to is decided here:

- Where a record's experience is a function of the record itself and of public facts (its label and
  the class order; a hash of its id and a public seed), adding or removing one record touches one
  experience only. Experiences are then disjoint partitions, called experience-0, experience-1, and
  so on.
- Where the same record turns up in several experiences (permuted and rotated copies), its id and
  the partition of its origin stay with it: one image is one record, and its uses compose.
- Where the place of a record depends on which *other* records are present (a cut after every so
  many records; a hash of ids that are positions; a number of pieces that follows the number of
  records), adding one record moves others. Such a stream says `assigned_by_record = False`, and no
  guarantee under add/remove adjacency holds for it.

Sizes are public. Every splitter takes `declared_size`; where a data set declares the size of its
training part, the sizes of experiences follow from it and from public shares, every class counting
the same. Where nothing is declared, the realised sizes are declared public.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.data.datasets.base import Dataset
from perdure.data.experience import Experience, Stream, placed_again, size_of_each
from perdure.data.records import Records
from perdure.data.row_view import changed_rows
from perdure.errors import ConfigError
from perdure.tasks import SingleLabel, refuse_other_tasks
from perdure.types import SCENARIOS, Scenario
from perdure.utils.hashing import canonical, canonical_text, hashed, shifted


def split(
    data: Dataset,
    *,
    scenario: Scenario,
    experiences: int,
    class_order: Sequence[int] | None = None,
    seed: int | None = None,
    declared_size: int | Sequence[int] | None = None,
) -> Stream:
    """Cut the classes into equal slices, one experience each.

    Task- and class-incremental streams keep the labels and have a head over all classes C. In the
    domain-incremental stream a label is the *position within the slice*, and the head has C /
    experiences outputs (pairs of digits become even against odd).

    Guarantee: a record's experience is a function of its label and the public class order, so
    experiences are disjoint partitions.

    Args:
        data: the source.
        scenario: task, domain or class.
        experiences: how many; a divisor of the number of classes.
        class_order: the classes in the order of their arrival. Default: 0 .. C-1, or random by
            `seed`.
        seed: of a random class order.
        declared_size: public number of training records of an experience, one for all or one each.
            Default: the share of its classes in the declared size of `data`, else the realised
            one.

    Raises:
        ConfigError: for a class order that is no permutation or comes beside a seed; for unequal
            slices; for other than one size, or one an experience.

    Source: van de Ven, Tuytelaars, Tolias 2022, "Three types of incremental learning".
    """
    if scenario not in SCENARIOS:
        raise ConfigError.of("scenario", scenario, SCENARIOS)
    refuse_other_tasks(data.task, (SingleLabel,), "split", "it cuts by the class of a record")
    order = _class_order(data.num_classes, class_order, seed)
    width = _slice_width(data.num_classes, experiences)
    slices = [order[start : start + width] for start in range(0, data.num_classes, width)]
    sizes = _sizes(data, declared_size, [1 / experiences] * experiences)
    rule = placing_rule("split", data, scenario=scenario, slices=slices, sizes=sizes)
    parts = [_slice_of(data, index, classes, rule) for index, classes in enumerate(slices)]
    if scenario == "domain":
        position = torch.empty(data.num_classes, dtype=torch.int64)
        position[list(order)] = torch.arange(data.num_classes) % width
        parts = [_relabelled(part, position, tuple(range(width))) for part in parts]
    return Stream(
        name=f"split-{data.name}",
        scenario=scenario,
        experiences=_with_sizes(parts, sizes),
        num_classes=width if scenario == "domain" else data.num_classes,
        input_shape=data.input_shape,
        assigned_by_record=True,
    )


def permuted(
    data: Dataset,
    *,
    experiences: int,
    seed: int = 0,
    first_identity: bool = True,
    scenario: Scenario = "domain",
    declared_size: int | None = None,
) -> Stream:
    """Every experience holds all records, with the numbers of an input in another fixed order.

    Guarantee: a copy keeps the record's id and the partition of its origin. One image is one
    record, and what the experiences spend on it composes.

    Args:
        data: the source. Copies of its inputs are held in memory, one for each experience, where
            they are below 256 MiB; larger inputs are permuted batch by batch.
        experiences: how many, from 1.
        seed: of the permutations.
        first_identity: whether the first experience is left as it is.
        scenario: domain keeps the labels and a head over the C classes; task and class give
            experience e the labels y + e*C, and a head over C * experiences.
        declared_size: public number of training records, all of which are in every experience.
            Default: as in `data`.

    Raises:
        ConfigError: for no experiences or another scenario.

    Source: Goodfellow et al. 2014, "An empirical investigation of catastrophic forgetting".
    """
    if experiences < 1:
        raise ConfigError.of("experiences", experiences, "whole numbers from 1")
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(data.input_shape)
    orders = [torch.randperm(size, generator=generator) for _ in range(experiences)]
    if first_identity:
        orders[0] = torch.arange(size)
    changes = [partial(permute, order=order) for order in orders]
    return _copies(data, f"permuted-{data.name}", scenario, changes, declared_size)


def rotated(
    data: Dataset,
    *,
    angles: Sequence[float] = (0.0, 45.0, 90.0, 135.0),
    declared_size: int | None = None,
) -> Stream:
    """Every experience holds all images, turned by another angle; domain-incremental.

    Guarantee: as for `permuted`, the uses of one image compose.

    Args:
        data: the source, inputs (channels, height, width). A turned copy of its inputs is held per
            angle where they are below 256 MiB; larger inputs are turned batch by batch.
        angles: degrees, counter-clockwise, one experience each.
        declared_size: public number of training records, all of which are in every experience.
            Default: as in `data`.

    Raises:
        ConfigError: for no angles, or inputs that are no images.

    Source: Lopez-Paz and Ranzato 2017, "Gradient episodic memory", section 5.1.
    """
    if len(data.input_shape) != 3:
        raise ConfigError.of(
            "input_shape", data.input_shape, "(channels, height, width), to be rotated"
        )
    if not angles:
        raise ConfigError.of("angles", tuple(angles), "at least one angle in degrees")
    changes = [partial(rotate, degrees=angle) for angle in angles]
    return _copies(data, f"rotated-{data.name}", "domain", changes, declared_size)


def online(stream: Stream, *, chunk: int, seed: int = 0, exact: bool = True) -> Stream:
    """Cut every experience into small ones, to be seen once each.

    Classes and test records are the parent's.

    Guarantee: partitions are the parent's, so what the pieces spend composes. With `exact`, every
    piece has `chunk` records (the last has the rest): the field's protocol, but one more record
    moves others into the next piece, so the stream says `assigned_by_record = False`. Without, a
    hash of the record's id and the seed picks the piece: sizes vary around `chunk`, and adding or
    removing a record changes one piece only. That holds where the parent's size was declared, as
    the number of pieces follows from it, and records came with ids; else the stream says
    `assigned_by_record = False` too.

    Args:
        stream: the parent. `stage` of a piece is the index of its parent.
        chunk: records in a piece; without `exact` the declared size, which is met on average.
        seed: of the order, public.
        exact: whether the size is exact.

    Raises:
        ConfigError: for a chunk below 1.

    Source: Mai et al. 2022, "Online continual learning in image classification: an empirical
    survey".
    """
    if chunk < 1:
        raise ConfigError.of("chunk", chunk, "whole numbers from 1")
    cut = _exact_pieces if exact else _hashed_pieces
    pieces = [(parent, piece) for parent in stream for piece in cut(parent.train, chunk, seed)]
    experiences = tuple(
        replace(parent, index=index, train=piece) for index, (parent, piece) in enumerate(pieces)
    )
    counted = any(parent.train.size_counted for parent in stream)
    kept = placed_again(stream, not exact and not counted and hashable(stream))
    return replace(
        stream, name=f"online-{stream.name}", experiences=experiences, assigned_by_record=kept
    )


def blurry(
    data: Dataset,
    *,
    experiences: int,
    blurry_share: float = 0.1,
    disjoint_share: float = 0.0,
    class_order: Sequence[int] | None = None,
    seed: int = 0,
    declared_size: int | Sequence[int] | None = None,
) -> Stream:
    """Class-incremental slices with blurred boundaries.

    A share of a class turns up in other experiences.

    A record of a blurry class leaves its class's own experience with probability `blurry_share` and
    goes to one of the others, all alike. Test records stay with their class's own experience.

    Guarantee: both coins are a hash of the record's id and the public seed, so that the place is a
    function of the record and public facts, and experiences are disjoint partitions. Records
    without ids of their own are hashed by their position, and the stream says
    `assigned_by_record = False`.

    Args:
        data: the source.
        experiences: how many, from 2; a divisor of the number of classes.
        blurry_share: expected share of records that leave, in [0, 1].
        disjoint_share: share of classes that never leave (their choice is random by `seed`), in [0,
            1].
        class_order: the classes in the order of their arrival. Default: 0 .. C-1.
        seed: public.
        declared_size: public number of training records of an experience, one for all or one each.
            Default: the number expected from the shares and the declared size of `data`, else the
            realised one.

    Raises:
        ConfigError: for a share outside [0, 1], a class order that is no permutation, slices of
            unequal size, or other than one size, or one an experience.

    Source: Bang et al. 2021, "Rainbow memory", section 3; disjoint classes: Koh et al. 2022,
    "Online continual learning on class incremental blurry task configuration with anytime
    inference".
    """
    for field, share in (("blurry_share", blurry_share), ("disjoint_share", disjoint_share)):
        if not 0 <= share <= 1:
            raise ConfigError.of(field, share, "numbers from 0 to 1")
    if experiences < 2:
        raise ConfigError.of("experiences", experiences, "whole numbers from 2")
    home = split(data, scenario="class", experiences=experiences, class_order=class_order)
    is_blurry = torch.ones(data.num_classes, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randperm(data.num_classes, generator=generator)
    is_blurry[choice[: round(disjoint_share * data.num_classes)]] = False
    visitors: set[int] = set(is_blurry.nonzero().flatten().tolist()) if blurry_share else set()
    place = _blurred_place(data.train, home, is_blurry, blurry_share, seed)
    sizes = _sizes(data, declared_size, _blurred_shares(home, is_blurry, blurry_share))
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
            train=_partition(data.train, place == part.index, part.index, rule),
            classes=tuple(sorted({*part.classes, *visitors})),
        )
        for part in home
    ]
    return replace(
        home,
        name=f"blurry-{data.name}",
        experiences=_with_sizes(parts, sizes),
        assigned_by_record=hashable(home),
    )


def hashable(stream: Stream) -> bool:
    """Return whether the training records came with ids, so that a hash of them is their own."""
    return not any(experience.train.ids_by_position for experience in stream)


def permute(inputs: Tensor, *, order: Tensor) -> Tensor:
    """Reorder the numbers of every input (n, ...) by an order (size of one input,)."""
    return inputs.flatten(1)[:, order.to(inputs.device)].reshape(inputs.shape)


def rotate(images: Tensor, *, degrees: float) -> Tensor:
    """Turn images (n, channels, height, width) counter-clockwise, bilinear, zero outside."""
    if degrees % 360 == 0:
        return images
    sine = math.sin(math.radians(degrees))
    cosine = math.cos(math.radians(degrees))
    # grid_sample measures both axes from -1 to 1: without the ratio an oblong image would be
    # sheared
    ratio = images.shape[-2] / images.shape[-1]
    turn = images.new_tensor([[cosine, -sine * ratio, 0.0], [sine / ratio, cosine, 0.0]])
    grid = F.affine_grid(turn.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def placing_rule(kind: str, data: Dataset, **facts: object) -> str:
    """Return a digest that names the rule by which the records of a data set are placed.

    From public facts alone: the data set's name, its size where one was declared, and all that
    decides which partition a record goes to. A size that was counted would change with a record.
    """
    size = None if data.train.size_counted else data.train.declared_size
    whole = {"data": data.name, "size": size, "classes": data.num_classes}
    return sha256(canonical_text(canonical({"rule": kind, **whole, **facts})).encode()).hexdigest()


def public_coin(ids: Tensor, *, seed: int, purpose: int = 0) -> Tensor:
    """Hash record ids to [0, 1): a coin that belongs to the record, (n,) float64 on the CPU.

    Guarantee: none; everyone can compute it. It says which experience a record belongs to, and is
    never used for noise or for membership that must stay secret.

    Source: see `perdure.utils.hashing`.
    """
    return shifted(hashed(ids.cpu(), seed, purpose), 11).double() * 2.0**-53


def _class_order(
    num_classes: int, class_order: Sequence[int] | None, seed: int | None
) -> tuple[int, ...]:
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


def _slice_width(num_classes: int, experiences: int) -> int:
    divisors = [count for count in range(1, num_classes + 1) if num_classes % count == 0]
    if experiences not in divisors:
        raise ConfigError.of("experiences", experiences, divisors)
    return num_classes // experiences


def _slice_of(data: Dataset, index: int, classes: tuple[int, ...], rule: str) -> Experience:
    train, test = (
        torch.isin(part.labels, part.labels.new_tensor(classes)) for part in (data.train, data.test)
    )
    return Experience(
        index=index,
        train=_partition(data.train, train, index, rule),
        test=data.test.take(test),
        classes=classes,
    )


def _partition(records: Records, rows: Tensor, index: int, rule: str) -> Records:
    taken = records.take(rows.to(records.inputs.device))
    return replace(taken, partition=f"experience-{index}", placed_by=rule)


def _relabelled(part: Experience, table: Tensor, classes: tuple[int, ...]) -> Experience:
    """Give the experience the labels that `table` holds for its own."""
    train, test = (
        replace(records, labels=table.to(records.labels.device)[records.labels])
        for records in (part.train, part.test)
    )
    return replace(part, train=train, test=test, classes=classes)


def _copies(
    data: Dataset,
    name: str,
    scenario: Scenario,
    changes: Sequence[Callable[[Tensor], Tensor]],
    declared_size: int | None,
) -> Stream:
    """One experience of all records for each change of the inputs."""
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
                # a turned image is 0 in its corners
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


def _sizes(
    data: Dataset, declared_size: int | Sequence[int] | None, shares: Sequence[float]
) -> list[int | None]:
    """Declared size of every experience; None where neither caller nor data set declares one."""
    if declared_size is not None or data.train.size_counted:
        return size_of_each(declared_size, len(shares))
    return [max(1, round(data.train.declared_size * share)) for share in shares]


def _with_sizes(parts: Sequence[Experience], sizes: Sequence[int | None]) -> tuple[Experience, ...]:
    return tuple(
        replace(part, train=part.train.declared(size))
        for part, size in zip(parts, sizes, strict=True)
    )


def _blurred_shares(home: Stream, is_blurry: Tensor, share: float) -> list[float]:
    """Expected share of all records in each experience, every class counting the same."""
    leaving = [share * int(is_blurry[list(part.classes)].sum()) for part in home]
    return [
        (len(part.classes) - out + (sum(leaving) - out) / (len(home) - 1)) / home.num_classes
        for part, out in zip(home, leaving, strict=True)
    ]


def _exact_pieces(records: Records, chunk: int, seed: int) -> list[Records]:
    order = public_coin(records.ids, seed=seed).argsort(stable=True).to(records.inputs.device)
    return [records.take(order[start : start + chunk]) for start in range(0, len(records), chunk)]


def _hashed_pieces(records: Records, chunk: int, seed: int) -> list[Records]:
    # from the declared size: a count of the records present would depend on who is among them
    count = math.ceil(records.declared_size / chunk)
    piece = (public_coin(records.ids, seed=seed) * count).long().to(records.inputs.device)
    return [records.take(piece == index).declared(chunk) for index in range(count)]


def _blurred_place(
    records: Records, home: Stream, is_blurry: Tensor, share: float, seed: int
) -> Tensor:
    """Index (n,) of the experience each record goes to."""
    home_of = torch.empty(home.num_classes, dtype=torch.int64)
    for part in home:
        home_of[list(part.classes)] = part.index
    labels = records.labels.cpu()
    leaves = is_blurry[labels] & (public_coin(records.ids, seed=seed, purpose=1) < share)
    others = public_coin(records.ids, seed=seed, purpose=2) * (len(home) - 1)
    return (home_of[labels] + torch.where(leaves, 1 + others.long(), 0)) % len(home)
