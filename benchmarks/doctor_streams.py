"""Streams of the doctor's benchmark: the embedded digits, whole, spoilt, and in experiences."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from perdure import Stream
from perdure.data import Dataset, digits, joint, permuted, split
from perdure.utils import generator

CLASSES = 10
DECLARED = 1_250
"""Declared number of training records; there are 1,257."""


def whole(seed: int) -> Stream:
    """Return all digits as one experience."""
    return joint(digits(seed=seed, declared_size=DECLARED))


def as_sequences(seed: int) -> Stream:
    """Return the digits as sequences of 8 rows of 8 pixels."""
    return _changed(seed, inputs=lambda rows: rows.reshape(len(rows), 8, 8))


def as_pixels(seed: int) -> Stream:
    """Return the digits as sequences of 64 pixels."""
    return _changed(seed, inputs=lambda rows: rows.reshape(len(rows), 64, 1))


def _changed(
    seed: int,
    *,
    inputs: Callable[[Tensor], Tensor] = lambda rows: rows,
    labels: Callable[[Tensor], Tensor] = lambda rows: rows,
    keep: Callable[[Tensor], Tensor] | None = None,
) -> Stream:
    """Return the digits with other inputs in both parts, and other training labels or records."""
    data = digits(seed=seed, declared_size=DECLARED)
    parts = []
    for part in (data.train, data.test):
        fits: dict[str, Any] = {"inputs": inputs(part.inputs), "domain": None}
        if part is data.train:
            fits["labels"] = labels(part.labels)
        changed = replace(part, **fits)
        if part is data.train and keep is not None:
            changed = changed.take(keep(changed.labels))
            changed = replace(changed, declared_size=len(changed))
        parts.append(changed)
    shape = tuple(parts[0].inputs.shape[1:])
    return joint(
        Dataset(
            name="digits", train=parts[0], test=parts[1], num_classes=CLASSES, input_shape=shape
        )
    )


def noisy_labels(seed: int) -> Stream:
    """Replace 40 % of the training labels by random ones."""

    def changed(labels: Tensor) -> Tensor:
        draws = generator(seed, "noise")
        hit = torch.rand(len(labels), generator=draws) < 0.4
        return torch.where(hit, torch.randint(CLASSES, labels.shape, generator=draws), labels)

    return _changed(seed, labels=changed)


def shuffled_labels(seed: int) -> Stream:
    """Give every training label to a random other record."""
    return _changed(
        seed,
        labels=lambda labels: labels[
            torch.randperm(len(labels), generator=generator(seed, "shuffle"))
        ],
    )


def imbalanced(seed: int) -> Stream:
    """Keep four training records of each of the classes 5 to 9."""

    def kept(labels: Tensor) -> Tensor:
        found = labels < 5
        for label in range(5, CLASSES):
            found[torch.nonzero(labels == label).flatten()[:4]] = True
        return found

    return _changed(seed, keep=kept)


def few_records(seed: int) -> Stream:
    """Keep 30 training records."""

    def kept(labels: Tensor) -> Tensor:
        chosen = torch.randperm(len(labels), generator=generator(seed, "few"))[:30]
        return torch.zeros(len(labels), dtype=torch.bool).index_fill(0, chosen, True)

    return _changed(seed, keep=kept)


def unscaled(seed: int) -> Stream:
    """Scale the inputs to 0 .. 255."""
    return _changed(seed, inputs=lambda rows: 255 * rows)


def split_digits(seed: int) -> Stream:
    """Return five experiences of two classes."""
    return split(digits(seed=seed), scenario="class", experiences=5)


def halved_digits(seed: int) -> Stream:
    """Return two experiences of five classes."""
    return split(digits(seed=seed), scenario="class", experiences=2)


def permuted_digits(seed: int) -> Stream:
    """Return three permutations of the pixels."""
    return permuted(digits(seed=seed), experiences=3, seed=seed)
