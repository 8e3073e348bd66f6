"""A toy data set whose records are identified by id, and the ids of each experience."""

import pytest
import torch

from perdure.data.datasets.base import Dataset
from perdure.data.experience import Stream
from perdure.data.records import Records


def records(n: int, *, classes: int = 4, first_id: int = 0, partition: str = "toy") -> Records:
    """Return random records with the classes in turn and ids from `first_id`."""
    generator = torch.Generator().manual_seed(first_id)
    return Records(
        inputs=torch.rand(n, 1, 4, 6, generator=generator),
        labels=torch.arange(n) % classes,
        ids=torch.arange(n) + first_id,
        partition=partition,
    )


@pytest.fixture(scope="module")
def toy() -> Dataset:
    return Dataset(
        name="toy",
        train=records(400),
        test=records(80, first_id=400, partition="toy-test"),
        num_classes=4,
        input_shape=(1, 4, 6),
    )


def places(stream: Stream) -> list[set[int]]:
    """Return the ids in each experience."""
    return [set(experience.train.ids.tolist()) for experience in stream]
