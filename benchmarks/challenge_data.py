"""Faulty versions of data sets, for `challenges.py`, which names them as "challenge_data:NAME".

Test records are those of the data set, unchanged, but for `unscaled`, `padded` and `shifted`, whose
fault is in the inputs of both parts or of the test part.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.data import Dataset, Records, adult, digits, mnist
from perdure.utils import generator


def noisy(*, share: float = 0.4, seed: int = 0, each: int | None = None) -> Dataset:
    """Digits of which a share of the training labels is replaced by another class.

    Args:
        share: share of the labels.
        seed: seed of the choice.
        each: number of training records of each class; None for all.
    """
    data = digits()
    if each is not None:
        places = of_each(data.train.labels, [each] * data.num_classes)
        data = replace(data, train=data.train.take(places))
    labels = data.train.labels.clone()
    stream = generator(seed, "label noise")
    chosen = torch.rand(len(labels), generator=stream) < share
    shift = torch.randint(1, data.num_classes, labels.shape, generator=stream)
    labels[chosen] = (labels[chosen] + shift[chosen]) % data.num_classes
    return replace(data, name="noisy_digits", train=with_labels(data.train, labels))


def few(*, each: int = 10) -> Dataset:
    """Digits with a few training records of each class."""
    data = digits()
    places = of_each(data.train.labels, [each] * data.num_classes)
    return replace(data, name="few_digits", train=data.train.take(places))


def second_half(*, each: int | None = None, dimmed: bool = False) -> Dataset:
    """The second half of the training digits.

    Args:
        each: number of training records of each class; None for all.
        dimmed: True for images as a camera with less contrast and some noise shows them.
    """
    data = digits()
    half = len(data.train) // 2
    stream = generator(0, "camera")

    def seen(part: Records) -> Records:
        if not dimmed:
            return part
        noise = torch.randn(part.inputs.shape, generator=stream)
        return with_inputs(part, 0.3 + 0.4 * part.inputs + 0.05 * noise)

    train = data.train.take(slice(half, len(data.train)))
    if each is not None:
        train = train.take(of_each(train.labels, [each] * data.num_classes))
    return replace(data, name="half_of_digits", train=seen(train), test=seen(data.test))


def imbalanced_adult(*, ratio: float = 1.0, records: int = 3_000) -> Dataset:
    """People of Adult, of whom class 0 has `records` and class 1 fewer by `ratio`.

    The test part has 1,500 records of each class, so that accuracy is the mean recall.
    """
    data = adult()
    train = of_each(data.train.labels, [records, round(records / ratio)])
    test = of_each(data.test.labels, [1_500, 1_500])
    return replace(
        data, name="imbalanced_adult", train=data.train.take(train), test=data.test.take(test)
    )


def of_each(labels: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the sorted places of the first records of each class."""
    places = [(labels == c).nonzero().flatten()[:most] for c, most in enumerate(counts)]
    return torch.cat(places).sort().values


def rare(*, each: int = 4) -> Dataset:
    """Digits with a few training records of each of the classes 5 to 9."""
    data = digits()
    places = of_each(data.train.labels, [len(data.train)] * 5 + [each] * 5)
    return replace(data, name="rare_digits", train=data.train.take(places))


def shuffled() -> Dataset:
    """Digits whose training labels belong to random other records."""
    data = digits()
    order = torch.randperm(len(data.train), generator=generator(0, "shuffle"))
    train = with_labels(data.train, data.train.labels[order])
    return replace(data, name="shuffled_digits", train=train)


def shifted(*, pixels: int = 1) -> Dataset:
    """Digits whose test images are moved by some pixels in a direction of their own.

    Pixels that leave the image are lost, and 0 enters at the other side.
    """
    data = digits()
    stream = generator(0, "shifts")
    offsets = torch.randint(0, 2 * pixels + 1, (len(data.test), 2), generator=stream)
    height, width = data.input_shape[-2:]
    wide = F.pad(data.test.inputs, (pixels,) * 4)
    moved = torch.stack(
        [
            image[:, top : top + height, left : left + width]
            for image, (top, left) in zip(wide, offsets.tolist(), strict=True)
        ]
    )
    return replace(data, name="shifted_digits", test=with_inputs(data.test, moved))


def unscaled(
    *, spread: float = 3.0, standardise: Sequence[float] | None = None, each_pixel: bool = False
) -> Dataset:
    """Digits of which each pixel has a unit of its own, between 10^-spread and 10^spread.

    Args:
        spread: largest power of ten of a unit.
        standardise: a mean and a deviation for all pixels; None for none.
        each_pixel: True for pixels with mean 0 and deviation 1 over the training records.
    """
    data = digits()
    powers = torch.rand(data.input_shape, generator=generator(0, "units")) * 2 - 1
    units = 10.0 ** (spread * powers)
    parts = [part.inputs * units for part in (data.train, data.test)]
    if standardise is not None or each_pixel:
        mean, deviation = parts[0].mean(0), parts[0].std(0)
        if standardise is not None:
            mean, deviation = torch.tensor(standardise)
        deviation = deviation.where(deviation > 0, torch.ones(()))
        parts = [(part - mean) / deviation for part in parts]
    return replace(
        data,
        name="unscaled_digits",
        train=with_inputs(data.train, parts[0]),
        test=with_inputs(data.test, parts[1]),
    )


def small_mnist(*, records: int = 5_000) -> Dataset:
    """The first training records of MNIST, of each class a tenth; the test part has 2,000."""
    data = mnist()
    places = of_each(data.train.labels, [records // data.num_classes] * data.num_classes)
    return replace(
        data,
        name="small_mnist",
        train=data.train.take(places),
        test=data.test.take(slice(0, 2_000)),
    )


def padded(*, length: int = 48) -> Dataset:
    """Digits as sequences of 16 tokens, the levels of blocks of 4 pixels, filled with the token 0.

    Args:
        length: length of a sequence with its filling, as one long record would demand it.
    """
    data = digits()

    def tokens(records: Records) -> Records:
        blocks = F.avg_pool2d(records.inputs, 2).flatten(1)
        levels = (blocks * 7).round().long() + 1
        rows = F.pad(levels, (0, length - levels.shape[1]))
        return Records(inputs=rows, labels=records.labels, ids=records.ids)

    return replace(
        data,
        name="padded_digits",
        train=tokens(data.train),
        test=tokens(data.test),
        input_shape=(length,),
    )


def with_labels(records: Records, labels: Tensor) -> Records:
    """Return the records with other labels."""
    return Records(
        inputs=records.inputs,
        labels=labels,
        ids=records.ids,
        partition=records.partition,
        task=records.task,
    )


def with_inputs(records: Records, inputs: Tensor) -> Records:
    """Return the records with other inputs."""
    return Records(
        inputs=inputs,
        labels=records.labels,
        ids=records.ids,
        partition=records.partition,
        task=records.task,
    )
