"""Faulty versions of digits, for `challenges.py`, which names them as "challenge_data:NAME".

Test records are those of the data set, unchanged, but for `unscaled`, `irrelevant` and `shifted`,
whose fault is in the inputs of both parts or of the test part.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from perdure.data import Dataset, Records, digits
from perdure.models import Classifier, mlp
from perdure.utils import generator


def noisy(*, share: float = 0.4, seed: int = 0) -> Dataset:
    """Digits of which a share of the training labels is replaced by another class."""
    data = digits()
    labels = data.train.labels.clone()
    stream = generator(seed, "label noise")
    chosen = torch.rand(len(labels), generator=stream) < share
    shift = torch.randint(1, data.num_classes, labels.shape, generator=stream)
    labels[chosen] = (labels[chosen] + shift[chosen]) % data.num_classes
    return replace(data, name="noisy_digits", train=with_labels(data.train, labels))


def imbalanced(*, ratio: float = 100.0) -> Dataset:
    """Digits of which class c has ratio^(-c/9) of the training records of class 0."""
    data = digits()
    labels = data.train.labels
    kept = []
    for c in range(data.num_classes):
        places = (labels == c).nonzero().flatten()
        share = ratio ** (-c / (data.num_classes - 1))
        kept.append(places[: max(1, round(share * len(places)))])
    chosen = torch.cat(kept).sort().values
    return replace(data, name="imbalanced_digits", train=data.train.take(chosen))


def few(*, each: int = 10) -> Dataset:
    """Digits with a few training records of each class."""
    data = digits()
    labels = data.train.labels
    places = [(labels == c).nonzero().flatten()[:each] for c in range(data.num_classes)]
    return replace(data, name="few_digits", train=data.train.take(torch.cat(places).sort().values))


def shifted(*, pixels: int = 1) -> Dataset:
    """Digits whose test images are moved by some pixels in a direction of their own."""
    data = digits()
    stream = generator(0, "shifts")
    offsets = torch.randint(-pixels, pixels + 1, (len(data.test), 2), generator=stream)
    moved = torch.stack(
        [
            torch.roll(image, tuple(offset.tolist()), dims=(-2, -1))
            for image, offset in zip(data.test.inputs, offsets, strict=True)
        ]
    )
    return replace(data, name="shifted_digits", test=with_inputs(data.test, moved))


def unscaled(*, spread: float = 3.0) -> Dataset:
    """Digits of which each pixel has a unit of its own, between 10^-spread and 10^spread."""
    data = digits()
    powers = torch.rand(data.input_shape, generator=generator(0, "units")) * 2 - 1
    units = 10.0 ** (spread * powers)
    return replace(
        data,
        name="unscaled_digits",
        train=with_inputs(data.train, data.train.inputs * units),
        test=with_inputs(data.test, data.test.inputs * units),
    )


def irrelevant(*, columns: int = 400, each: int = 20) -> Dataset:
    """Few digits as rows of 64 pixels, with columns of uniform noise beside them."""
    data = few(each=each)
    stream = generator(0, "noise columns")

    def widened(records: Records) -> Records:
        noise = torch.rand(len(records), columns, generator=stream)
        return with_inputs(records, torch.cat([records.inputs.flatten(1), noise], dim=1))

    return replace(
        data,
        name="irrelevant_columns",
        train=widened(data.train),
        test=widened(data.test),
        input_shape=(64 + columns,),
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


def saddle(
    input_shape: tuple[int, ...], num_classes: int, seed: int, scale: float = 1e-3
) -> Classifier:
    """Make an MLP whose initial weights are so small that training begins at a saddle point."""
    model = mlp(input_shape=input_shape, num_classes=num_classes, hidden=(64, 64, 64), seed=seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(scale)
                module.bias.zero_()
    return model
